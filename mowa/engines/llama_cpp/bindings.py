"""llama.cpp by llama-cpp-python, of which the model, its logits and the text of tokens are used.

Tokens are drawn here, because its own sampler does not penalize the tokens of the prompt.
"""

from __future__ import annotations

import codecs
import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mowa.engines.llama_cpp.protocol import Completion, OnPiece, Sampling, Session, cannot_load
from mowa.errors import ModelError

PIECE_BYTES = 4096  # longer than any token


@cache
def _silent_log(module: Any) -> Any:
    """Return a callback that ignores messages; it is kept, because llama.cpp calls it until the process ends."""
    return module.llama_log_callback(lambda level, text, data: None)


class LlamaCppPython:
    """The class `Llama` of llama-cpp-python."""

    def __init__(self, module: Any, path: Path, session: Session) -> None:
        if session.gpu and not module.llama_supports_gpu_offload():
            raise ModelError("this llama-cpp-python runs on the CPU only: build it for CUDA, or omit the device")
        module.llama_log_set(_silent_log(module), None)
        kinds = {"type_k": module.GGML_TYPE_F32, "type_v": module.GGML_TYPE_F32} if session.exact else {}
        try:
            self._model = module.Llama(
                str(path),
                n_ctx=session.context,
                n_threads=session.threads,
                n_threads_batch=session.threads,
                n_gpu_layers=-1 if session.gpu else 0,
                verbose=False,
                **kinds,
            )
        except ValueError as error:
            raise cannot_load("llama-cpp-python", path) from error
        self._module = module
        self._vocab = module.llama_model_get_vocab(self._model.model)

    def complete(self, ids: Sequence[int], sampling: Sampling, max_new_tokens: int, on_piece: OnPiece) -> Completion:
        """See `Runtime.complete`."""
        text = codecs.getincrementaldecoder("utf-8")("replace")
        generator = torch.Generator()
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed)
        tokens = list(ids)
        self._model.reset()
        self._model.eval(tokens)
        for count in range(1, max_new_tokens + 1):
            token = draw(self._logits(), tokens, sampling, generator)
            if self._module.llama_vocab_is_eog(self._vocab, token):
                return Completion(count, False)
            if on_piece(token, text.decode(self._piece(token))):
                return Completion(count, False)
            if count < max_new_tokens:
                self._model.eval([token])
                tokens.append(token)
        if rest := text.decode(b"", True):
            on_piece(None, rest)
        return Completion(max_new_tokens, True)

    def next_log_probs(self, ids: Sequence[int], top: int, vocab_size: int, any_token: int) -> Tensor:
        """See `Runtime.next_log_probs`."""
        known = self._model.input_ids[: self._model.n_tokens].tolist()
        same = (index for index, pair in enumerate(zip(ids[:-1], known, strict=False)) if pair[0] != pair[1])
        common = next(same, min(len(ids) - 1, len(known)))
        self._model.n_tokens = common  # `eval` forgets what follows
        self._model.eval(list(ids[common:]))
        log_probs = self._logits()[:vocab_size].log_softmax(-1)
        kept = log_probs.topk(min(top, vocab_size)).indices
        return torch.full_like(log_probs, -torch.inf).index_copy(0, kept, log_probs[kept])

    def close(self) -> None:
        """See `Runtime.close`."""
        self._model.close()

    def _logits(self) -> Tensor:
        """Return the logits after the last token, float32 [V]."""
        pointer = self._module.llama_get_logits_ith(self._model.ctx, -1)
        return torch.from_numpy(np.ctypeslib.as_array(pointer, (self._model.n_vocab(),)).copy())

    def _piece(self, token: int) -> bytes:
        """Return the text of a token; none for control tokens."""
        buffer = ctypes.create_string_buffer(PIECE_BYTES)
        size = self._module.llama_token_to_piece(self._vocab, token, buffer, PIECE_BYTES, 0, False)
        return buffer.raw[: max(0, size)]


def draw(logits: Tensor, tokens: Sequence[int], sampling: Sampling, generator: torch.Generator) -> int:
    """Draw a token from logits, float32 [V], after `tokens`, as transformers does."""
    seen = torch.tensor(sorted(set(tokens)))
    values, penalty = logits[seen], sampling.repetition_penalty
    logits = logits.index_copy(0, seen, torch.where(values < 0, values * penalty, values / penalty))
    if sampling.temperature == 0:
        return int(logits.argmax())
    values, order = (logits / sampling.temperature).sort(descending=True)
    count = min(sampling.top_k or len(values), len(values))
    probabilities = values[:count].softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities * (before < sampling.top_p)
    return int(order[torch.multinomial(kept, 1, generator=generator)])
