"""The report card of a model in some schemes and formats, and whether each may ship. How it looks is `page`'s affair.

| verdict  | when                                                                                                     |
|----------|----------------------------------------------------------------------------------------------------------|
| ship     | word errors increase by no more than `most` (relative)                                                   |
| doubtful | they increase by more, but that may be chance; or there were no texts, or too few words, to know by      |
| refuse   | they increase by more, and not by chance, in all or for one value of a tag; or fewer than 80 % of frames |
|          | agree: the net says something else                                                                       |
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mowa import hardware
from mowa.evaluation.worker import Measurement, Throughput
from mowa.io.atomic import atomic_write
from mowa.models.diff import ModelDiff, compare_emissions
from mowa.tasks.metrics import ErrorRateChange, ErrorRates, bootstrap_error_rates, paired_bootstrap
from mowa.types import Example

PASS, INCONCLUSIVE, FAIL = "ship", "doubtful", "refuse"
MAX_WER_INCREASE = 0.02  # of word errors, relative
MIN_AGREEMENT = 0.8
MIN_WORDS = 200  # fewer say too little


@dataclass(frozen=True, slots=True)
class ReportRow:
    """A model in one scheme and format. `share` is its size by that of float32 in the same format, `speedup` how many
    times as fast as that it heard all recordings. `tagged`: the same of the recordings with each value of a tag."""

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
    by_group: Mapping[str, tuple[ErrorRates, ErrorRateChange]] = field(default_factory=dict)
    verdict: str = PASS
    reason: str = ""


@dataclass(frozen=True, slots=True)
class QuantReport:
    """`rows` of `model` over `data`, so many recordings; float32 in the first format is what drift is measured from."""

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
    size: int,
    measurement: Measurement,
    reference: Measurement,
    baseline: tuple[int, Measurement],
    examples: Sequence[Example],
    *,
    blank_id: int,
    max_wer_increase: float = MAX_WER_INCREASE,
    group_by: str = "",
) -> ReportRow:
    """What was `found`, beside the float32 `reference` of drift and texts and the `baseline` (size, measured) of size
    and speed."""
    far = compare_emissions(reference.emissions, measurement.emissions, blank_id)
    texts = [example.text for example in examples]
    known = all(texts)
    heard = bootstrap_error_rates(texts, measurement.texts) if known else None
    pair = paired_bootstrap(texts, reference.texts, measurement.texts) if known else None
    tagged = {}
    for value in sorted({str(example.tags.get(group_by, "")) for example in examples} if known and group_by else ()):
        chosen = [index for index, one in enumerate(examples) if str(one.tags.get(group_by, "")) == value]
        said, first, heard_now = ([each[i] for i in chosen] for each in (texts, reference.texts, measurement.texts))
        tagged[value] = bootstrap_error_rates(said, heard_now), paired_bootstrap(said, first, heard_now)
    verdict, reason = decide_verdict(far, heard, pair, max_wer_increase, tagged)
    return ReportRow(
        scheme, export_format, str(folder), size, size / baseline[0], measurement.engine, measurement.dtype, measurement.peak_memory_bytes,
        measurement.inference_s / measurement.audio_s, baseline[1].inference_s / measurement.inference_s, measurement.latency_s, measurement.load_s,
        measurement.throughput, far, heard, pair, tagged, verdict, reason,
    )  # fmt: skip


def decide_verdict(
    diff: ModelDiff,
    error_rates: ErrorRates | None,
    difference: ErrorRateChange | None,
    max_wer_increase: float = MAX_WER_INCREASE,
    by_group: Mapping[str, tuple[ErrorRates, ErrorRateChange]] | None = None,
) -> tuple[str, str]:
    """Verdict and why, in a line."""
    if diff.agreement < MIN_AGREEMENT:
        return FAIL, f"only {diff.agreement:.0%} of frames say what float32 says"
    if error_rates is None or difference is None:
        return INCONCLUSIVE, f"without texts only drift is known: {diff.agreement:.1%} of frames agree"
    change = f"word errors {difference.wer:+.1%}, {max_wer_increase:.1%} allowed"
    if error_rates.num_words < MIN_WORDS:
        return INCONCLUSIVE, f"{error_rates.num_words} words are too few to tell ({change})"
    low, high = difference.wer_interval
    if low > max_wer_increase:
        return FAIL, f"{change}, and not by chance ({low:+.1%} to {high:+.1%})"
    for value, (those, more) in (by_group or {}).items():
        if those.num_words >= MIN_WORDS and more.wer_interval[0] > max_wer_increase:
            return (
                FAIL,
                f"word errors of {value or 'what has no tag'} {more.wer:+.1%}, {max_wer_increase:.1%} allowed ({change})",
            )
    if difference.wer <= max_wer_increase:
        return PASS, change
    return INCONCLUSIVE, f"{change}, though {low:+.1%} to {high:+.1%} may be chance"


def describe_machine() -> str:
    return f"{hardware.cpu_name()}, {hardware.cpu_count()} cores"


def write_json(report: QuantReport, path: Path) -> None:
    """As JSON."""
    atomic_write(path, json.dumps(_plain(asdict(report)), ensure_ascii=False, indent=1) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return round(value, 6) if isinstance(value, float) else value
