"""A model in some schemes and formats → the card: made, exported, measured in processes of their own, one by one.

Everything that is measured is what a user will run, by its path. A report that was broken off goes on: what was made
and measured of the same model over the same recordings is not done again.
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
from mowa.adapters import checkpoint
from mowa.data.manifests import examples as sources
from mowa.errors import DataError, ModelError
from mowa.evaluation import quant_report as cards
from mowa.evaluation.quant_report import FAIL, PASS, QuantReport, ReportRow
from mowa.evaluation.worker import MEASUREMENT_FILE, Measurement, MeasurementRequest, measure
from mowa.exporters import export, manifest, protocol
from mowa.quantization import calibration as calibrate
from mowa.quantization import quantize, schemes
from mowa.types import FLOAT32, Artifact, Example, Model, Scheme

log = logging.getLogger("mowa")

RUNNABLE_FORMATS = ("safetensors", "onnx", "ctranslate2")  # formats that run here
VERSIONED_PACKAGES = ("mowa", "torch", "transformers", "onnxruntime", "ctranslate2")
ProgressCallback = Callable[[str, float], object]  # what is being done, and the share of it that is


@dataclass(frozen=True, slots=True)
class ReportConfig:
    """What is to be reported. `clips` recordings of `data` at most are measured (0: all); with `tag`, error rates of
    each value of it too; `forced` keeps what is refused. Drift and words are compared with those of the model's own
    float32, or of the model called `against`. `calibration` is a source of its own; without, some of `data`
    are heard for it, and not measured."""

    schemes: tuple[Scheme, ...]
    formats: tuple[str, ...] = ("safetensors", "onnx")
    data: str = ""
    split: str = ""
    max_samples: int = 0
    calibration: str = ""
    max_wer_increase: float = cards.MAX_WER_INCREASE
    group_by: str = ""
    throughput: tuple[tuple[int, int], ...] = ()
    keep_failed: bool = False
    baseline: str = ""


def throughput_grid() -> tuple[tuple[int, int], ...]:
    """One thread and all of them, one recording and four."""
    cores = hardware.cpu_count()
    return tuple((threads, batch) for threads in sorted({1, cores}) for batch in (1, 4))


@dataclass(slots=True)
class _Work:
    """One report on its way."""

    model: Model
    config: ReportConfig
    out: Path
    examples: list[Example]
    calibration_clips: list[np.ndarray] | None
    on_progress: ProgressCallback
    key: str = ""
    quantized: Model | None = None
    reference: Measurement | None = None
    baselines: dict[str, tuple[int, Measurement]] = field(default_factory=dict)


def build_report(
    model: Model,
    config: ReportConfig,
    out: Path | None = None,
    *,
    on_progress: ProgressCallback = lambda what, share: None,
) -> QuantReport:
    """The card of `model`. Under `out`, if it is named: a folder for each scheme and format, card.json among them.

    A scheme that a format or a tensor cannot hold is a row that says why. What is refused is deleted again, unless
    `forced`. Raises DataError: no recordings, or none left to measure; ModelError, MissingPart as `export` does.
    """
    for to in config.formats:
        if to in protocol.FORMATS and to not in RUNNABLE_FORMATS:
            raise ModelError(f"{to} does not run here, so there is nothing to measure: use `mowa export --to {to}`")
        protocol.get_exporter(to).require_packages()
    examples, sounds = _recordings(model, config)
    with ExitStack() as open_:
        folder = Path(open_.enter_context(TemporaryDirectory())) if out is None else out
        folder.mkdir(parents=True, exist_ok=True)
        work = _Work(model, config, folder, examples, sounds, on_progress)
        work.key = hashlib.sha256(
            "\n".join([manifest.model_sha256(model), *(f"{one.id} {one.text}" for one in examples)]).encode()
        ).hexdigest()
        if config.baseline:
            on_progress(f"{config.baseline}: hearing", 1.0)
            files = tuple(example.audio for example in examples)
            work.reference = measure(MeasurementRequest(config.baseline, files, "pytorch", "float32"))
        rows = list(_rows(work))
    made = QuantReport(
        model.origin.name, config.data, len(examples), work.reference.audio_s if work.reference else 0.0, config.max_wer_increase,
        cards.describe_machine(), {name: checkpoint.installed_version(name) for name in VERSIONED_PACKAGES}, tuple(rows),
    )  # fmt: skip
    if out is not None:
        cards.write_json(made, out / "card.json")
    return made


def _recordings(model: Model, wanted: ReportConfig) -> tuple[list[Example], list[np.ndarray] | None]:
    """What is measured on, and what is calibrated on, where a scheme needs it."""
    examples = list(sources.read_examples(wanted.data, wanted.split, require_text=False))
    needed = [scheme for scheme in wanted.schemes if schemes.calibration_reason(scheme)]
    if wanted.max_samples:
        order = np.random.default_rng(1).permutation(len(examples))
        spare = len(examples) if needed and not wanted.calibration else 0
        examples = [examples[i] for i in order[: wanted.max_samples + spare]]
    sounds = None
    if needed and wanted.calibration:
        sounds = calibrate.load_clips(wanted.calibration, model)
    elif needed and len(examples) == 1:
        label = schemes.format_scheme(needed[0])
        raise DataError(f"{label} is calibrated on the one recording of {wanted.data}: name others with --calibrate")
    elif needed:
        few = examples[-max(1, min(20, len(examples) // 4)) :]
        sounds, examples = calibrate.sample_clips(few, model), examples[: -len(few)]
        log.info("calibrated on %d of the recordings, which are not measured: --calibrate names others", len(few))
    examples = examples[: wanted.max_samples or None]
    if not examples:
        raise DataError(f"{wanted.data} has no recordings to measure on")
    return examples, sounds


def _rows(work: _Work) -> list[ReportRow]:
    """Made scheme by scheme, as some take long to make; told format by format."""
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
        artifact = _made(work, scheme, to, folder)
    except ModelError as refused:
        if scheme == FLOAT32:
            raise
        return ReportRow(label, to, "", 0, 0.0, verdict=FAIL, reason=str(refused))
    found = _measured(work, artifact, f"{label} as {to}")
    if work.reference is None:
        work.reference = found
    if scheme == FLOAT32:
        work.baselines[to] = (artifact.size_bytes, found)
    made = cards.build_row(
        label, to, folder, artifact.size_bytes, found, work.reference, work.baselines[to], work.examples,
        blank_id=work.model.vocabulary.blank, max_wer_increase=work.config.max_wer_increase, group_by=work.config.group_by,
    )  # fmt: skip
    if found is work.reference:
        made = replace(made, verdict=PASS, reason="what the others are compared with")
    if made.verdict == FAIL and not work.config.keep_failed:
        shutil.rmtree(folder)
    return made


def _made(work: _Work, scheme: Scheme, to: str, folder: Path) -> Artifact:
    label = schemes.format_scheme(scheme)
    if (folder / "made_of").is_file() and (folder / "made_of").read_text() == work.key:
        return manifest.read_artifact(folder)
    if folder.exists():
        raise DataError(f"{folder} is of another model or report: choose another folder, or delete it")
    if work.quantized is None:
        work.on_progress(f"{label}: shrinking", 0.0)
        told = partial(work.on_progress, f"{label}: shrinking")
        work.quantized = quantize(work.model, scheme, work.calibration_clips, on_progress=told)
    work.on_progress(f"{label}: writing {to}", 1.0)
    artifact = export(work.quantized, to, folder)
    (folder / "made_of").write_text(work.key)
    return artifact


def _measured(work: _Work, artifact: Artifact, what: str) -> Measurement:
    if (artifact.folder / MEASUREMENT_FILE).is_file():
        return Measurement.read(artifact.folder)
    work.on_progress(f"{what}: hearing", 1.0)
    dtype = "float32" if artifact.scheme == FLOAT32 else "auto"
    files = tuple(example.audio for example in work.examples)
    found = measure(MeasurementRequest(str(artifact.folder), files, dtype=dtype, throughput=work.config.throughput))
    found.write(artifact.folder)
    return found
