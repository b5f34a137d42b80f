"""Models, engines and precisions side by side, each measured in a process of its own. Verdicts are `card`'s affair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from mowa.data.manifests import examples as sources
from mowa.errors import DataError, ModelError
from mowa.evaluation.worker import Measurement, MeasurementRequest, Throughput, measure
from mowa.exporters import is_export, read_artifact
from mowa.io.hub import resolve_model
from mowa.models.diff import compare_emissions
from mowa.tasks.metrics import ErrorRates, bootstrap_error_rates
from mowa.types import Example

SAMPLE_CLIP = Path(__file__).parents[1] / "assets" / "sample.flac"


@dataclass(frozen=True, slots=True)
class BenchCase:
    model: str
    engine: str
    dtype: str


@dataclass(frozen=True, slots=True)
class BenchResult:
    """`agreeing`: the share of frames with the first row's likeliest output, where they have the same letters and
    frames, else 0. `wrong`: why there is nothing to say."""

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
    """Every model on every engine in every precision; an export has one of each."""
    found = []
    for model in models:
        if is_export(Path(model)):
            found.append(BenchCase(model, "auto", "auto"))
        else:
            found += [BenchCase(model, *one) for one in product(engines or ("pytorch",), dtypes or ("auto",))]
    return found


def run_bench(
    cases: Sequence[BenchCase],
    data: str | None,
    split: str,
    max_samples: int,
    throughput: tuple[tuple[int, int], ...],
    on_progress: Callable[[str, float], object],
) -> list[BenchResult]:
    """A row an arm, in their order. DataError where there is nothing to hear."""
    examples = (
        list(sources.read_examples(data, split, require_text=False))
        if data
        else [Example("sample", str(SAMPLE_CLIP), "", 0.0)]
    )
    if not examples:
        raise DataError(f"{data} has no recordings")
    order = np.random.default_rng(1).permutation(len(examples))[:max_samples]
    chosen = [examples[index] for index in order]
    rows, first = [], None
    for index, arm in enumerate(cases):
        on_progress(f"{arm.model}: hearing", index / len(cases))
        try:
            request = MeasurementRequest(
                arm.model, tuple(one.audio for one in chosen), arm.engine, arm.dtype, True, throughput
            )
            found = measure(request)
        except ModelError as wrong:
            rows.append(BenchResult(arm.model, arm.engine, arm.dtype, error=str(wrong)))
            continue
        first = first or found
        rows.append(_row(arm, found, first, chosen))
    return rows


def _row(arm: BenchCase, found: Measurement, first: Measurement, examples: Sequence[Example]) -> BenchResult:
    texts = [one.text for one in examples]
    alike = all(a.shape == b.shape for a, b in zip(first.emissions, found.emissions, strict=True))
    agreeing = compare_emissions(first.emissions, found.emissions, 0).agreement if alike else 0.0
    return BenchResult(
        arm.model, found.engine, found.dtype, _size(arm.model), found.peak_memory_bytes, found.load_s, found.latency_s,
        found.inference_s / found.audio_s, agreeing, found.throughput, bootstrap_error_rates(texts, found.texts) if all(texts) else None,
    )  # fmt: skip


def _size(model: str) -> int:
    """Bytes of its weights on disk."""
    if is_export(Path(model)):
        return read_artifact(Path(model)).size_bytes
    folder = resolve_model(model, offline=True).folder
    kept = [*folder.glob("model*.safetensors")] or [*folder.glob("pytorch_model*.bin")]
    return sum(file.stat().st_size for file in kept)
