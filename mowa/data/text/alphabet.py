"""Build the alphabet of a vocabulary from texts, and map texts to the characters of a vocabulary.

Word characters are those of Unicode categories L (letters), M (marks) and N (numbers). All others are punctuation and
are removed unless the vocabulary has them. Texts are normalized to NFC, with one apostrophe (') for ’ ‘ ʼ ʻ ′ ` ´, one
hyphen (-) for ‐ and ‑, and without invisible characters. Nothing here depends on a language.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial

from mowa.data.text.normalize import lower_dotted_i, remove_stress
from mowa.data.text.spelling import MultiCharacterTokens, textual_tokens
from mowa.types import Vocabulary

OOV_POLICIES = ("map", "drop", "reject")

SUBSTITUTES: dict[str, tuple[str, ...]] = {
    **{"ł": ("l",), "ø": ("ö", "o"), "đ": ("d",), "ð": ("d",), "þ": ("th",), "ħ": ("h",), "ŧ": ("t",), "ı": ("i",)},
    **{"ß": ("ss",), "æ": ("ä", "ae", "e"), "œ": ("ö", "oe"), "ŋ": ("ng", "n"), "ĸ": ("k",), "ə": ("e",)},
    **{"ɓ": ("b",), "ɗ": ("d",), "ƙ": ("k",), "ƴ": ("y",), "ɲ": ("ny", "n"), "ɔ": ("o",), "ʒ": ("z",), "ʃ": ("sh",)},
    # Kabyle is also typed with Greek letters that look alike
    **{"ɣ": ("γ", "g"), "γ": ("ɣ", "g"), "ɛ": ("ε", "e"), "ε": ("ɛ", "e")},
    **{"ґ": ("г",), "є": ("е",), "і": ("и",), "ј": ("й",), "ә": ("а",), "ғ": ("г",), "қ": ("к",), "ң": ("н",)},
    **{"ө": ("о",), "ү": ("у",), "ұ": ("у",), "һ": ("х",)},
}
"""Substitutes of characters that NFKD does not decompose, in order of preference."""

_VARIANTS = {"'": "’‘ʼʻ′`´", "-": "‐‑"}
_UNIFY = str.maketrans(
    {variant: one for one, variants in _VARIANTS.items() for variant in variants}
    | {invisible: None for invisible in "\u00ad\u200b\u200c\u200d\u2060\ufeff"}
)
_EDGE = r"\s!-/:-@\[-`{-~\u00a1-\u00bf\u2010-\u206f\u3000-\u303f"
_LOOSE = re.compile(rf"(?<![^{_EDGE}])-|-(?![^{_EDGE}])|(?<![^{_EDGE}])'(?![^{_EDGE}])")
_MIN_APOSTROPHES, _MIN_HYPHENS = 1 / 200, 1 / 100  # per word, to be part of a new alphabet


def build_alphabet(texts: Iterable[str], *, min_count: int = 1, char_map: Mapping[str, str] | None = None) -> str:
    """Return the characters of a new vocabulary: lower case, NFC, sorted, each at least `min_count` times in `texts`.

    `char_map` is applied first, as by `quality.filter.FilterConfig`.

    Spaces, punctuation and digits are left out: numbers have to be written as words to be trained on. A mark that NFC
    composes with its letter is not a character of its own (Polish ż, Kabyle ẓ, Russian й); one that it does not compose
    is, since a token is one character (Yoruba ẹ̀, Hindi vowel signs), except stress marks on Cyrillic vowels. The
    apostrophe is included if it touches a letter in at least one of 200 words (Hausa 'yan and sana'a, English), the
    hyphen if it is between two letters in at least one of 100 words (Kabyle d-yusa); in Polish neither is.
    """
    map_characters = compile_char_map(char_map or {})
    seen: Counter[str] = Counter()
    words = 0
    for text in texts:
        normalized = normalize_characters(map_characters(text))
        seen.update(normalized)
        words += len(normalized.split())
    counted: Counter[str] = Counter()
    for c, count in seen.items():
        counted[_lower(c)] += count
    frequent = {"'": counted["'"] >= _MIN_APOSTROPHES * words, "-": counted["-"] >= _MIN_HYPHENS * words}
    kept = (c for c in counted if (frequent[c] if c in frequent else is_word_char(c) and not _is_number(c)))
    return "".join(sorted(c for c in kept if counted[c] >= max(1, min_count)))


def find_missing_tokens(texts: Sequence[str], vocabulary: Vocabulary, char_map: Mapping[str, str]) -> tuple[str, ...]:
    """Return what a vocabulary lacks to spell `texts`, sorted: phonemes, or the characters that `build_alphabet` finds.

    Characters are upper case where the vocabulary is, although it writes lower case.
    """
    mapper = VocabularyMapper(vocabulary, "reject", char_map)
    if vocabulary.separator:
        return tuple(sorted({phoneme for text in texts for phoneme in mapper.map_text(text)[2]}))
    missing = frozenset[str]().union(*(mapper.missing_characters(text) for text in texts))
    found = (c for c in build_alphabet(texts, char_map=char_map) if c in missing)
    return tuple(c.upper() if vocabulary.lower_case and len(c.upper()) == 1 else c for c in found)


def normalize_characters(text: str) -> str:
    """Normalize to NFC, unify apostrophes and hyphens, and keep these only where they touch a letter."""
    text = remove_stress(unicodedata.normalize("NFC", text.translate(_UNIFY)))
    # again, since a removed character may have been between a letter and its mark
    text = unicodedata.normalize("NFC", text).translate(_UNIFY)
    return _LOOSE.sub(" ", lower_dotted_i(text))


def _lower(text: str) -> str:
    """Convert to lower case without the combining dot that a Turkish İ leaves."""
    return lower_dotted_i(text.lower())


def compile_char_map(char_map: Mapping[str, str]) -> Callable[[str], str]:
    """Return a function that replaces the keys in one pass, longest first, and normalizes to NFC.

    A key in lower case also applies to its upper case: {"ё": "е"} replaces Ё by Е.
    """
    lower = {unicodedata.normalize("NFC", key): value for key, value in char_map.items() if key}
    upper = {key.upper(): value.upper() for key, value in lower.items() if len(key.upper()) == len(key)}
    replacements = upper | lower
    if not replacements:
        return partial(unicodedata.normalize, "NFC")
    pattern = re.compile("|".join(map(re.escape, sorted(replacements, key=len, reverse=True))))
    return lambda text: pattern.sub(lambda match: replacements[match[0]], unicodedata.normalize("NFC", text))


def is_word_char(c: str) -> bool:
    """Return whether a character is a letter, a mark or a number."""
    return unicodedata.category(c)[0] in "LMN"


def _is_number(c: str) -> bool:
    return unicodedata.category(c)[0] == "N"


class VocabularyMapper:
    """Map texts to what a vocabulary can spell. What each character becomes is decided once and cached.

    Tokens of several characters and phonemes, which spaces separate, are kept whole. `oov` (one of
    `OOV_POLICIES`) and `char_map` are those of `quality.filter.FilterConfig`; with `map`, a text with an unknown
    phoneme is rejected.
    """

    def __init__(self, vocabulary: Vocabulary, oov: str, char_map: Mapping[str, str]) -> None:
        tokens = textual_tokens(vocabulary)
        self._vocabulary = frozenset(text for text in tokens if len(text) == 1) - {" ", "|"}
        self._folded = {token.casefold() for token in self._vocabulary}
        self._oov = oov
        self._decisions: dict[str, tuple[str, str]] = {}
        self._map_characters = compile_char_map(char_map)
        variants = (
            (one, variant) for one, many in _VARIANTS.items() if one not in self._vocabulary for variant in many
        )
        self._variants = {ord(one): variant for one, variant in variants if variant in self._vocabulary}
        normalized = {text: unicodedata.normalize("NFC", text.translate(_UNIFY)) for text in tokens}
        self._multi = MultiCharacterTokens({key: text for text, key in normalized.items() if len(text) > 1})
        self._phonemes: dict[str, str] = {}
        if vocabulary.separator:
            self._phonemes = {unicodedata.normalize("NFC", text): text for text in tokens if text != " "}
        if vocabulary.separator and vocabulary.delimiter is not None:
            delimiter = vocabulary.tokens[vocabulary.delimiter]
            self._phonemes[delimiter] = delimiter

    def map_text(self, text: str) -> tuple[str, list[tuple[str, str, int]], frozenset[str]]:
        """Return the mapped text, (character, replacement, count) of mapped characters, and the rejected characters."""
        if self._phonemes:
            return self._map_phonemes(self._map_characters(text))
        text = normalize_characters(self._map_characters(text))
        characters: dict[str, set[str]] = {"mapped": set(), "rejected": set()}
        out = []
        for c in self._units(text):
            if len(c) > 1:
                out.append(c)
                continue
            replacement, verdict = self._decisions.get(c) or self._decisions.setdefault(c, self._decide(c))
            out.append(replacement)
            if verdict:
                characters[verdict].add(c)
        mapped = [(c.lower(), self._decisions[c][0], text.count(c)) for c in sorted(characters["mapped"])]
        joined = _LOOSE.sub(" ", remove_stress("".join(out)))  # a hyphen may have lost its letter
        rejected = frozenset(c.lower() for c in characters["rejected"])
        return " ".join(joined.translate(self._variants).split()), mapped, rejected

    def missing_characters(self, text: str) -> frozenset[str]:
        """Return the characters, in lower case, that no token has: not the vocabulary's, and in none of several."""
        text = normalize_characters(self._map_characters(text))
        single = {c for c in self._units(text) if len(c) == 1}
        return frozenset(_lower(c) for c in single if c.casefold() not in self._folded)

    def _units(self, text: str) -> Iterator[str]:
        """Yield the tokens of several characters in a text, as the vocabulary has them, and the other characters."""
        if not self._multi:
            yield from text
            return
        if self._multi.with_space:
            text = f" {' '.join(text.split())}"
        lower = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
        at = 0
        while at < len(text):
            length, token = self._multi.find(text, lower, at)
            yield token or text[at]
            at += length or 1

    def _map_phonemes(self, text: str) -> tuple[str, list[tuple[str, str, int]], frozenset[str]]:
        phonemes = text.split()
        unknown = Counter(phoneme for phoneme in phonemes if phoneme not in self._phonemes)
        kept = " ".join(self._phonemes[phoneme] for phoneme in phonemes if phoneme in self._phonemes)
        if self._oov == "drop":
            return kept, [(phoneme, "", count) for phoneme, count in sorted(unknown.items())], frozenset()
        return kept, [], frozenset(unknown)

    def _decide(self, c: str) -> tuple[str, str]:
        """Return the replacement of a character, and "mapped" or "rejected" if it is not the same character."""
        if c in self._vocabulary or ord(c) in self._variants:
            return c, ""
        if not is_word_char(c):
            return ("" if c == "'" else " "), ""
        if (same := self._match_case(c) or self._match_case(unicodedata.normalize("NFD", c))) is not None:
            return same, ""
        if self._oov == "map":
            for substitute in _substitutes(c):
                if (found := self._match_case(substitute)) is not None:
                    return found, "mapped"
        if self._oov == "reject" or (self._oov == "map" and _is_number(c)):
            return "", "rejected"
        return "", "mapped"

    def _match_case(self, text: str) -> str | None:
        """Return the text in the case that the vocabulary has, or None if it lacks a character."""
        return next((form for form in (text, _lower(text), text.upper()) if self._vocabulary.issuperset(form)), None)


@lru_cache(maxsize=4096)
def _substitutes(c: str) -> tuple[str, ...]:
    """Return the substitutes of a character: those of the table, its base letter, and those of the base letter."""
    lower = c.lower()
    base = "".join(part for part in unicodedata.normalize("NFKD", lower) if not unicodedata.combining(part))
    return (*SUBSTITUTES.get(lower, ()), *((base, *SUBSTITUTES.get(base, ())) if base and base != lower else ()))
