"""Character classes as llama.cpp has them: those of Unicode 15.1, for its regular expressions and its WordPiece.

llama.cpp matches its regular expressions on text in which each character beyond ASCII is replaced by one byte for its
class, and white space beyond ASCII by a vertical tab. `fold` does the same, so that the standard `re` module with its
ASCII flag matches as llama.cpp does. The `regex` package, which transformers requires, supplies the classes; its
Unicode is newer, so the code points that Unicode 15.1 does not assign are listed here.

Source: unicode.cpp and unicode-data.cpp of llama.cpp (MIT), the Unicode Character Database 15.1.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from functools import cache
from itertools import accumulate

import regex  # type: ignore[import-untyped]

OTHER, NUMBER, LETTER, PUNCTUATION, MARK, SYMBOL, HAN_LETTER, JOINER, HAN_OTHER = map(chr, range(0xD0, 0xD9))
SPACE = "\x0b"  # stands for white space beyond ASCII
CLASSES = {
    "N": f"{NUMBER}0-9",
    "L": f"{LETTER}{HAN_LETTER}A-Za-z",
    "P": rf"{PUNCTUATION}!-#%-*,\-./:;?@\[-\]_{{}}",
    "M": MARK,
    "S": rf"{SYMBOL}$+<=>\^`|~",
    "Han": f"{HAN_LETTER}{HAN_OTHER}",
    "NotHan": f"{LETTER}A-Za-z",  # letters other than Han
    "NotLower": f"{LETTER}{HAN_LETTER}A-Z",  # letters other than a to z, beyond ASCII of any case
    "NotUpper": f"{LETTER}{HAN_LETTER}a-z",
    "Joiner": JOINER,  # U+200C and U+200D
}
"""Name of a class → its characters in folded text, for the inside of brackets of a regular expression."""

_HAN = (
    *((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F)),
    *((0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0x2CEB0, 0x2EBEF), (0x2F800, 0x2FA1F)),
)
_CATEGORY = regex.compile(r"(?P<Z>\s)|(?P<L>\p{L})|(?P<N>\p{N})|(?P<P>\p{P})|(?P<M>\p{M})|(?P<S>\p{S})|(?P<C>\p{C})")
_SYMBOLS = {"L": LETTER, "N": NUMBER, "P": PUNCTUATION, "M": MARK, "S": SYMBOL, "Z": SPACE}
_BEYOND_ASCII = re.compile("[^\x00-\x7f]")
_ESCAPE = re.compile(r"(\\\\|\\\[|\\\])|\\p\{(\w+)\}|([\[\]])")
_UNASSIGNED = """
l4 2 6 4 7 1 1 1 k 1 b1 1 12 2 1e 2 3 1 1j 8 r 4 6 b 7i 1 1o 2 2t e 1n 2 1d 2 f 1 s 2 1 1 b 5 v 1 2 6 6k 1 8 2 2
2 m 1 7 1 1 3 4 2 9 2 2 2 4 8 1 4 2 1 5 2 p 2 3 1 6 4 2 2 m 1 7 1 2 1 2 1 2 2 1 1 5 4 2 2 3 3 1 7 4 1 1 7 h a 3
1 9 1 3 1 m 1 7 1 2 1 5 2 a 1 3 1 3 2 1 f 4 2 c 7 7 1 3 1 8 2 2 2 m 1 7 1 2 1 5 2 9 2 2 2 3 7 3 4 2 1 5 2 i a 2
1 6 3 3 1 4 3 2 1 1 1 2 3 2 3 3 3 c 4 5 3 3 1 4 2 1 6 1 e l 5 d 1 3 1 n 1 g 2 9 1 3 1 4 7 2 1 3 2 1 2 4 2 a 7 m
1 3 1 n 1 a 1 5 2 9 1 3 1 4 7 2 6 2 1 4 2 a 1 3 c d 1 3 1 1f 1 3 1 6 4 g 2 q 1 3 1 i 3 o 1 9 1 1 2 7 3 1 4 6 1 1
1 8 6 a 2 3 c 1m 4 t 11 2 1 1 1 5 1 o 1 1 1 n 2 5 1 1 1 7 1 a 2 4 w 20 1 10 4 13 1 10 1 f 1 d 11 5i 1 1 5 1 2 ah
1 4 2 7 1 1 1 4 2 15 1 4 2 x 1 4 2 7 1 1 1 4 2 f 1 1l 1 4 2 1v 2 w 3 q 6 2e 2 6 2 il 3 2h 7 m 9 o 9 k c d 1 3 1
2 c 2m 2 a 6 a 6 q 6 2h 7 17 5 1y a v 1 c 4 c 4 1 3 16 2 5 b 18 4 q 6 b 3 1q 2 1t 1 t 2 b 6 a 6 e 2 v 1d 25 3 1b
1 38 8 1o 3 f 3 1o 7 17 2 b 8 17 5 eu 2 6 2 12 2 6 2 8 1 1 1 1 1 1 1 v 2 1h 1 f 1 e 2 6 1 j 2 3 1 9 1 2t 1 c 2 r
1 d 3 x f x f 3w 4 if p b l 1ec 2 w 1 9p 5 19 1 1 5 1 2 1k 7 2 e o 9 7 1 7 1 7 1 7 1 7 1 7 1 7 1 7 1 3i y q 1 2h
c 5y q 28 1 2e 2 2v 5 17 1 2m 1 2c b 1c 1 mlp 3 1j 9 9o k 54 8 5n 5 2 1 1 1 5 o 1n 3 a 6 1k 8 1y 8 c 6 38 b u 3
26 1 b 4 x 1 1j 9 e 2 a 2 2v o s a 6 2 6 2 6 9 7 1 7 1 1o 4 3i 2 a 6 8mc c n 4 1d 4 6su 2 2y 12 7 c 5 5 q 1 5 1
1 1 2 1 2 1 3h g cd 2 1i 7 1 w 16 6 1f 1 j 1 4 4 5 1 3r 2 1 1 5a 3 6 2 6 2 6 2 3 3 7 1 7 a 5 2 c 1 q 1 j 1 2 1 f
2 e y 3f 5 3 4 19 3 2g 1 d 3 1 1b 1a 3m t 3 1d f s 4 10 9 u 5 17 5 u 1 11 4 e 16 4e 2 a 6 10 4 10 4 14 8 1g b c
1 f 1 7 1 2 1 b 1 f 1 7 1 2 1v 8n 9 m a 8 o 6 1 16 1 9 1x 6 2 1 1 18 1 2 3 1 2 n 1 20 8 9 1c j 1 2 5 x 3 r 5 1
1s 1k 4 k 2 1e 1 2 5 8 1 3 1 t 2 3 4 a 7 9 7 1s w 13 4 c 9 1i 3 t 2 r 5 q 7 4 c 7 28 21 1j 1f d 1f 7 1a 8 a 86 v
1 16 1 3 2 2 23 17 8 16 m q 12 s k n 9 26 4 10 9 1w a 1 2 p 7 a 6 1h 1 i 8 13 9 2o 1 k b i 1 1b 1q 7 1 1 1 4 1 f
1 b 6 1n 5 a 6 4 1 8 2 2 2 m 1 7 1 2 1 5 1 a 2 2 2 3 2 1 6 1 5 7 2 7 3 5 3v 2k 1 5 u 20 8 a 4m 1i 2 12 y 1x b a
6 d j 1m 6 a 1i r 2 f 4 n 55 1o 2s 2b c 8 2 1 2 8 1 2 1 u 1 2 2 c 9 a 1y 8 2 1a 2 b r 20 8 2b d 21 7 a 6u 9 1 19
1 e a t 3 w 2 m 1 e 21 7 1 2 1 18 3 1 1 2 1 9 8 a 6 6 1 2 1 11 1 2 1 6 7 a 8m p 7 h 1 15 3 s 2e 1 f 1e d pn 2u
33 1 5 b 5g 218 2r d uu 33e g7 6nt ft 7 v 1 a 4 29 1 a 6 u 2 6 a 1y a a 1 7 1 l 5 j j4 2j 2t 23 4 1l 7 h 1s 5 b
2 e 4qg 8 ye 16 9 6w7 4 1 7 1 2 1 83 f 1 t 3 2 1 e 4 8 b0 1s4 2z 5 d 3 9 7 a 2 8 3mk 1a 2 n 9 38 1o 6u a 13 2 5e
l 1y 3e k c k c 2f 9 p 3r 2d 1 1z 1 2 2 1 2 2 2 4 1 c 1 1 1 7 1 1t 1 4 2 8 1 7 1 s 1 4 1 5 1 1 3 7 1 9g 2 84 2
ji f 5 1 f uo v 6 6 5x 7 1 h 2 7 1 2 1 5 5 1q x 1 34 19 3 e 2 a 4 2 8w v h 1m 5 1 cw 16 km 7 1 4 1 2 1 f 1 5h 2
g 15 24 4 a 4 2 lt 1w 24 1p 5e 4 1 r 1 2 1 1 2 1 1 a 1 4 1 1 1 1 6 1 4 1 1 1 1 1 1 3 1 2 1 1 2 1 1 1 1 1 1 1 1 1
1 2 1 1 2 4 1 7 1 4 1 4 1 1 1 a 1 h 5 3 1 5 1 h 1g 2 7i 18 4 2s c f 2 f 1 f 1 11 a 4u 1k t d 18 4 9 7 2 e 6 4a
rc 4 h 3 d 3 3b 4 2n 6 c 4 1 f c 4 1k 8 a 6 14 8 u 2 2 26 9g c e 2 d 3 9 7 1a 1 7 8 e 4 9 7 9 7 43 1 1j 11 a sm
wyo w 37e 6 66 2 4g2 e 5rl f ha 1wi f2 15u 3t7 5 38g f975 1 u 2o 3k 6o 1e6o 1eke 2 1eke 2
"""  # lengths of assigned and unassigned runs in turn from U+0080, in base 36


@cache
def _boundaries() -> list[int]:
    """Return the code points at which runs begin, alternately of unassigned and of assigned code points."""
    return list(accumulate((int(length, 36) for length in _UNASSIGNED.split()), initial=0x80))[1:]


@cache
def category(char: str) -> str:
    """Return the class of a character: L, N, P, M, S, C (control, format, private use), Z (white space) or empty."""
    code = ord(char)
    if code >= 0x80 and bisect_right(_boundaries(), code) % 2:
        return ""
    found = _CATEGORY.match(char)
    return str(found.lastgroup) if found else ""


@cache
def _symbol(char: str) -> str:
    if char in "\u200c\u200d":
        return JOINER
    symbol = _SYMBOLS.get(category(char), OTHER)
    if any(first <= ord(char) <= last for first, last in _HAN):
        return HAN_LETTER if symbol == LETTER else HAN_OTHER
    return symbol


def fold(text: str) -> str:
    """Replace each character beyond ASCII by the symbol of its class; the length stays the same."""
    return _BEYOND_ASCII.sub(lambda found: _symbol(found[0]), text)


def fold_spaces(text: str) -> str:
    """Replace white space beyond ASCII by a vertical tab; the length stays the same."""
    return _BEYOND_ASCII.sub(lambda found: SPACE if category(found[0]) == "Z" else found[0], text)


def expand_classes(pattern: str) -> str:
    r"""Replace `\p{NAME}` in a regular expression by the characters of folded text that it stands for."""
    inside = False

    def expand(found: re.Match[str]) -> str:
        nonlocal inside
        if found[3]:
            inside = found[3] == "["
        if not found[2]:
            return found[0]
        return CLASSES[found[2]] if inside else f"[{CLASSES[found[2]]}]"

    return _ESCAPE.sub(expand, pattern)


def lowercase(char: str) -> str:
    """Return the simple lowercase mapping of a character, which is one character."""
    return char if category(char) == "" else char.lower()[:1]


def base_letter(char: str) -> str:
    """Return the first character of the canonical decomposition of a character."""
    return char if category(char) == "" else unicodedata.normalize("NFD", char)[0]
