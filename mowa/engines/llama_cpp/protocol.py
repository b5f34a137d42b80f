"""What a package with llama.cpp provides: completing token ids, and log-probabilities of the next token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from mowa.errors import ModelError

OnPiece = Callable[[int | None, str], bool]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn, without defaults: temperature 0 is greedy, top_k 0 and top_p 1 are all tokens.

    seed is None for a random one.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """How an answer ended: its number of tokens, an end token included, and whether it reached the limit."""

    num_tokens: int
    reached_limit: bool


@dataclass(frozen=True, slots=True)
class Session:
    """Settings of a loaded model. `exact`: attention in float32, without flash attention. `gpu`: layers on a GPU."""

    context: int
    threads: int
    exact: bool = False
    gpu: bool = False


class Runtime(Protocol):
    """A model in memory."""

    def complete(self, ids: Sequence[int], sampling: Sampling, max_new_tokens: int, on_piece: OnPiece) -> Completion:
        """Continue token ids until an end token or `max_new_tokens`.

        `on_piece` is called with each token and its text; text of control tokens is empty, and a token may be None if
        it is not known. It returns whether to stop.
        """

    def next_log_probs(self, ids: Sequence[int], top: int, vocab_size: int, any_token: int) -> Tensor:
        """Return log-probabilities of the token after `ids`, float32 [V]; −inf but for the `top` most probable ones.

        `any_token` is a token whose text is ASCII.
        """

    def close(self) -> None:
        """Free the model."""


def cannot_load(package: str, path: Path) -> ModelError:
    """Return the error for a file that llama.cpp rejects."""
    return ModelError(
        f"llama.cpp ({package}) cannot load {path}: run it in PyTorch (engine pytorch), or update {package}"
    )
