"""A GGUF file that llama.cpp runs in this process, and log-probabilities of given tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from mowa import hardware
from mowa.engines.llama_cpp.protocol import Runtime, Session
from mowa.engines.llama_cpp.runtimes import open_runtime, require_runtime
from mowa.engines.llama_cpp.tokenizer import PromptTokenizer
from mowa.errors import DataError, ModelError
from mowa.io.gguf import read_gguf
from mowa.loading.gguf import ARCHITECTURE_KEY
from mowa.models.gguf import validate_metadata
from mowa.models.gguf.ctc import ARCHITECTURE as CTC_ARCHITECTURE

CONTEXT_STEP = 256  # llama.cpp rounds contexts up to multiples of this
TYPE_KEY = "general.type"


@dataclass
class LlamaCppModel:
    """A GGUF file and what runs it; weights are loaded when they are first used. One answer is generated at a time.

    path        the file
    metadata    of the file
    device      cpu or cuda
    threads     CPU threads
    exact       attention in float32, as in PyTorch, instead of llama.cpp's flash attention over float16
    """

    path: Path
    metadata: Mapping[str, Any] = field(repr=False)
    device: str = "cpu"
    threads: int = 1
    exact: bool = False
    lock: Lock = field(default_factory=Lock, repr=False)
    _runtime: Runtime | None = field(default=None, repr=False)
    _context: int = 0

    @cached_property
    def tokenizer(self) -> PromptTokenizer:
        """The tokenizer of the file."""
        return PromptTokenizer(self.metadata)

    @property
    def context_length(self) -> int | None:
        """How many tokens the model takes; None if the file does not say."""
        found = self.metadata.get(f"{self.metadata.get(ARCHITECTURE_KEY)}.context_length")
        return None if found is None else int(found)

    def open(self, num_tokens: int) -> Runtime:
        """Return the runtime, with room for `num_tokens`. Raises ModelError if llama.cpp cannot load the file."""
        if self._runtime is None or min(num_tokens, self.context_length or num_tokens) > self._context:
            self.close()
            context = -(-num_tokens // CONTEXT_STEP) * CONTEXT_STEP
            context = min(context, self.context_length or context)
            session = Session(context, self.threads, self.exact, gpu=self.device.startswith("cuda"))
            self._runtime, self._context = open_runtime(self.path, session), context
        return self._runtime

    def close(self) -> None:
        """Free the memory of the weights; they are loaded again when they are needed."""
        if self._runtime is not None:
            self._runtime.close()
        self._runtime = None


def open_model(
    path: str | Path, *, device: str = "auto", threads: int | None = None, exact: bool = False
) -> LlamaCppModel:
    """Read the header of a GGUF file, to be run by llama.cpp; see `LlamaCppModel` for the arguments.

    Raises:
        DataError: the file is missing or damaged.
        ModelError: it holds no language model, or the device is not one that llama.cpp has here.
        MissingDependency: no package with llama.cpp is installed.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ModelError(f"the llama_cpp engine runs on cpu and cuda, not on {device!r}: omit the device")
    metadata = read_gguf(path).metadata
    if metadata.get(ARCHITECTURE_KEY) == CTC_ARCHITECTURE:
        raise ModelError(f"{path} is a speech model, which llama.cpp does not run: mowa.load and mowa.transcribe do")
    if (kind := metadata.get(TYPE_KEY, "model")) != "model":
        raise ModelError(f"{path} holds no model but a GGUF of type {kind!r}, which does not run by itself")
    validate_metadata(metadata)
    require_runtime(path)
    return LlamaCppModel(Path(path), metadata, "cpu" if device == "auto" else device, _num_threads(threads), exact)


def _num_threads(threads: int | None) -> int:
    if threads is not None and (not isinstance(threads, int) or isinstance(threads, bool) or threads < 1):
        raise ModelError(f"threads is {threads!r}: it must be a whole number, at least 1")
    return threads or hardware.cpu_count()


def score(
    model: LlamaCppModel | str | Path,
    sequences: Sequence[Sequence[int]],
    *,
    top: int | None = None,
    threads: int | None = None,
) -> list[Tensor]:
    """Return log-probabilities of the next token after each position of token ids, as llama.cpp computes them.

    xllamacpp gives them as JSON, for one position per request: about 10 µs per token of the vocabulary and position,
    and one step of the model. `top` limits the former where the vocabulary is large.

    Args:
        model: a file, which is then opened with `exact`, or one that is open.
        sequences: token ids, `[T]` each.
        top: most probable tokens of each position to return; others are −inf. None: all.

    Returns:
        float32 `[T, V]` for each sequence; row t is of the token after ids[: t + 1]. None is below −87 but −inf.

    Raises:
        DataError: a sequence is empty, longer than the context, or has an id that the vocabulary lacks.
        ModelError, MissingDependency: as `open_model`.
    """
    if not isinstance(model, LlamaCppModel):
        opened = open_model(model, threads=threads, exact=True)
        try:
            return score(opened, sequences, top=top)
        finally:
            opened.close()
    vocab_size = len(model.tokenizer.gguf.tokens)
    for ids in sequences:
        _validate_ids(model, ids, vocab_size)
    if not sequences:
        return []
    any_token = _ascii_token(model)
    with model.lock:
        runtime = model.open(max(map(len, sequences)) + 1)  # and the token that is drawn
        return [
            torch.stack(
                [
                    runtime.next_log_probs(ids[: end + 1], top or vocab_size, vocab_size, any_token)
                    for end in range(len(ids))
                ]
            )
            for ids in sequences
        ]


def _validate_ids(model: LlamaCppModel, ids: Sequence[int], vocab_size: int) -> None:
    if not ids:
        raise DataError("a sequence to score has no tokens")
    if (limit := model.context_length) is not None and len(ids) > limit:
        raise DataError(f"a sequence has {len(ids):,} tokens, and {model.path} reads at most {limit:,}")
    if wrong := [index for index in ids if not 0 <= index < vocab_size]:
        raise DataError(f"{wrong[0]} is no token id of {model.path}, whose vocabulary has {vocab_size:,} tokens")


def _ascii_token(model: LlamaCppModel) -> int:
    """Return a token whose text is printable ASCII. Raises ModelError if there is none."""
    gguf = model.tokenizer.gguf
    for index in range(len(gguf.tokens)):
        text = gguf.token_bytes(index)
        if index not in gguf.special.found and text.isascii() and text.strip() and text.decode().isprintable():
            return index
    raise ModelError(f"{model.path} has no token that is ASCII text, so it cannot be scored")
