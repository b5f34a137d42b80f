"""Benchmark language models and dtypes side by side, each in its own process, with PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from mowa.errors import ModelError
from mowa.evaluation.text_worker import TextMeasurementRequest, measure_text
from mowa.io.hub import resolve_model
from mowa.io.weights import weight_files
from mowa.loading import read_task

ENGINE = "pytorch"


@dataclass(frozen=True, slots=True)
class TextBenchResult:
    """Measurements of one language model in one dtype.

    prefill_tokens_per_s  speed of the pass over a prompt of `prompt_tokens`
    decode_tokens_per_s   speed of the tokens after it, one at a time (median)
    size_bytes            weights on disk
    error                 why the case could not be run; empty if it was
    """

    model: str
    engine: str
    dtype: str
    size_bytes: int = 0
    peak_memory_bytes: int = 0
    load_s: float = 0.0
    prompt_tokens: int = 0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    error: str = ""


def is_text_bench(models: Sequence[str]) -> bool:
    """Return whether the models are language models; a model that cannot be found is counted as one of speech.

    Raises ModelError if only some of them are: their measurements have no columns in common.
    """
    tasks = {name: _read_task(name) for name in models}
    text = [name for name, task in tasks.items() if task == "causal"]
    if text and len(text) < len(tasks):
        other = next(name for name in tasks if name not in text)
        raise ModelError(f"{text[0]} is a language model and {other} is not: benchmark them in two calls")
    return bool(text)


def _read_task(name: str) -> str:
    with suppress(ModelError):  # measuring it reports it
        return read_task(name, offline=True)
    return ""


def run_text_bench(
    models: Sequence[str],
    engines: Sequence[str],
    dtypes: Sequence[str],
    on_progress: Callable[[str, float], object] = lambda stage, fraction: None,
) -> list[TextBenchResult]:
    """Measure every model in every dtype (none: auto), in order. Raises ModelError for an engine other than pytorch."""
    if others := set(engines) - {ENGINE, "auto"}:
        raise ModelError(f"--engine {min(others)}: language models run with {ENGINE} only")
    cases = list(product(models, dtypes or ("auto",)))
    results = []
    for index, (model, dtype) in enumerate(cases):
        on_progress(f"{model}: measuring", index / len(cases))
        results.append(_measure(model, dtype))
    return results


def _measure(model: str, dtype: str) -> TextBenchResult:
    try:
        found = measure_text(TextMeasurementRequest(model, dtype))
        size_bytes = weights_size(resolve_model(model, offline=True).folder)
    except ModelError as error:
        return TextBenchResult(model, ENGINE, dtype, error=str(error))
    return TextBenchResult(
        model=model,
        engine=ENGINE,
        dtype=found.dtype,
        size_bytes=size_bytes,
        peak_memory_bytes=found.peak_memory_bytes,
        load_s=found.load_s,
        prompt_tokens=found.prompt_tokens,
        prefill_tokens_per_s=found.prefill_tokens_per_s,
        decode_tokens_per_s=found.decode_tokens_per_s,
    )


def weights_size(folder: Path) -> int:
    """Return the size of a checkpoint's weights on disk, in bytes."""
    return sum(file.stat().st_size for file in weight_files(folder))
