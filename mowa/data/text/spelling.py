"""Spell texts in the tokens of a vocabulary, which may be of several characters: digraphs, pieces, phonemes.

At each position the longest token that matches is taken, as transformers' Wav2Vec2CTCTokenizer does; unlike it, a space
beside a token of several characters is kept. Phonemes are separated by spaces.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import lru_cache

from mowa.types import Vocabulary


class LongestMatch:
    """Finds the longest of some strings that a text has at a position."""

    def __init__(self, strings: Iterable[str]) -> None:
        lengths: dict[str, set[int]] = defaultdict(set)
        self._strings = frozenset(strings)
        for one in self._strings:
            lengths[one[0]].add(len(one))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}

    def find(self, text: str, at: int) -> str:
        """Return the longest string that `text` has at index `at`; "" if there is none."""
        for length in self._lengths.get(text[at], ()):
            if (part := text[at : at + length]) in self._strings:
                return part
        return ""


def textual_tokens(vocabulary: Vocabulary) -> dict[str, int]:
    """Return text → id of the tokens that write something: not the blank and special tokens; " " is the delimiter."""
    skipped = vocabulary.specials | {vocabulary.blank}
    ids = {vocabulary.text(token).removeprefix(vocabulary.separator): token for token in range(len(vocabulary))}
    found = {text: token for text, token in ids.items() if text and token not in skipped}
    if vocabulary.delimiter is not None:
        found[" "] = vocabulary.delimiter
    return found


class Speller:
    """Spells texts in the tokens of one vocabulary. `vocabulary_speller` returns it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._ids = textual_tokens(vocabulary)
        self._by_phoneme = bool(vocabulary.separator)
        self._delimiter = "" if vocabulary.delimiter is None else vocabulary.tokens[vocabulary.delimiter]
        self._match = LongestMatch(self._ids)
        self._start = " " if any(len(text) > 1 and text[0] == " " for text in self._ids) else ""

    def spell(self, text: str) -> tuple[list[int], list[str]]:
        """Return the ids of a text, and the characters (or phonemes) that no token writes.

        Spaces that no token writes are left out: the vocabulary has none.
        """
        if self._by_phoneme:
            phonemes = [" " if one == self._delimiter else one for one in text.split()]
            return [self._ids[one] for one in phonemes if one in self._ids], [
                one for one in phonemes if one not in self._ids
            ]
        text = self._start + text
        ids, unknown, at = list[int](), list[str](), 0
        while at < len(text):
            found = self._match.find(text, at)
            if found.strip() or (found and at >= len(self._start)):
                ids.append(self._ids[found])
            elif not found and text[at] != " ":
                unknown.append(text[at])
            at += max(1, len(found))
        return ids, unknown


@lru_cache(maxsize=8)
def vocabulary_speller(vocabulary: Vocabulary) -> Speller:
    """Return the speller of a vocabulary."""
    return Speller(vocabulary)


class MultiCharacterTokens:
    """Finds tokens of several characters in a text whatever its case, and returns them as the vocabulary has them."""

    def __init__(self, tokens: Mapping[str, str]) -> None:
        """`tokens`: normalized text → token."""
        self._exact = dict(tokens)
        self._lower = {text.lower(): token for text, token in reversed(list(tokens.items()))}
        self._match_exact, self._match_lower = LongestMatch(self._exact), LongestMatch(self._lower)

    def __bool__(self) -> bool:
        return bool(self._exact)

    @property
    def with_space(self) -> bool:
        """True if a token begins with a space, so that a text has to begin with one too."""
        return any(text[0] == " " for text in self._exact)

    def find(self, text: str, lower: str, at: int) -> tuple[int, str]:
        """Return length and token at index `at`, (0, "") if there is none; `lower` is the text in lower case."""
        exact, folded = self._match_exact.find(text, at), self._match_lower.find(lower, at)
        if exact and len(exact) >= len(folded):
            return len(exact), self._exact[exact]
        return len(folded), self._lower.get(folded, "")
