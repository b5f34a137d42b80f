"""Texts that show differences of tokenizers: scripts, digits, contractions, white space, emoji, marks, code, specials.

They are the same in every run. A difference between two tokenizers that no text of these shows is rare; add the text
that shows one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from itertools import product

MAX_SPECIAL = 200  # special tokens that are tried, spread over all
MAX_TOKENS = 600  # tokens of the vocabulary that are tried
MAX_OVERLAPPING = 24  # special tokens whose overlaps are tried
RANDOM_TEXTS = 2500
_SEED = 0

_SCRIPTS = """
The quick brown fox jumps over the lazy dog. | Zażółć gęślą jaźń, proszę pana!
Příliš žluťoučký kůň úpěl ďábelské ódy
Falsches Üben von Xylophonmusik quält GROẞE Zwerge | L’été, ça m’a plu : « naïveté »
İstanbul'da ILIK ısı ǅungla
ПриветМир, съешь ещё этих мягких французских булок | Щасливої дороги ЇЖАК
Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία ΣΊΣΥΦΟΣ
שָׁלוֹם עולם | مرحبا بالعالم، ١٢٣٤٥ كيف الحال؟ | می‌خواهم | नमस्ते दुनिया, क्षत्रिय १२३ | বাংলা ভাষা ৪৫৬
தமிழ் மொழி ௧௨ | తెలుగు
ಕನ್ನಡ | മലയാളം | සිංහල | ภาษาไทยไม่มีช่องว่าง ๑๒๓ | ພາສາລາວ | ភាសាខ្មែរ កាន់តែពិសេសអាច | မြန်မာဘာသာ
བོད་སྐད་ | ᠮᠣᠩᠭᠣᠯ
ქართული ენა ᲥᲐᲠᲗᲣᲚᲘ | Հայերեն լեզու | አማርኛ ቋንቋ | ᏣᎳᎩ ꮳꮃꭹ | 안녕하세요 세계, 한국어 | ᄒᆞᆫ글
こんにちは世界、カタカナ ｶﾞｷﾞ ー々〆
我想在apple工作1314151天～ 繁體中文。「引用」 | 𠮷野家 㐀㒨 豈更 | 𐌰𐌱𐌲 | 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛 | ＡＢｃ１２３！
𞤀𞤣𞤤𞤢𞤥 | ꙮ ⵣ ߒ ࠀ ꯍ ᜀ
"""
_OTHERS = """
I'm we're they've she'll he'd it's don't 'tis | I'M WE'RE THEY'VE SHE'LL HE'D IT'S
I’m we’re o'clock rock'n'roll 'S 'ſ 'K ''s 's
a'sb a'llb 'll'll 're're 'VE've 'Re 'lL 'lx 'vx 'rx | x's. x's, x's! | 3's 3'll | _'s ('s) "'s" | I\t'm
I 'm | I\n'm
1.5e-10 0x1F 1,234,567.89 12:34:56 2026-11-29 +48 123-456-789 №5 §3 50% $1.00 €2 £3 ½ ⅔ Ⅷ ① ² ₃ ٣٤٥ १२३
５６７ 𝟏𝟐 1½ a1b22c333
#include <stdio.h>\\nint main(void) {\\n\\treturn 0;\\n}
def f(x):\\n    if x >= 1:\\n        return x ** 2\\n | <a href="x">b</a>
{"key": [1, 2.0, null], "s": "a\\\\nb"} | SELECT * FROM t WHERE a='b';-- c
$HOME/bin/foo_bar.py --opt=1 && ls | x->y::z() != 0 ? a : b
fooBarBAZQuxABCdef HTMLParser iOS McDonald ÀÉÎõü ŻÓŁWżółw | ~!@#$%^&*()_+`-={}|[]\\:";'<>?,./
...!!! ,,, --- === *** ___ ### ~~~
https://example.com/a?b=c&d=%20#e | mail@example.org | C:\\\\Users\\\\x | 日本語abc123漢字 | ~foo ~~ a~b
« a » “b” ‘c’ – — … † ‰ ′ ″ ※ ¿ ¡
🚀 😶‍🌫️ 👨‍👩‍👧‍👦 👍🏽 🇵🇱🇺🇦 1️⃣ ☺️ ☺︎ 🏴󠁧󠁢󠁥󠁮󠁧󠁿 ❤️‍🔥 😀😀😀 🙂a 1🙂
e\u0301 a\u030a\u0323 o\u0302\u0301 \u0301a Z\u0351\u0346a\u0321lgo n\u0303 \uac00\u11a8 ﬁ Ω K Å ﷺ ǆ ŉ
zero\u200bwidth non\u200cjoiner joi\u200dner soft\xadhyphen \ufeffbom word\u2060joiner \u202ertl\u202c
\ue000 \uf8ff \ufffd \uffff \U0010ffff \u0378
<0x0A> <0xFF> \u2581 \u2581a \u2581\u2581 a\u2581b \u0120 \u0120a \u010a ## ##a [UNK] [PAD] <unk> <s>
</s> <pad> <|x|> <| |> <<s>> <|im_end|> <|endoftext|>
"""
_ENDS = (" ", "\n", "\t", "\r", "\r\n", "\xa0", "\u3000", "\u2028", "\x0b", "\x85")
_PIECES = (
    *("a", "B", "é", "Ж", "д", "ǅ", "中", "あ", "한", "ग", "ा", "\u0301", "7", "12", "345", "٣", "½", "'", "'s", "ll"),
    *("-", "_", "$", "~", "`", "(", "]", "“", "。", "🙂", "\u200d", " ", " ", " ", "\n", "\n", "\r", "\t", "\xa0", "/"),
    "\0",
)


def hard_texts(special: Sequence[str] = (), tokens: Sequence[str] = ()) -> list[str]:
    """Return the texts, without repetitions.

    Args:
        special: special and added tokens, which are put inside, beside and into each other's text.
        tokens: texts of tokens of the vocabulary, of which a sample is tried alone and after a space.
    """
    texts = ["", *_fixed(), *_spaces(), *_numbers(), *_random(), *_with_special(_sample(special, MAX_SPECIAL))]
    for token in _sample(tokens, MAX_TOKENS):
        texts += [token, f" {token}", f"{token}{token}"]
    return list(dict.fromkeys(texts))


def _sample(items: Sequence[str], count: int) -> Sequence[str]:
    step = max(1, len(items) // count)
    return [*items[::step], *items[-1:]] if items else []


def _fixed() -> Iterator[str]:
    for line in re.split(r" \| |\n", _SCRIPTS + _OTHERS):
        part = line.replace(r"\n", "\n").replace(r"\t", "\t")
        yield from (part, f" {part}", part.upper(), part.lower())
        yield from part.split()
        yield from (f" {word}" for word in part.split())
    yield _SCRIPTS
    yield from (chr(code) for code in range(0x20))
    yield from (f"a{chr(code)}b" for code in (*range(0x20), 0x7F, 0x80, 0x9F, 0xAD))
    yield from ("a" * 500, "ab" * 200, "1" * 200, "中" * 200, "🙂" * 50, "x" * 99 + " y", "é" * 101)


def _spaces() -> Iterator[str]:
    for count in (1, 2, 3):
        for run in product(_ENDS, repeat=count):
            space = "".join(run)
            yield from (f"a{space}b", f"{space}b!", f"7{space}") if count < 3 else (f"a{space}1",)
    for count in (*range(1, 20), 31, 32, 33, 64, 100):
        yield from (" " * count, "\n" * count, f"a{' ' * count}b", f"\n{' ' * count}x", "\t" * count, "\r\n" * count)
        yield from ("=" * count, f"{'-' * count} x", " \n" * count, "\u2581" * count)


def _numbers() -> Iterator[str]:
    for digits in ("1234567890" * 2, "٠١٢٣٤٥٦٧٨٩", "०१२३४५६७८९", "５６７８９", "ⅠⅡⅢ", "½⅓"):
        for count in range(1, len(digits) + 1):
            number = digits[:count]
            yield from (number, f" {number}", f"a{number}b", f"({number})", f"\n{number}.", f"{number} {number}")


def _random() -> Iterator[str]:
    draw = random.Random(_SEED)
    for _ in range(RANDOM_TEXTS):
        yield "".join(draw.choices(_PIECES, k=draw.randint(2, 8)))


def _with_special(special: Sequence[str]) -> Iterator[str]:
    for index, token in enumerate(special):
        other, most, last = special[(index + 1) % len(special)], token[:-1], token[-1:]
        yield from (token, f"a{token}b", f"a {token} b", f"\n{token}\n", f" {token}", f"{token} x", f"x  {token}  x")
        yield from (token + token, token + other, f"{token}\n{other}", f"{token}a{other}", most, token[1:], f"a{most}")
        yield from (token.upper(), token.lower(), f"<{token}>", f"{most} {last}", f"1{token}'s", f"{token}🙂")
        for first in special if len(special) <= MAX_OVERLAPPING else ():
            sizes = range(min(len(first), len(token)) - 1, 0, -1)
            if shared := next((size for size in sizes if first.endswith(token[:size])), 0):
                yield from (first + token[shared:], f"a{first + token[shared:]} b")
