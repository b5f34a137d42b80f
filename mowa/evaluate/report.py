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

from mowa import machine
from mowa.adapt import store
from mowa.data import sources
from mowa.errors import DataError, ModelError
from mowa.evaluate import card as cards
from mowa.evaluate.card import REFUSE, SHIP, Card, Row
from mowa.evaluate.measure import FACTS, Measured, Request, measure
from mowa.export import export, manifest, protocol
from mowa.nouns import FLOAT32, Artifact, Example, Model, Scheme
from mowa.shrink import calibrate, schemes, shrink

log = logging.getLogger("mowa")

RUN = ("safetensors", "onnx", "ctranslate2")  # formats that run here
VERSIONS = ("mowa", "torch", "transformers", "onnxruntime", "ctranslate2")
Told = Callable[[str, float], object]  # what is being done, and the share of it that is


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be reported. `clips` recordings of `data` at most are measured (0: all); with `tag`, error rates of
    each value of it too; `forced` keeps what is refused. Drift and words are compared with those of the model's own
    float32, or of the model called `against`. `calibration` is a source of its own; without, some of `data`
    are heard for it, and not measured."""

    schemes: tuple[Scheme, ...]
    formats: tuple[str, ...] = ("safetensors", "onnx")
    data: str = ""
    split: str = ""
    clips: int = 0
    calibration: str = ""
    most: float = cards.MOST
    tag: str = ""
    speeds: tuple[tuple[int, int], ...] = ()
    forced: bool = False
    against: str = ""


def speeds() -> tuple[tuple[int, int], ...]:
    """One thread and all of them, one recording and four."""
    cores = machine.cores()
    return tuple((threads, batch) for threads in sorted({1, cores}) for batch in (1, 4))


@dataclass(slots=True)
class _Work:
    """One report on its way."""

    model: Model
    wanted: Wanted
    out: Path
    examples: list[Example]
    sounds: list[np.ndarray] | None
    told: Told
    key: str = ""
    shrunk: Model | None = None
    reference: Measured | None = None
    baselines: dict[str, tuple[int, Measured]] = field(default_factory=dict)


def report(model: Model, wanted: Wanted, out: Path | None = None, *, told: Told = lambda what, share: None) -> Card:
    """The card of `model`. Under `out`, if it is named: a folder for each scheme and format, card.json among them.

    A scheme that a format or a tensor cannot hold is a row that says why. What is refused is deleted again, unless
    `forced`. Raises DataError: no recordings, or none left to measure; ModelError, MissingPart as `export` does.
    """
    for to in wanted.formats:
        if to in protocol.FORMATS and to not in RUN:
            raise ModelError(f"{to} does not run here, so there is nothing to measure: use `mowa export --to {to}`")
        protocol.exporter(to).parts()
    examples, sounds = _recordings(model, wanted)
    with ExitStack() as open_:
        folder = Path(open_.enter_context(TemporaryDirectory())) if out is None else out
        folder.mkdir(parents=True, exist_ok=True)
        work = _Work(model, wanted, folder, examples, sounds, told)
        work.key = hashlib.sha256(
            "\n".join([manifest.digest(model), *(f"{one.id} {one.text}" for one in examples)]).encode()
        ).hexdigest()
        if wanted.against:
            told(f"{wanted.against}: hearing", 1.0)
            files = tuple(example.audio for example in examples)
            work.reference = measure(Request(wanted.against, files, "native", "float32"))
        rows = list(_rows(work))
    made = Card(
        model.origin.name, wanted.data, len(examples), work.reference.audio_s if work.reference else 0.0, wanted.most,
        cards.machine_line(), {name: store.version_of(name) for name in VERSIONS}, tuple(rows),
    )  # fmt: skip
    if out is not None:
        cards.write(made, out / "card.json")
    return made


def _recordings(model: Model, wanted: Wanted) -> tuple[list[Example], list[np.ndarray] | None]:
    """What is measured on, and what is calibrated on, where a scheme needs it."""
    examples = list(sources.read(wanted.data, wanted.split, texts=False))
    needed = [scheme for scheme in wanted.schemes if schemes.calibrated(scheme)]
    if wanted.clips:
        order = np.random.default_rng(1).permutation(len(examples))
        spare = len(examples) if needed and not wanted.calibration else 0
        examples = [examples[i] for i in order[: wanted.clips + spare]]
    sounds = None
    if needed and wanted.calibration:
        sounds = calibrate.sounds(wanted.calibration, model)
    elif needed and len(examples) == 1:
        label = schemes.label(needed[0])
        raise DataError(f"{label} is calibrated on the one recording of {wanted.data}: name others with --calibrate")
    elif needed:
        few = examples[-max(1, min(20, len(examples) // 4)) :]
        sounds, examples = calibrate.heard(few, model), examples[: -len(few)]
        log.info("calibrated on %d of the recordings, which are not measured: --calibrate names others", len(few))
    examples = examples[: wanted.clips or None]
    if not examples:
        raise DataError(f"{wanted.data} has no recordings to measure on")
    return examples, sounds


def _rows(work: _Work) -> list[Row]:
    """Made scheme by scheme, as some take long to make; told format by format."""
    formats, rows = work.wanted.formats, {}
    for scheme in dict.fromkeys((FLOAT32, *work.wanted.schemes)):
        for to in dict.fromkeys(("safetensors", *formats)) if scheme == FLOAT32 else formats:
            rows[to, scheme] = _row(work, scheme, to)
        work.shrunk = None
    return [row for to in formats for (of, _), row in rows.items() if of == to]


def _row(work: _Work, scheme: Scheme, to: str) -> Row:
    label = schemes.label(scheme)
    folder = work.out / f"{to}-{label.replace('%', 'pc')}"
    try:
        artifact = _made(work, scheme, to, folder)
    except ModelError as refused:
        if scheme == FLOAT32:
            raise
        return Row(label, to, "", 0, 0.0, verdict=REFUSE, reason=str(refused))
    found = _measured(work, artifact, f"{label} as {to}")
    if work.reference is None:
        work.reference = found
    if scheme == FLOAT32:
        work.baselines[to] = (artifact.size, found)
    made = cards.row(
        label, to, folder, artifact.size, found, work.reference, work.baselines[to], work.examples,
        blank=work.model.vocabulary.blank, most=work.wanted.most, tag=work.wanted.tag,
    )  # fmt: skip
    if found is work.reference:
        made = replace(made, verdict=SHIP, reason="what the others are compared with")
    if made.verdict == REFUSE and not work.wanted.forced:
        shutil.rmtree(folder)
    return made


def _made(work: _Work, scheme: Scheme, to: str, folder: Path) -> Artifact:
    label = schemes.label(scheme)
    if (folder / "made_of").is_file() and (folder / "made_of").read_text() == work.key:
        return manifest.read(folder)
    if folder.exists():
        raise DataError(f"{folder} is of another model or report: choose another folder, or delete it")
    if work.shrunk is None:
        work.told(f"{label}: shrinking", 0.0)
        told = partial(work.told, f"{label}: shrinking")
        work.shrunk = shrink(work.model, scheme, work.sounds, told=told)
    work.told(f"{label}: writing {to}", 1.0)
    artifact = export(work.shrunk, to, folder)
    (folder / "made_of").write_text(work.key)
    return artifact


def _measured(work: _Work, artifact: Artifact, what: str) -> Measured:
    if (artifact.folder / FACTS).is_file():
        return Measured.read(artifact.folder)
    work.told(f"{what}: hearing", 1.0)
    dtype = "float32" if artifact.scheme == FLOAT32 else "auto"
    files = tuple(example.audio for example in work.examples)
    found = measure(Request(str(artifact.folder), files, dtype=dtype, speeds=work.wanted.speeds))
    found.write(artifact.folder)
    return found
