"""The side of transformers: token ids and rules of the tokenizer that is exported."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mowa.errors import ModelError
from mowa.exporters.gguf.tokenizer.sentencepiece_model import SentencePieceModel, read_sentencepiece


class HFTokenizer:
    """A tokenizer of transformers without truncation and padding.

    spec  the JSON of a fast tokenizer, as in tokenizer.json; that of a slow one has its SentencePiece model
    """

    def __init__(self, tokenizer: Any) -> None:
        """Copy the backend of a fast tokenizer, or read the model file of a slow one.

        Raises ModelError if there is neither.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._tokenizer = tokenizer
        self._backend: Tokenizer | None = None
        if backend is not None:
            self.spec: dict[str, Any] = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
            self._backend = Tokenizer.from_str(json.dumps(self.spec))
            return
        path = str(getattr(tokenizer, "vocab_file", None) or "")
        if not path.endswith(".model") or not Path(path).is_file():
            raise ModelError(
                f"{type(tokenizer).__name__} is a slow tokenizer without a SentencePiece model, which cannot be read: "
                "load it with use_fast=True, or convert it with transformers.convert_slow_tokenizer and save it"
            )
        self.spec = _spec_of_slow(tokenizer, read_sentencepiece(Path(path)))

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Return the token ids of a text; special tokens that it spells are parsed."""
        if self._backend is None:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special))
        return list(self._backend.encode(text, add_special_tokens=add_special).ids)

    def normalize(self, text: str) -> str:
        """Return the text as the normalizer changes it."""
        normalizer = self._backend.normalizer if self._backend else None
        return str(normalizer.normalize_str(text)) if normalizer else text

    def words(self, text: str) -> list[str]:
        """Return normalized text as the pre-tokenizer splits and spells it."""
        pre_tokenizer = self._backend.pre_tokenizer if self._backend else None
        return [word for word, _ in pre_tokenizer.pre_tokenize_str(text)] if pre_tokenizer else [text]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special ones included."""
        return str((self._backend or self._tokenizer).decode(list(ids), skip_special_tokens=False))

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


def _spec_of_slow(tokenizer: Any, model: SentencePieceModel) -> dict[str, Any]:
    """Return what the JSON of a fast tokenizer would hold, with the SentencePiece model for the model."""
    names = ("special", "lstrip", "rstrip", "single_word", "normalized")
    added = [
        {"id": index, "content": str(token), **{name: getattr(token, name) for name in names}}
        for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items()
    ]
    pairs = list(zip(model.pieces, model.scores, strict=True))
    return {"added_tokens": added, "model": {"type": "SentencePiece", "vocab": pairs, "sentencepiece": model}}


def names_of(tokens: Sequence[str], ids: Sequence[int]) -> str:
    """Return tokens by id for a message."""
    return ", ".join(repr(tokens[index]) if index < len(tokens) else str(index) for index in ids) or "none"
