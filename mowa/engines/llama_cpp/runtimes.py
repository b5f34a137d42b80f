"""The packages that hold llama.cpp, behind one interface: complete token ids, and score the next token.

| package            | installs                                    | answers                    | scores              |
|--------------------|---------------------------------------------|----------------------------|---------------------|
| `xllamacpp`        | wheels for Linux, macOS and Windows         | text, and most token ids   | all tokens, as JSON |
| `llama-cpp-python` | compiles llama.cpp, which needs a compiler  | token ids                  | all tokens          |

xllamacpp is used where both are installed, because it follows llama.cpp closely (a release per build) and frees
Python's lock while it computes. It is the server of llama.cpp without a process of its own. That server also listens on
a port of this machine, on 127.0.0.1 only; a random key, which nobody is given, closes it.

OpenMP: threads of libgomp wait by spinning, and where cores are busy with something else, the threads that compute wait
for those that spin: 2 instead of 50 tokens/s. `OMP_WAIT_POLICY=PASSIVE` and `GOMP_SPINCOUNT=0` are therefore set while
the library is loaded, which is when it reads them, unless they are set already, and are then removed again: other
libraries and processes are not affected.
"""

from __future__ import annotations

import codecs
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mowa.errors import MissingDependency, ModelError

OPENMP = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
SAMPLERS = ("penalties", "temperature", "top_k", "top_p")  # in the order of transformers
FORCED = 1e6  # logit of a token that is to be drawn
MIN_LOG_PROB = -103.0  # float32 has no smaller probabilities, which the server computes before their logarithms
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


def find_runtime() -> str | None:
    """Return the package that runs GGUF files here: xllamacpp or llama_cpp; None if neither is installed."""
    return next((name for name in RUNTIMES if find_spec(name) is not None), None)


def require_runtime(path: object) -> str:
    """As `find_runtime`. Raises MissingDependency if there is none."""
    if (found := find_runtime()) is None:
        raise MissingDependency(
            f"{path} needs llama.cpp: pip install 'mowa[gguf]', or run it in PyTorch (engine pytorch, mowa.load)"
        )
    return found


def open_runtime(path: Path, session: Session) -> Runtime:
    """Load a file. Raises ModelError if llama.cpp cannot load it, MissingDependency without a runtime."""
    name = require_runtime(path)
    with _passive_openmp():
        module = import_module(name)
    return RUNTIMES[name](module, path, session)


@contextmanager
def _passive_openmp() -> Iterator[None]:
    ours = [name for name in OPENMP if name not in os.environ]
    if "OMP_WAIT_POLICY" in os.environ:  # the user chose how threads wait
        ours = []
    os.environ.update({name: OPENMP[name] for name in ours})
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _cannot_load(package: str, path: Path) -> ModelError:
    return ModelError(
        f"llama.cpp ({package}) cannot load {path}: run it in PyTorch (engine pytorch), or update {package}"
    )


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
            raise _cannot_load("xllamacpp", path) from error

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


class LlamaCppPython:
    """The class `Llama` of llama-cpp-python."""

    def __init__(self, module: Any, path: Path, session: Session) -> None:
        if session.gpu and not module.llama_supports_gpu_offload():
            raise ModelError("this llama-cpp-python runs on the CPU only: build it for CUDA, or omit the device")
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
            raise _cannot_load("llama-cpp-python", path) from error
        self._module = module

    def complete(self, ids: Sequence[int], sampling: Sampling, max_new_tokens: int, on_piece: OnPiece) -> Completion:
        """See `Runtime.complete`."""
        vocab = self._model._model.vocab
        text = codecs.getincrementaldecoder("utf-8")("replace")
        self._model.set_seed(secrets.randbits(31) if sampling.seed is None else sampling.seed % (2**32 - 1))
        drawn = self._model.generate(
            list(ids),
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=0.0,
            temp=sampling.temperature,
            repeat_penalty=sampling.repetition_penalty,
        )
        count = 0
        for token in drawn:
            count += 1
            if self._module.llama_vocab_is_eog(vocab, token):
                return Completion(count, False)
            piece = text.decode(self._model._model.token_to_piece(token))
            if on_piece(token, piece):
                return Completion(count, False)
            if count == max_new_tokens:
                break
        return Completion(count, True)

    def next_log_probs(self, ids: Sequence[int], top: int, vocab_size: int, any_token: int) -> Tensor:
        """See `Runtime.next_log_probs`."""
        common = 0
        known = self._model.input_ids[: self._model.n_tokens].tolist()
        while common < min(len(ids) - 1, len(known)) and known[common] == ids[common]:
            common += 1
        self._model.n_tokens = common  # `eval` forgets what follows
        self._model.eval(list(ids[common:]))
        logits = self._module.llama_get_logits_ith(self._model.ctx, -1)
        log_probs = torch.tensor(logits[:vocab_size]).log_softmax(-1)
        kept = log_probs.topk(min(top, vocab_size)).indices
        return torch.full_like(log_probs, -torch.inf).index_copy(0, kept, log_probs[kept])

    def close(self) -> None:
        """See `Runtime.close`."""
        self._model.close()


RUNTIMES: dict[str, Callable[[Any, Path, Session], Runtime]] = {"xllamacpp": XLlamaCpp, "llama_cpp": LlamaCppPython}
"""Module → class, the preferred one first."""
