"""The side of transformers: token ids and rules of the tokenizer that is exported."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from mowa.errors import ModelError


class HFTokenizer:
    """A fast tokenizer of transformers without truncation and padding.

    spec  its JSON, as in tokenizer.json
    """

    def __init__(self, tokenizer: Any) -> None:
        """Copy the backend. Raises ModelError if the tokenizer has none."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(
                f"{type(tokenizer).__name__} is a slow tokenizer without tokenizer.json, and its rules cannot be read: "
                "load it with use_fast=True, or convert it with transformers.convert_slow_tokenizer and save it"
            )
        self.spec: dict[str, Any] = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
        self._backend = Tokenizer.from_str(json.dumps(self.spec))

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Return the token ids of a text; special tokens that it spells are parsed."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special).ids
        return ids

    def normalize(self, text: str) -> str:
        """Return the text as the normalizer changes it."""
        normalizer = self._backend.normalizer
        return str(normalizer.normalize_str(text)) if normalizer else text

    def words(self, text: str) -> list[str]:
        """Return normalized text as the pre-tokenizer splits and spells it."""
        pre_tokenizer = self._backend.pre_tokenizer
        return [word for word, _ in pre_tokenizer.pre_tokenize_str(text)] if pre_tokenizer else [text]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special ones included."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def surrounding_ids(self) -> tuple[list[int], list[int]]:
        """Return the ids that are put before and after a text.

        Raises ModelError if they depend on the text.
        """
        found: list[tuple[list[int], list[int]]] = []
        for text in ("a", "b c", ""):
            plain, full = self.encode(text), self.encode(text, True)
            start = next((i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain), None)
            if start is None:
                raise ModelError("the tokenizer changes text where it adds special tokens, which llama.cpp cannot do")
            if plain:
                found.append((full[:start], full[start + len(plain) :]))
            elif found and full != [*found[0][0], *found[0][1]]:
                raise ModelError("the tokenizer adds other special tokens to an empty text, which llama.cpp cannot do")
        if any(one != found[0] for one in found):
            raise ModelError("the special tokens that the tokenizer adds depend on the text, which llama.cpp cannot do")
        return found[0]


def names_of(tokens: Sequence[str], ids: Sequence[int]) -> str:
    """Return tokens by id for a message."""
    return ", ".join(repr(tokens[index]) if index < len(tokens) else str(index) for index in ids) or "none"
