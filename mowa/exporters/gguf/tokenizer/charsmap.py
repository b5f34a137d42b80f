"""Normalize text with a SentencePiece `precompiled_charsmap`, as llama.cpp does for unigram vocabularies.

The map is a trie from byte strings to replacements: four bytes with its size, the trie as an XOR-compressed double
array of 32-bit units, then the replacements, each ended by a zero byte.

Source: llama-vocab.cpp of llama.cpp (MIT); Kanda, Space- and Time-Efficient String Dictionaries, 2018.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mowa.errors import DataError

INVALID = "\ufffd".encode()


class CharsMap:
    """Replace prefixes of text; user-defined tokens are left as they are."""

    def __init__(self, data: bytes, user_defined: Mapping[int, Any]) -> None:
        """Read a map, which may be empty. `user_defined`: trie of tokens that are not normalized.

        Raises DataError if the map is damaged.
        """
        size = int.from_bytes(data[:4], "little")
        if data and (size % 4 or size + 4 > len(data)):
            raise DataError(f"precompiled_charsmap has {len(data)} bytes and announces a trie of {size}: it is damaged")
        self._units = np.frombuffer(data[4 : 4 + size], "<u4").tolist()
        self._replacements = data[4 + size :]
        self._user_defined = user_defined

    def normalize(self, text: bytes) -> list[bytes]:
        """Return the normalized text in pieces, one per replaced prefix."""
        pieces, start = [], 0
        while start < len(text):
            piece, used = self._normalize_prefix(text, start)
            pieces.append(piece)
            start += used
        return pieces

    def _normalize_prefix(self, text: bytes, start: int) -> tuple[bytes, int]:
        if used := self._user_defined_length(text, start):
            return text[start : start + used], used
        if self._units and (found := self._look_up(text, start)):
            return found
        for size in range(1, 5):
            try:
                text[start : start + size].decode()
            except UnicodeDecodeError:
                continue
            return text[start : start + size], size
        return INVALID, 1

    def _user_defined_length(self, text: bytes, start: int) -> int:
        """Return how many bytes follow the trie of user-defined tokens, also where they end inside a token."""
        node: Mapping[int, Any] = self._user_defined
        for end in range(start, len(text)):
            child = node.get(text[end])
            if child is None:
                return end - start
            node = child
        return len(text) - start

    def _look_up(self, text: bytes, start: int) -> tuple[bytes, int] | None:
        """Return the replacement of the longest prefix that has one, and the length of the prefix."""
        index, used, offset = self._base(0), 0, 0
        for end in range(start, len(text)):
            byte = text[end]
            index ^= byte
            if not byte or self._unit(index) & 0x800000FF != byte:
                break
            is_leaf = self._unit(index) >> 8 & 1
            index ^= self._base(index)
            if is_leaf:
                used, offset = end + 1 - start, self._unit(index) & 0x7FFFFFFF
        if not used:
            return None
        stop = self._replacements.find(b"\0", offset)
        if stop < 0:
            raise DataError("precompiled_charsmap points outside its replacements: it is damaged")
        return self._replacements[offset:stop], used

    def _unit(self, index: int) -> int:
        if index >= len(self._units):
            raise DataError("precompiled_charsmap points outside its trie: it is damaged")
        return int(self._units[index])

    def _base(self, index: int) -> int:
        unit = self._unit(index)
        return (unit >> 10) << ((unit & 1 << 9) >> 6)
