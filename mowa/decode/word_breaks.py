"""Find where words begin that no space separates: between the characters of scripts that are written without spaces.

Chinese and Japanese characters are words of their own here, and Thai, Lao, Khmer, Burmese, Javanese and Balinese ones
with their marks, so that segments, subtitles and live streams can break between them. A vocabulary that cannot write
spaces at all has a word per token. Sources of the scripts: Unicode Standard Annex #14, classes ID, CJ, SA and AK.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from mowa.types import Vocabulary

_UNSPACED = re.compile(
    "["
    "\u0e00-\u0eff"  # Thai, Lao
    "\u0f0b"  # the Tibetan mark between syllables
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Burmese
    "\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\uaa80-\uaadf"  # Khmer, the Tai scripts
    "\u1b00-\u1b7f\ua980-\ua9df"  # Balinese, Javanese
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d"
    "\ua000-\ua4cf\U00016f00-\U00018fff\U0001b000-\U0001b2ff\U00020000-\U0003ffff"  # Yi, Tangut, kana, Han
    "]"
)
# Thai and Lao vowels of the letter before them; kana that never begin a line (々, small ones, ー)
_CONTINUING = re.compile(
    "[\u0e30\u0e32\u0e33\u0e45\u0eb0\u0eb2\u0eb3\u3005\u3041\u3043\u3045\u3047\u3049\u3063\u3083\u3085\u3087"
    "\u30a1\u30a3\u30a5\u30a7\u30a9\u30c3\u30e3\u30e5\u30e7\u30fc\uff67-\uff70]"
)
# Thai and Lao vowels written before their letter; signs that stack the next letter below the one before
_CONTINUED = re.compile("[\u0e40-\u0e44\u0ec0-\u0ec4\u1039\u17d2\u1a60\u1b44\ua9c0]")
_OPENING = {"Ps", "Pi"}
_CLOSING = {"Mn", "Mc", "Me", "Pc", "Pd", "Pe", "Pf", "Po", "Lm", "Sk"}


@lru_cache(maxsize=64)
def writes_spaces(vocabulary: Vocabulary) -> bool:
    """Return whether any token writes a space."""
    textual = (i for i in range(len(vocabulary)) if i != vocabulary.blank and i not in vocabulary.specials)
    return any(re.search(r"\s", vocabulary.text(token)) for token in textual)


def starts_word(before: str, after: str, *, spaced: bool) -> bool:
    """Return whether a word starts with the text `after` although no space is between it and the text `before`.

    `spaced` is `writes_spaces` of the vocabulary.
    """
    if not before or not after or before[-1].isspace():
        return False
    last, first = before[-1], after[0]
    if _CONTINUED.match(last) or _CONTINUING.match(first):
        return False
    if unicodedata.category(last) in _OPENING or unicodedata.category(first) in _CLOSING:
        return False
    return not spaced or bool(_UNSPACED.match(last) or _UNSPACED.match(first))
