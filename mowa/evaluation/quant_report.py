"""The quantization report of a model: measurements in several schemes and formats, and a verdict for each.

| verdict      | when                                                                                                 |
|--------------|------------------------------------------------------------------------------------------------------|
| pass         | word errors increase by at most `max_wer_increase` (relative)                                        |
| inconclusive | they increase by more, but not significantly; or there are no transcripts, or fewer than `MIN_WORDS` |
| fail         | they increase by more and significantly, in total or for one value of a tag; or fewer than 94 % of   |
|              | frames have the same top-1 token as float32 (`MIN_AGREEMENT`)                                        |
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mowa.errors import ModelError
from mowa.evaluation.worker import Measurement, Throughput
from mowa.io.atomic import atomic_write
from mowa.models.diff import ModelDiff, compare, have_same_shapes
from mowa.models.tolerances import MAX_WER_INCREASE, MIN_AGREEMENT, MIN_WORDS
from mowa.tasks.metrics import ErrorRateChange, ErrorRates, bootstrap_error_rates, paired_bootstrap
from mowa.types import Example

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FORMAT_VERSION = 2
JSON_FILE, HTML_FILE = "quant_report.json", "quant_report.html"
PASS, INCONCLUSIVE, FAIL = "pass", "inconclusive", "fail"


@dataclass(frozen=True, slots=True)
class GroupChange:
    """Error rates of the recordings with one value of a tag, and their change from float32."""

    error_rates: ErrorRates
    error_rate_change: ErrorRateChange


@dataclass(frozen=True, slots=True)
class ReportRow:
    """A model in one scheme and format.

    size_ratio         size relative to float32 in the same format
    speedup            speed relative to float32 in the same format
    diff               difference of its log-probabilities from the reference
    error_rate_change  relative to the reference
    by_group           value of a tag → the same for the recordings that have it
    """

    scheme: str
    format: str
    folder: str
    size_bytes: int
    size_ratio: float
    engine: str = ""
    dtype: str = ""
    peak_memory_bytes: int = 0
    rtf: float = 0.0
    speedup: float = 0.0
    latency_s: float = 0.0
    load_s: float = 0.0
    throughput: tuple[Throughput, ...] = ()
    diff: ModelDiff | None = None
    error_rates: ErrorRates | None = None
    error_rate_change: ErrorRateChange | None = None
    by_group: Mapping[str, GroupChange] = field(default_factory=dict)
    verdict: str = PASS
    reason: str = ""


@dataclass(frozen=True, slots=True)
class QuantReport:
    """Rows of `model`, measured on `num_recordings` of `data`. The reference is float32, or another model's float32."""

    model: str
    data: str
    num_recordings: int
    audio_s: float
    max_wer_increase: float
    machine: str
    versions: Mapping[str, str | None]
    rows: tuple[ReportRow, ...]


def build_row(
    scheme: str,
    export_format: str,
    folder: Path,
    size_bytes: int,
    measurement: Measurement,
    reference: Measurement,
    float32: tuple[int, Measurement],
    examples: Sequence[Example],
    *,
    blank_id: int,
    max_wer_increase: float = MAX_WER_INCREASE,
    group_by: str = "",
) -> ReportRow:
    """Compare a measurement with the reference (outputs, errors) and with float32 in the same format (size, speed).

    `float32` is the size in bytes and the measurement of float32 in `export_format`. Error rates need a transcript for
    every example. Raises ModelError if the log-probabilities have other shapes.
    """
    if not have_same_shapes(reference.emissions, measurement.emissions):
        raise ModelError("the log-probabilities have other shapes than the reference's: the models do not match")
    diff = compare(reference.emissions, measurement.emissions, blank_id)
    error_rates = change = None
    by_group: dict[str, GroupChange] = {}
    if all(example.text for example in examples):
        error_rates, change = _error_rates(range(len(examples)), examples, reference, measurement)
        for value in sorted({str(example.tags.get(group_by, "")) for example in examples} if group_by else ()):
            members = [index for index, one in enumerate(examples) if str(one.tags.get(group_by, "")) == value]
            by_group[value] = GroupChange(*_error_rates(members, examples, reference, measurement))
    verdict, reason = decide_verdict(diff, error_rates, change, max_wer_increase, by_group)
    float32_size, float32_measurement = float32
    return ReportRow(
        scheme=scheme,
        format=export_format,
        folder=str(folder),
        size_bytes=size_bytes,
        size_ratio=size_bytes / float32_size,
        engine=measurement.engine,
        dtype=measurement.dtype,
        peak_memory_bytes=measurement.peak_memory_bytes,
        rtf=measurement.inference_s / measurement.audio_s,
        speedup=float32_measurement.inference_s / measurement.inference_s,
        latency_s=measurement.latency_s,
        load_s=measurement.load_s,
        throughput=measurement.throughput,
        diff=diff,
        error_rates=error_rates,
        error_rate_change=change,
        by_group=by_group,
        verdict=verdict,
        reason=reason,
    )


def _error_rates(
    members: Sequence[int], examples: Sequence[Example], reference: Measurement, measurement: Measurement
) -> tuple[ErrorRates, ErrorRateChange]:
    texts = [examples[index].text for index in members]
    before, after = ([one.texts[index] for index in members] for one in (reference, measurement))
    return bootstrap_error_rates(texts, after), paired_bootstrap(texts, before, after)


def decide_verdict(
    diff: ModelDiff,
    error_rates: ErrorRates | None,
    change: ErrorRateChange | None,
    max_wer_increase: float = MAX_WER_INCREASE,
    by_group: Mapping[str, GroupChange] | None = None,
) -> tuple[str, str]:
    """Return the verdict and its reason in one line."""
    if diff.agreement < MIN_AGREEMENT:
        return FAIL, f"the top-1 token equals that of float32 in only {diff.agreement:.0%} of frames"
    if error_rates is None or change is None:
        return INCONCLUSIVE, f"no transcripts; top-1 agreement {diff.agreement:.1%}"
    summary = f"word errors {change.wer:+.1%}, limit {max_wer_increase:+.1%}"
    if error_rates.num_words < MIN_WORDS:
        return INCONCLUSIVE, f"only {error_rates.num_words} words, at least {MIN_WORDS} are needed ({summary})"
    low, high = change.wer_interval
    if low > max_wer_increase:
        return FAIL, f"{summary}, significant ({low:+.1%} to {high:+.1%})"
    for value, group in (by_group or {}).items():
        if group.error_rates.num_words >= MIN_WORDS and group.error_rate_change.wer_interval[0] > max_wer_increase:
            increase = group.error_rate_change.wer
            return FAIL, f"word errors of {value or 'untagged recordings'} {increase:+.1%}, significant ({summary})"
    if change.wer <= max_wer_increase:
        return PASS, summary
    return INCONCLUSIVE, f"{summary}, not significant ({low:+.1%} to {high:+.1%})"


def write_json(report: DataclassInstance, path: Path) -> None:
    """Write the report as JSON, floats rounded to six decimals, infinite ones as null."""
    values = {"version": FORMAT_VERSION} | _rounded(asdict(report))
    path.parent.mkdir(parents=True, exist_ok=True)  # no scheme may have been exported
    atomic_write(path, json.dumps(values, ensure_ascii=False, indent=1) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
