"""Build a quantization report: quantize, export and measure a model in several schemes and formats.

Each export is measured by its path in its own process, as a user would run it. An interrupted report resumes: exports
and measurements of the same model and recordings are reused.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from mowa import hardware
from mowa.data.quality.unreadable import drop_unreadable, read_measurable
from mowa.engines.registry import find_engine_of_format
from mowa.errors import DataError, ModelError
from mowa.evaluation import quant_report
from mowa.evaluation.quant_report import FAIL, PASS, QuantReport, ReportRow
from mowa.evaluation.worker import MEASUREMENT_FILE, Measurement, MeasurementRequest, measure
from mowa.exporters import export, manifest, protocol
from mowa.exporters.registry import FORMATS
from mowa.models.tolerances import MAX_WER_INCREASE
from mowa.quantization import calibration, quantize, schemes
from mowa.types import FLOAT32, Artifact, CTCModel, Example, Scheme

log = logging.getLogger("mowa")

VERSIONED_PACKAGES = ("mowa", "torch", "transformers", "onnxruntime", "ctranslate2")
SOURCE_FILE = "source.sha256"  # in each export: hash of the model and the recordings of the report
_OLD_SOURCE_FILE = "made_of"  # format 1
ProgressCallback = Callable[[str, float], object]  # stage, fraction of it that is done


DEFAULT_FORMATS = ("safetensors", "onnx")


@dataclass(frozen=True, slots=True)
class ReportConfig:
    """What to report.

    schemes, formats  every scheme is exported to every format
    data, split       evaluation recordings, of which at most `max_samples` are measured (0: all)
    calibration       source of calibration recordings; empty: a few held out from `data`
    group_by          also report error rates per value of this tag
    throughput        (threads, batch size) pairs to time
    keep_failed       keep exports that fail
    baseline          model whose float32 outputs are the reference; empty: the model itself
    """

    schemes: tuple[Scheme, ...]
    formats: tuple[str, ...] = DEFAULT_FORMATS
    data: str = ""
    split: str = ""
    max_samples: int = 0
    calibration: str = ""
    max_wer_increase: float = MAX_WER_INCREASE
    group_by: str = ""
    throughput: tuple[tuple[int, int], ...] = ()
    keep_failed: bool = False
    baseline: str = ""


def throughput_grid() -> tuple[tuple[int, int], ...]:
    """Return (threads, batch size) pairs: 1 and all threads, batch sizes 1 and 4."""
    cores = hardware.cpu_count()
    return tuple((threads, batch) for threads in sorted({1, cores}) for batch in (1, 4))


@dataclass(slots=True)
class _Work:
    """State of a report that is being built."""

    model: CTCModel
    config: ReportConfig
    out: Path
    examples: list[Example]
    calibration_clips: list[np.ndarray] | None
    on_progress: ProgressCallback
    key: str = ""
    quantized: CTCModel | None = None
    reference: Measurement | None = None
    float32: dict[str, tuple[int, Measurement]] = field(default_factory=dict)


def build_report(
    model: CTCModel,
    config: ReportConfig,
    out: Path | None = None,
    *,
    on_progress: ProgressCallback = lambda stage, fraction: None,
) -> QuantReport:
    """Build the report of `model`; with `out`, keep the exports and quant_report.json in that folder.

    A scheme that a format does not support is a failed row with the reason. Failed exports are deleted unless
    `keep_failed`. Raises DataError without recordings to measure, and as `export` does.
    """
    for to in config.formats:
        if find_engine_of_format(FORMATS.get(to).name) is None:
            raise ModelError(f"{to} cannot be run by mowa, so it cannot be measured: use `mowa export --to {to}`")
        protocol.require_packages(to)
    examples, clips = _recordings(model, config)
    with ExitStack() as open_:
        folder = Path(open_.enter_context(TemporaryDirectory())) if out is None else out
        folder.mkdir(parents=True, exist_ok=True)
        work = _Work(model, config, folder, examples, clips, on_progress)
        listed = "\n".join([manifest.model_sha256(model), *(f"{one.id} {one.text}" for one in examples)])
        work.key = hashlib.sha256(listed.encode(errors="backslashreplace")).hexdigest()
        if config.baseline:
            on_progress(f"{config.baseline}: measuring", 1.0)
            files = tuple(example.audio for example in examples)
            work.reference = measure(MeasurementRequest(config.baseline, files, "pytorch", "float32"))
        rows = list(_rows(work))
    report = QuantReport(
        model=model.origin.name,
        data=config.data,
        num_recordings=len(examples),
        audio_s=work.reference.audio_s if work.reference else 0.0,
        max_wer_increase=config.max_wer_increase,
        machine=hardware.describe_machine(),
        versions={name: hardware.installed_version(name) for name in VERSIONED_PACKAGES},
        rows=tuple(rows),
    )
    if out is not None:
        quant_report.write_json(report, out / quant_report.JSON_FILE)
    return report


def _recordings(model: CTCModel, config: ReportConfig) -> tuple[list[Example], list[np.ndarray] | None]:
    """Return the examples to measure, and calibration clips if a scheme needs them."""
    examples = read_measurable(config.data, config.split)
    calibrated = [scheme for scheme in config.schemes if schemes.calibration_reason(scheme)]
    if config.max_samples:
        order = np.random.default_rng(1).permutation(len(examples))
        spare = len(examples) if calibrated and not config.calibration else 0
        examples = [examples[i] for i in order[: config.max_samples + spare]]
    examples = drop_unreadable(examples, model.preprocessing.rate_hz)
    clips = None
    if calibrated and config.calibration:
        clips = calibration.load_clips(config.calibration, model)
    elif calibrated and len(examples) == 1:
        label = schemes.format_scheme(calibrated[0])
        raise DataError(
            f"{label} needs calibration recordings, and {config.data} has only one recording: add --calibration-data"
        )
    elif calibrated:
        held_out = examples[-max(1, min(20, len(examples) // 4)) :]
        clips, examples = calibration.sample_clips(held_out, model), examples[: -len(held_out)]
        log.info("%d recordings are held out for calibration (or name others: --calibration-data)", len(held_out))
    examples = examples[: config.max_samples or None]
    if not examples:
        raise DataError(f"{config.data} has no recordings to measure")
    return examples, clips


def _rows(work: _Work) -> list[ReportRow]:
    """Build the rows scheme by scheme, so that each model is quantized once; return them format by format."""
    formats, rows = work.config.formats, {}
    for scheme in dict.fromkeys((FLOAT32, *work.config.schemes)):
        for to in dict.fromkeys(("safetensors", *formats)) if scheme == FLOAT32 else formats:
            rows[to, scheme] = _row(work, scheme, to)
        work.quantized = None
    return [row for to in formats for (of, _), row in rows.items() if of == to]


def _row(work: _Work, scheme: Scheme, to: str) -> ReportRow:
    label = schemes.format_scheme(scheme)
    folder = work.out / f"{to}-{label.replace('%', 'pc')}"
    try:
        artifact = _export(work, scheme, to, folder)
    except ModelError as error:
        if scheme == FLOAT32:
            raise
        return ReportRow(label, to, "", 0, 0.0, verdict=FAIL, reason=str(error))
    found = _measure(work, artifact, f"{label} as {to}")
    if work.reference is None:
        work.reference = found
    if scheme == FLOAT32:
        work.float32[to] = (artifact.size_bytes, found)
    row = quant_report.build_row(
        label,
        to,
        folder,
        artifact.size_bytes,
        found,
        work.reference,
        work.float32[to],
        work.examples,
        blank_id=work.model.vocabulary.blank,
        max_wer_increase=work.config.max_wer_increase,
        group_by=work.config.group_by,
    )
    if found is work.reference:
        row = replace(row, verdict=PASS, reason="reference")
    if row.verdict == FAIL and not work.config.keep_failed:
        shutil.rmtree(folder)
    return row


def _export(work: _Work, scheme: Scheme, to: str, folder: Path) -> Artifact:
    """Quantize and export the model, or return the export in `folder` if it is of the same model and recordings."""
    label = schemes.format_scheme(scheme)
    source = folder / SOURCE_FILE
    if source.is_file() and source.read_text() == work.key:
        return manifest.read_artifact(folder)
    if (folder / _OLD_SOURCE_FILE).is_file():
        raise DataError(
            f"{folder} was written by an older mowa (format 1, this version reads {quant_report.FORMAT_VERSION}):"
            " delete it, then run `mowa quantize` again"
        )
    if folder.exists():
        raise DataError(f"{folder} is from another model or other recordings: choose another --out, or delete it")
    if work.quantized is None:
        stage = f"{label}: quantizing"
        work.on_progress(stage, 0.0)
        work.quantized = quantize(
            work.model, scheme, work.calibration_clips, on_progress=partial(work.on_progress, stage)
        )
    work.on_progress(f"{label}: writing {to}", 1.0)
    artifact = export(work.quantized, to, folder)
    source.write_text(work.key)
    return artifact


def _measure(work: _Work, artifact: Artifact, label: str) -> Measurement:
    """Measure an export, or read its measurement if there is one."""
    if (artifact.folder / MEASUREMENT_FILE).is_file():
        return Measurement.read(artifact.folder)
    work.on_progress(f"{label}: measuring", 1.0)
    dtype = "float32" if artifact.scheme == FLOAT32 else "auto"
    files = tuple(example.audio for example in work.examples)
    found = measure(MeasurementRequest(str(artifact.folder), files, dtype=dtype, throughput=work.config.throughput))
    found.write(artifact.folder)
    return found
