"""The four subword models of llama.cpp: merges by rank, merges by score, longest match, and unigram.

Each turns one word, or a whole text, into pieces or ids. Where Hugging Face and llama.cpp break ties differently, these
functions do as llama.cpp does.

Source: llama-vocab.cpp of llama.cpp (MIT).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import Any

UNKNOWN_PENALTY = 10.0  # below the lowest score, for a character that no piece covers


def merge_by_rank(word: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Merge the characters of a word (BPE): always the pair of the lowest rank, of equal ones the leftmost.

    Args:
        ranks: (left, right) → position of the merge in the list of merges.
    """
    if len(word) < 2:
        return list(word)

    def priority(left: str, right: str) -> tuple[float, str] | None:
        rank = ranks.get((left, right))
        return None if rank is None else (rank, left + right)

    return _merge(list(word), priority)


def merge_by_score(text: str, scores: Mapping[str, float]) -> list[str]:
    """Merge the characters of a text (SentencePiece BPE): the pair whose joined text scores highest, then the leftmost.

    Args:
        scores: text of a token → score; pairs whose joined text is no token are not merged.
    """

    def priority(left: str, right: str) -> tuple[float, str] | None:
        joined = left + right
        score = scores.get(joined)
        return None if score is None else (-score, joined)

    return _merge(list(text), priority)


def _merge(pieces: list[str], priority: Callable[[str, str], tuple[float, str] | None]) -> list[str]:
    """Merge neighbours while a pair has a priority: the lowest number first, then the leftmost."""
    before, after = list(range(-1, len(pieces) - 1)), [*range(1, len(pieces)), -1]
    queue: list[tuple[float, int, int, str]] = []

    def push(left: int, right: int) -> None:
        if left >= 0 and right >= 0 and (found := priority(pieces[left], pieces[right])):
            heapq.heappush(queue, (found[0], left, right, found[1]))

    for index in range(len(pieces) - 1):
        push(index, index + 1)
    while queue:
        _, left, right, joined = heapq.heappop(queue)
        if not pieces[left] or not pieces[right] or pieces[left] + pieces[right] != joined:
            continue  # one of the two was merged with another piece
        pieces[left], pieces[right] = joined, ""
        after[left] = after[right]
        if after[right] >= 0:
            before[after[right]] = left
        push(before[left], left)
        push(left, after[left])
    return [piece for piece in pieces if piece]


def match_longest(word: str, ids: Mapping[str, int], longest: int) -> list[int] | None:
    """Cover a word with the longest tokens from the left (WordPiece); None if some character cannot be covered.

    Args:
        word: begins with U+2581, as tokens that begin a word do.
        longest: characters of the longest token.
    """
    found, start = [], 0
    while start < len(word):
        for end in range(min(len(word), start + longest), start, -1):
            if (index := ids.get(word[start:end])) is not None:
                found.append(index)
                start = end
                break
        else:
            return None
    return found


def build_trie(tokens: Mapping[bytes, int]) -> dict[int, Any]:
    """Return a tree of dicts by byte; the id of a token stands under -1."""
    root: dict[int, Any] = {}
    for token, index in tokens.items():
        node = root
        for byte in token:
            node = node.setdefault(byte, {})
        node[-1] = index
    return root


def most_probable(
    text: bytes, trie: Mapping[int, Any], scores: Sequence[float], unknown: int, penalty: float
) -> list[int]:
    """Return the ids of the segmentation with the highest sum of scores (unigram); of equal ones the first found.

    Args:
        trie: of the tokens, from `build_trie`.
        scores: by id; 0 for user-defined tokens.
        unknown: id for characters that no token covers; consecutive ones become one.
        penalty: score of an unknown character.
    """
    best: list[tuple[float, int, int]] = [(float("-inf"), unknown, 0)] * (len(text) + 1)  # score, token, start
    best[0] = (0.0, unknown, 0)
    start = 0
    while start < len(text):
        size = min(_utf8_length(text[start]), len(text) - start)
        score, node, covered = best[start][0], trie, False
        for end in range(start, len(text)):
            if (child := node.get(text[end])) is None:
                break
            node = child
            if (index := node.get(-1)) is not None:
                covered |= end + 1 - start == size
                if score + scores[index] > best[end + 1][0]:
                    best[end + 1] = (score + scores[index], index, start)
        if not covered and score + penalty > best[start + size][0]:
            best[start + size] = (score + penalty, unknown, start)
        start += size
    ids: list[int] = []
    end = len(text)
    while end > 0:
        _, index, end = best[end]
        if not (index == unknown and ids and ids[-1] == unknown):
            ids.append(index)
    return ids[::-1]


def _utf8_length(first: int) -> int:
    return 1 if first < 0xC0 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
