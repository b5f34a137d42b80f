"""llama.cpp by xllamacpp: its server in this process, which takes and returns JSON.

Prompts are token ids, and every setting of a request is given, so that no default of the server applies.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mowa.engines.llama_cpp.protocol import Completion, OnPiece, Sampling, Session, cannot_load
from mowa.errors import ModelError

SAMPLERS = ("penalties", "temperature", "top_k", "top_p")  # in the order of transformers
FORCED = 1e6  # logit of a token that is to be drawn
MIN_LOG_PROB = -87.0  # of the server, which computes probabilities as float32 before their logarithms


class XLlamaCpp:
    """llama.cpp's server of xllamacpp. Tokens that end within a character are not reported, their text later is."""

    def __init__(self, module: Any, path: Path, session: Session) -> None:
        cpu = module.ggml_backend_dev_type.GGML_BACKEND_DEVICE_TYPE_CPU
        if session.gpu and all(device["type"] == cpu for device in module.get_device_info()):
            raise ModelError("this xllamacpp runs on the CPU only: install its wheel for CUDA, or omit the device")
        parameters = module.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx, parameters.n_parallel = session.context, 1
        for pool in (parameters.cpuparams, parameters.cpuparams_batch):
            pool.n_threads, pool.poll = session.threads, 0
        parameters.verbosity = -1  # silent
        parameters.warmup = parameters.fit_params = False
        parameters.cache_ram_mib = parameters.n_ctx_checkpoints = 0  # caches of other prompts
        parameters.n_gpu_layers = 999 if session.gpu else 0
        parameters.api_keys = [secrets.token_hex(32)]
        if session.exact:
            parameters.cache_type_k = parameters.cache_type_v = module.ggml_type.GGML_TYPE_F32
            parameters.flash_attn_type = module.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
            parameters.swa_full = True
        try:
            self._server = module.Server(parameters)
        except RuntimeError as error:
            raise cannot_load("xllamacpp", path) from error

    def complete(self, ids: Sequence[int], sampling: Sampling, max_new_tokens: int, on_piece: OnPiece) -> Completion:
        """See `Runtime.complete`."""
        request = _request(ids, sampling, max_new_tokens) | {
            "stream": True,
            "logprobs": 1,  # the way to get token ids
            "timings_per_token": True,  # and how many there were
            "cache_prompt": False,
        }
        count, reached_limit = 0, False
        problems: list[Any] = []

        def on_chunk(chunk: dict[str, Any]) -> bool:
            nonlocal count, reached_limit
            if "choices" not in chunk:
                problems.append(chunk)
                return True
            choice = chunk["choices"][0]
            count = chunk["timings"]["predicted_n"]
            reached_limit = choice["finish_reason"] == "length"
            tokens = (choice["logprobs"] or {}).get("content") or [{"id": None}]
            try:
                return on_piece(tokens[-1]["id"], choice["text"])
            except BaseException as error:  # the server ignores errors of callbacks
                problems.append(error)
                return True

        self._server.handle_completions(request, on_chunk)
        if problems:
            raise _as_error(problems[0])
        return Completion(count, reached_limit)

    def next_log_probs(self, ids: Sequence[int], top: int, vocab_size: int, any_token: int) -> Tensor:
        """See `Runtime.next_log_probs`. Log-probabilities are those of the logits, before a token is drawn."""
        request = _request(ids, Sampling(), 1) | {
            "logprobs": top,
            "cache_prompt": True,
            "logit_bias": [[any_token, FORCED]],  # a token that ends within a character would have no log-probabilities
        }
        answer = self._server.handle_completions(request)
        if "choices" not in answer:
            raise _as_error(answer)
        found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        if any(one["logprob"] is None for one in found):
            raise ModelError("llama.cpp computes probabilities that are not numbers: weights are too large for it")
        log_probs = torch.full((vocab_size,), -torch.inf)
        values = torch.tensor([max(one["logprob"], MIN_LOG_PROB) for one in found])
        return log_probs.index_copy(0, torch.tensor([one["id"] for one in found]), values)

    def close(self) -> None:
        """See `Runtime.close`."""
        del self._server


def _request(ids: Sequence[int], sampling: Sampling, max_new_tokens: int) -> dict[str, Any]:
    """Return a request to llama.cpp's server in which every default is given."""
    return {
        "prompt": list(ids),
        "max_tokens": max_new_tokens,
        "samplers": list(SAMPLERS),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": len(ids) + max_new_tokens,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": -1 if sampling.seed is None else sampling.seed % (2**32 - 1),  # 2**32 - 1 is a random one
    }


def _as_error(problem: Any) -> BaseException:
    if isinstance(problem, BaseException):
        return problem
    return ModelError(f"llama.cpp: {problem.get('error', {}).get('message', problem)}")
