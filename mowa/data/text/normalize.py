"""Normalize texts to the form in which they are compared: error rates, verdicts, duplicates, overlap of splits.

    "Zażółć – GĘŚLĄ, jaźń!"  →  "zażółć gęślą jaźń"

1. Unicode NFC, so that composed and decomposed spellings are the same text. Not NFKC, which would make ½, ² or ﬁ other
   characters.
2. Lower case, not case folding: ß stays ß. A Turkish İ becomes i, without the combining dot that `str.lower` leaves;
   I becomes i too, because the language is unknown.
3. Letters, numbers and marks (categories L, N, Mn, Mc) are kept: vowel signs, tone marks, Arabic vowels.
   Stress marks on Cyrillic vowels are removed: they are pronunciation, not spelling.
4. Invisible characters are removed without a gap: zero-width joiners and spaces, soft hyphens, direction marks,
   variation selectors. Labels for training have no joiners either (`data.text.alphabet`).
5. All others are word boundaries, also apostrophes and hyphens inside words: "O'Hara" is "o hara", "tak-to" "tak to".
"""

from __future__ import annotations

import re
import unicodedata

_VISIBLE_FORMATS = "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2"  # signs around Arabic numbers
_IGNORABLE_MARKS = re.compile("[\u034f\u180b-\u180d\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]")
_DOTTED_I = re.compile("i\u0307+")
_STRESSED = re.compile("(?<=[аеёиоуыэюяіїєАЕЁИОУЫЭЮЯІЇЄ])[\u0300-\u036f]+")
_STRESS = str.maketrans("", "", "\u0300\u0301")


class _Kept(dict[int, "int | str | None"]):
    """A table for `str.translate` that is filled as characters occur: kept, removed (None), or a space."""

    def __missing__(self, code: int) -> int | str | None:
        character = chr(code)
        category = unicodedata.category(character)
        if _IGNORABLE_MARKS.match(character) or (category == "Cf" and character not in _VISIBLE_FORMATS):
            self[code] = None
        else:
            self[code] = code if category[0] in "LN" or category in ("Mn", "Mc") else " "
        return self[code]


_KEPT = _Kept()


def normalize_text(text: str) -> str:
    """Return `text` in lower case and NFC, without punctuation, words separated by single spaces."""
    kept = compose(compose(text).lower().translate(_KEPT))
    return " ".join(compose(remove_stress(compose(lower_dotted_i(kept)))).split())


def lower_dotted_i(text: str) -> str:
    """Return lower-case text without the combining dot that the lower case of a Turkish İ has."""
    return _DOTTED_I.sub("i", text)


def remove_stress(text: str) -> str:
    """Return `text` without stress marks on Cyrillic vowels: ко́шка → кошка."""
    return _STRESSED.sub(lambda marks: marks[0].translate(_STRESS), text)


def compose(text: str) -> str:
    """Return `text` in NFC, as names of speakers are compared: é is one character, however it was typed."""
    return unicodedata.normalize("NFC", text)
