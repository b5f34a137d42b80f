"""The letters of a vocabulary: made from texts, and texts rewritten into them.

Unicode is all that is known here, and what may stand for what; no language, and nothing of recordings.

What counts as a letter: every character of Unicode's categories L (letters), M (marks) and N (numbers). All others are
punctuation, and go unless the vocabulary has them. Texts are compared in composed form (NFC), one apostrophe (') for
’ ‘ ʼ ʻ ′ ` ´ and one hyphen (-) for ‐ and ‑; what cannot be seen is not there.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial

OOV_POLICIES = ("map", "drop", "reject")

SUBSTITUTES: dict[str, tuple[str, ...]] = {
    **{"ł": ("l",), "ø": ("ö", "o"), "đ": ("d",), "ð": ("d",), "þ": ("th",), "ħ": ("h",), "ŧ": ("t",), "ı": ("i",)},
    **{"ß": ("ss",), "æ": ("ä", "ae", "e"), "œ": ("ö", "oe"), "ŋ": ("ng", "n"), "ĸ": ("k",), "ə": ("e",)},
    **{"ɓ": ("b",), "ɗ": ("d",), "ƙ": ("k",), "ƴ": ("y",), "ɲ": ("ny", "n"), "ɔ": ("o",), "ʒ": ("z",), "ʃ": ("sh",)},
    # Kabyle is also typed in Greek letters that look alike
    **{"ɣ": ("γ", "g"), "γ": ("ɣ", "g"), "ɛ": ("ε", "e"), "ε": ("ɛ", "e")},
    **{"ґ": ("г",), "є": ("е",), "і": ("и",), "ј": ("й",), "ә": ("а",), "ғ": ("г",), "қ": ("к",), "ң": ("н",)},
    **{"ө": ("о",), "ү": ("у",), "ұ": ("у",), "һ": ("х",)},
}
"""What to write for letters that NFKD does not take apart, the likeliest first: the first that a vocabulary has."""

_VARIANTS = {"'": "’‘ʼʻ′`´", "-": "‐‑"}
_ONE = str.maketrans(
    {variant: one for one, variants in _VARIANTS.items() for variant in variants}
    | {unseen: None for unseen in "\u00ad\u200b\u200c\u200d\u2060\ufeff"}
)
_STRESS = re.compile("(?<=[аеёиоуыэюяіїєАЕЁИОУЫЭЮЯІЇЄ])[\u0300\u0301]+")  # how it is read, not how it is written
_EDGE = r"\s!-/:-@\[-`{-~\u00a1-\u00bf\u2010-\u206f\u3000-\u303f"
_LOOSE = re.compile(rf"(?<![^{_EDGE}])-|-(?![^{_EDGE}])|(?<![^{_EDGE}])'(?![^{_EDGE}])")
_APOSTROPHES, _HYPHENS = 1 / 200, 1 / 100  # in so many words they stand, or are left out of a new vocabulary


def build_alphabet(texts: Iterable[str], *, min_count: int = 1, char_map: Mapping[str, str] | None = None) -> str:
    """The letters of a new vocabulary: lower case, composed (NFC), by code point; each is there `least` times.

    `letters` are written otherwise first, as `sift.Rules` does it.

    No space, no punctuation and no digits: numbers are words, and have to be written out to be learnt. A mark that
    composes with its letter is no letter of its own (Polish ż, Kabyle ẓ, Russian й); one that does not is, since a
    token is one character (Yoruba ẹ̀, Hindi vowel signs), save the accents over Cyrillic vowels of textbooks. The
    apostrophe is a letter where it touches one and stands in one word of 200 (Hausa 'yan and sana'a, English), the
    hyphen where it stands between two in one word of 100 (Kabyle d-yusa): in Polish neither is heard, nor frequent.
    """
    otherwise = compile_char_map(char_map or {})
    seen: Counter[str] = Counter()
    words = 0
    for text in texts:
        clean = normalize_characters(otherwise(text))
        seen.update(clean)
        words += len(clean.split())
    counted: Counter[str] = Counter()
    for c, count in seen.items():
        counted[_lowered(c)] += count
    frequent = {"'": counted["'"] >= _APOSTROPHES * words, "-": counted["-"] >= _HYPHENS * words}
    kept = (c for c in counted if (frequent[c] if c in frequent else is_word_char(c) and not _is_number(c)))
    return "".join(sorted(c for c in kept if counted[c] >= max(1, min_count)))


def normalize_characters(text: str) -> str:
    """One way to write the same: composed, one apostrophe and hyphen, and these only where they touch a letter."""
    text = _STRESS.sub("", unicodedata.normalize("NFC", text.translate(_ONE)))
    text = unicodedata.normalize("NFC", text).translate(_ONE)  # what was taken out may have parted a letter and a mark
    return _LOOSE.sub(" ", text.replace("i\u0307", "i"))


def _lowered(text: str) -> str:
    """Lower case, the dot of a Turkish İ not left behind as a mark."""
    return text.lower().replace("i\u0307", "i")


def compile_char_map(char_map: Mapping[str, str]) -> Callable[[str], str]:
    """What writes letters otherwise, in one pass, the longest first: {"ё": "е"} does Ё too. Texts become NFC."""
    given = {unicodedata.normalize("NFC", key): value for key, value in char_map.items() if key}
    raised = {key.upper(): value.upper() for key, value in given.items() if len(key.upper()) == len(key)}
    known = raised | given
    if not known:
        return partial(unicodedata.normalize, "NFC")
    pattern = re.compile("|".join(map(re.escape, sorted(known, key=len, reverse=True))))
    return lambda text: pattern.sub(lambda found: known[found[0]], unicodedata.normalize("NFC", text))


def is_word_char(c: str) -> bool:
    return unicodedata.category(c)[0] in "LMN"


def _is_number(c: str) -> bool:
    return unicodedata.category(c)[0] == "N"


class VocabularyMapper:
    """Texts in a vocabulary's letters. What becomes of a character is decided once, at its first sight.

    `strange` (of STRANGE) and `otherwise` are `strange` and `letters` of `sift.Rules`.
    """

    def __init__(self, vocabulary: frozenset[str], oov: str, char_map: Mapping[str, str]) -> None:
        self._vocabulary, self._oov = vocabulary, oov
        self._known: dict[str, tuple[str, str]] = {}
        self._char_map = compile_char_map(char_map)
        variants = ((one, variant) for one, many in _VARIANTS.items() if one not in vocabulary for variant in many)
        self._signs = {ord(one): variant for one, variant in variants if variant in vocabulary}

    def map_text(self, text: str) -> tuple[str, list[tuple[str, str, int]], frozenset[str]]:
        """→ the text, (letter, what was written, how often) of each one changed, and the letters to reject it for."""
        text = normalize_characters(self._char_map(text))
        odd: dict[str, set[str]] = {"changed": set(), "outside": set()}
        written = []
        for c in text:
            spelt, verdict = self._known.get(c) or self._known.setdefault(c, self._decide(c))
            written.append(spelt)
            if verdict:
                odd[verdict].add(c)
        mapped = [(c.lower(), self._known[c][0], text.count(c)) for c in sorted(odd["changed"])]
        spaced = _LOOSE.sub(" ", _STRESS.sub("", "".join(written)))  # a hyphen may have lost its letter
        return " ".join(spaced.translate(self._signs).split()), mapped, frozenset(c.lower() for c in odd["outside"])

    def _decide(self, c: str) -> tuple[str, str]:
        """→ what to write for a character, and whether that is another letter ("changed") or none ("outside")."""
        if c in self._vocabulary or ord(c) in self._signs:
            return c, ""
        if not is_word_char(c):
            return ("" if c == "'" else " "), ""
        if (same := self._fit(c) or self._fit(unicodedata.normalize("NFD", c))) is not None:
            return same, ""
        if self._oov == "map":
            for near in _near(c):
                if (found := self._fit(near)) is not None:
                    return found, "changed"
        if self._oov == "reject" or (self._oov == "map" and _is_number(c)):
            return "", "outside"
        return "", "changed"

    def _fit(self, text: str) -> str | None:
        """The text in the case that the vocabulary has, if it has all of it."""
        return next((form for form in (text, _lowered(text), text.upper()) if self._vocabulary.issuperset(form)), None)


@lru_cache(maxsize=4096)
def _near(c: str) -> tuple[str, ...]:
    """What may stand for a letter: the table's, its base letter, and the table's for that."""
    lower = c.lower()
    base = "".join(part for part in unicodedata.normalize("NFKD", lower) if not unicodedata.combining(part))
    return (*SUBSTITUTES.get(lower, ()), *((base, *SUBSTITUTES.get(base, ())) if base and base != lower else ()))
