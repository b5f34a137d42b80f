"""Benchmark models, engines and dtypes side by side, each in its own process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from mowa import __version__, hardware
from mowa.data.quality.unreadable import drop_unreadable, read_measurable
from mowa.errors import DataError, ModelError
from mowa.evaluation.text_bench import TextBenchResult, weights_size
from mowa.evaluation.worker import Measurement, MeasurementRequest, Throughput, measure
from mowa.exporters import is_export, read_artifact
from mowa.io.hub import SAMPLE_CLIP, resolve_model
from mowa.models.diff import compare, have_same_shapes
from mowa.tasks.metrics import ErrorRates, bootstrap_error_rates
from mowa.types import Example

FORMAT_VERSION = 2  # of the JSON that `results_to_dict` returns


@dataclass(frozen=True, slots=True)
class BenchCase:
    model: str
    engine: str
    dtype: str


@dataclass(frozen=True, slots=True)
class BenchResult:
    """Measurements of one case.

    latency_s   median time for one recording
    rtf         real-time factor: seconds of computing per second of audio
    agreement   share of frames whose top-1 token equals that of the first case; 0 where shapes differ
    error       why the case could not be run; empty if it was
    """

    model: str
    engine: str
    dtype: str
    size_bytes: int = 0
    peak_memory_bytes: int = 0
    load_s: float = 0.0
    latency_s: float = 0.0
    rtf: float = 0.0
    agreement: float = 0.0
    throughput: tuple[Throughput, ...] = ()
    error_rates: ErrorRates | None = None
    error: str = ""

    @property
    def name(self) -> str:
        return f"{self.model}, {self.engine} {self.dtype}"


def expand_cases(models: Sequence[str], engines: Sequence[str], dtypes: Sequence[str]) -> list[BenchCase]:
    """Return every model with every engine and dtype; an export has one of each."""
    cases = []
    for model in models:
        if is_export(Path(model)):
            cases.append(BenchCase(model, "auto", "auto"))
        else:
            cases += [BenchCase(model, *one) for one in product(engines or ("pytorch",), dtypes or ("auto",))]
    return cases


def run_bench(
    cases: Sequence[BenchCase],
    data: str | None,
    split: str,
    max_samples: int,
    throughput: tuple[tuple[int, int], ...],
    on_progress: Callable[[str, float], object],
) -> list[BenchResult]:
    """Measure every case on at most `max_samples` recordings of `data` (0: all), or on the bundled sample without it.

    `throughput` holds (threads, batch size) pairs to time; `on_progress` is called with a stage and a fraction. Return
    one result per case, in order. Raises DataError if `data` has no recordings.
    """
    examples = read_measurable(data, split) if data else [Example("sample", str(SAMPLE_CLIP), "", 0.0)]
    if not examples:
        raise DataError(f"{data} has no recordings")
    order = np.random.default_rng(1).permutation(len(examples))[: max_samples or None]
    chosen = drop_unreadable([examples[index] for index in order])
    if not chosen:
        raise DataError(f"{data}: none of {len(order)} recordings can be read")
    files = tuple(example.audio for example in chosen)
    results: list[BenchResult] = []
    first: Measurement | None = None
    for index, case in enumerate(cases):
        on_progress(f"{case.model}: measuring", index / len(cases))
        try:
            found = measure(MeasurementRequest(case.model, files, case.engine, case.dtype, True, throughput))
        except ModelError as error:
            results.append(BenchResult(case.model, case.engine, case.dtype, error=str(error)))
            continue
        first = first or found
        results.append(_result(case, found, first, [example.text for example in chosen]))
    return results


def results_to_dict(results: Sequence[BenchResult | TextBenchResult]) -> dict[str, Any]:
    """Return the results as JSON values, with the versions and the machine they are from."""
    return {
        "version": FORMAT_VERSION,
        "mowa": __version__,
        "machine": hardware.describe_machine(),
        "results": [asdict(result) for result in results],
    }


def _result(case: BenchCase, found: Measurement, first: Measurement, texts: Sequence[str]) -> BenchResult:
    comparable = have_same_shapes(first.emissions, found.emissions)
    return BenchResult(
        model=case.model,
        engine=found.engine,
        dtype=found.dtype,
        size_bytes=_size(case.model),
        peak_memory_bytes=found.peak_memory_bytes,
        load_s=found.load_s,
        latency_s=found.latency_s,
        rtf=found.inference_s / found.audio_s,
        agreement=compare(first.emissions, found.emissions).agreement if comparable else 0.0,
        throughput=found.throughput,
        error_rates=bootstrap_error_rates(texts, found.texts) if all(texts) else None,
    )


def _size(model: str) -> int:
    """Return the size of the weights on disk, in bytes."""
    if is_export(Path(model)):
        return read_artifact(Path(model)).size_bytes
    return weights_size(resolve_model(model, offline=True).folder)
