"""Measure one language model in its own process: load time, memory, and tokens per second.

    python -m mowa.evaluation.text_worker REQUEST.json

Prefill is the pass over a prompt of random tokens, with which an answer begins; decoding is a pass per token, with the
keys and values of the tokens before it in the cache.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mowa.evaluation.worker import run_worker

MEASUREMENT_FILE = "text_measurement.json"
PROMPT_TOKENS, NEW_TOKENS = 256, 32  # fewer where the context of the model is smaller
PREFILL_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class TextMeasurementRequest:
    """What to measure: a language model's name or folder, the dtype to compute in (or auto), and the device."""

    model: str
    dtype: str = "auto"
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class TextMeasurement:
    """What was measured of one language model, with one prompt of `prompt_tokens`.

    prefill_tokens_per_s  tokens of the prompt per second, median of `PREFILL_ROUNDS`
    decode_tokens_per_s   1 / median time of a new token
    load_s                time to load the model
    peak_memory_bytes     peak resident memory of the process, or peak memory of the GPU
    """

    dtype: str
    prompt_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    load_s: float
    peak_memory_bytes: int


def measure_text(request: TextMeasurementRequest) -> TextMeasurement:
    """Measure in a child process. Raises ModelError with its last line of output if it fails."""

    def read(folder: Path) -> TextMeasurement:
        return TextMeasurement(**json.loads((folder / MEASUREMENT_FILE).read_text()))

    return run_worker(__name__, request.model, asdict(request), read)


def _measure_in_process(request: TextMeasurementRequest) -> TextMeasurement:
    from mowa import hardware

    hardware.enable_huge_pages()
    import torch

    from mowa.adapters.causal import stored_dtype
    from mowa.io.hub import resolve_model
    from mowa.loading.causal import load
    from mowa.tasks.causal import context_length

    dtype = request.dtype
    if dtype == "auto":
        folder = resolve_model(request.model, offline=True).folder
        dtype = "float32" if request.device == "cpu" else stored_dtype(folder)
    started_s = time.perf_counter()
    model = load(request.model, dtype=dtype, device=request.device, offline=True)
    load_s = time.perf_counter() - started_s
    context = context_length(model.net.config) or PROMPT_TOKENS + NEW_TOKENS
    new_tokens = min(NEW_TOKENS, context // 2)
    count = min(PROMPT_TOKENS, context - new_tokens)
    ids = torch.randint(model.net.get_input_embeddings().num_embeddings, (1, count), generator=torch.manual_seed(0))
    prefill_s, decode_s = _time_passes(model.net, ids.to(request.device), new_tokens)
    on_gpu = request.device.startswith("cuda")
    return TextMeasurement(
        dtype=dtype,
        prompt_tokens=count,
        prefill_tokens_per_s=count / prefill_s,
        decode_tokens_per_s=1 / decode_s,
        load_s=load_s,
        peak_memory_bytes=torch.cuda.max_memory_allocated() if on_gpu else hardware.peak_rss_bytes(),
    )


def _time_passes(net: Any, ids: Any, new_tokens: int) -> tuple[float, float]:
    """Return median seconds of a pass over `ids`, int64 [1, N], and of a token after it, without the first of each."""
    import torch

    def run(tokens: Any, cache: Any) -> tuple[float, Any]:
        started_s = time.perf_counter()
        out = net(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        if ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started_s, out

    with torch.inference_mode():
        prefill, decode = [], []
        for _ in range(PREFILL_ROUNDS + 1):
            elapsed_s, out = run(ids, None)
            prefill.append(elapsed_s)
        for _ in range(new_tokens):
            elapsed_s, out = run(out.logits[:, -1:].argmax(-1), out.past_key_values)
            decode.append(elapsed_s)
    return statistics.median(prefill[1:]), statistics.median(decode[1:] or decode)


def main(arguments: Sequence[str]) -> None:
    from mowa.errors import MowaError

    path = Path(arguments[0])
    try:
        found = _measure_in_process(TextMeasurementRequest(**json.loads(path.read_text())))
    except MowaError as error:
        sys.exit(f"mowa: {error}")
    (path.parent / MEASUREMENT_FILE).write_text(json.dumps(asdict(found)))


if __name__ == "__main__":
    main(sys.argv[1:])
