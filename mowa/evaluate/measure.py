"""One model, measured in a process of its own: what it says of recordings, how fast, and in how much memory.

    python -m mowa.evaluate.measure REQUEST.json

The process loads the model and nothing else beforehand, so that its memory is the model's and that of what runs it.
What is said is kept as log-probabilities; whether it is right, `drift` and `card` say.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from mowa.errors import ModelError

TIMED_S = 5.0  # how long recordings are over which speed is measured
ROUNDS = 5
FACTS, ARRAYS = "measured.json", "measured.npz"
LONGEST_S = 20.0  # longer recordings are heard so far, as windows of `transcribe` are


@dataclass(frozen=True, slots=True)
class Request:
    """`model` as `mowa transcribe` takes it; `files` are recordings; `speeds` are (threads, batch) to time."""

    model: str
    files: tuple[str, ...]
    engine: str = "auto"
    dtype: str = "auto"
    offline: bool = True
    speeds: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Speed:
    """Median seconds of computing for a second of sound, with `batch` recordings at a time in `threads` threads."""

    threads: int
    batch: int
    rtf: float


@dataclass(frozen=True, slots=True)
class Measured:
    """`texts` and `emissions` (float32 [T, V]) of each file; `hearing_s` is what hearing them all took, of `audio_s`.

    `memory` is the most that the process had resident after loading and hearing one recording, in bytes; `latency_s`
    the median time for the recordings one by one.
    """

    engine: str
    dtype: str
    texts: tuple[str, ...]
    emissions: tuple[np.ndarray, ...]
    audio_s: float
    hearing_s: float
    latency_s: float
    loading_s: float
    memory: int
    speeds: tuple[Speed, ...] = field(default_factory=tuple)

    def write(self, folder: Path) -> None:
        """Into two files of `folder`, that `read` gives it back from."""
        facts = {key: value for key, value in asdict(self).items() if key != "emissions"}
        numbered: Any = {str(index): scores for index, scores in enumerate(self.emissions)}
        np.savez(folder / ARRAYS, **numbered)
        (folder / FACTS).write_text(json.dumps(facts, ensure_ascii=False))

    @staticmethod
    def read(folder: Path) -> Measured:
        facts = json.loads((folder / FACTS).read_text())
        with np.load(folder / ARRAYS) as kept:
            emissions = tuple(kept[f"{index}"] for index in range(len(facts["texts"])))
        speeds = tuple(Speed(**one) for one in facts.pop("speeds"))
        return Measured(**facts | {"texts": tuple(facts["texts"]), "emissions": emissions, "speeds": speeds})


def measure(request: Request) -> Measured:
    """In a process of its own. ModelError with what it said where it failed."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(asdict(request)))
        run = [sys.executable, "-m", "mowa.evaluate.measure", str(folder / "request.json")]
        done = subprocess.run(run, capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            raise ModelError(said[-1].removeprefix("mowa: ") if said else f"measuring {request.model} failed")
        return Measured.read(folder)


def _here(request: Request, folder: Path) -> None:
    from mowa import machine

    machine.huge_pages()
    from mowa.data import audio
    from mowa.decode import ctc
    from mowa.engines.settings import Wanted
    from mowa.engines.transcription import opened

    def loaded(threads: int | None = None) -> Any:
        how: Any = {"engine": request.engine, "dtype": request.dtype, "threads": threads}
        return opened(Wanted(request.model, offline=request.offline, **how)).engine

    began = time.perf_counter()
    engine = loaded()
    loading_s = time.perf_counter() - began
    sound, words = engine.preprocessing, engine.vocabulary
    clips = []
    for file in request.files:
        samples = audio.load(file, sound.rate_hz)[: int(LONGEST_S * sound.rate_hz)]
        clips.append(audio.normalize(samples) if sound.normalize else samples)
    engine.emissions([clips[0]])
    memory = machine.peak_memory()
    emissions, spent = [], []
    for clip in clips:
        began = time.perf_counter()
        emissions += engine.emissions([clip])
        spent.append(time.perf_counter() - began)
    texts = [ctc.text(ctc.read(ctc.best_path(scores, words), words)) for scores in emissions]
    piece = np.concatenate(clips)[: int(TIMED_S * sound.rate_hz)]
    speeds = [_timed(loaded(threads), piece, sound.rate_hz, threads, batch) for threads, batch in request.speeds]
    Measured(
        engine.name, engine.dtype, tuple(texts), tuple(emissions), sum(map(len, clips)) / sound.rate_hz, sum(spent),
        statistics.median(spent), loading_s, memory, tuple(speeds),
    ).write(folder)  # fmt: skip


def _timed(engine: Any, piece: np.ndarray, rate_hz: int, threads: int, batch: int) -> Speed:
    clips = [piece] * batch
    engine.emissions(clips)
    spent = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        engine.emissions(clips)
        spent.append(time.perf_counter() - began)
    return Speed(threads, batch, statistics.median(spent) / (batch * len(piece) / rate_hz))


def main(arguments: Sequence[str]) -> None:
    from mowa.errors import MowaError

    path = Path(arguments[0])
    given = json.loads(path.read_text())
    request = Request(**given | {"files": tuple(given["files"]), "speeds": tuple(map(tuple, given["speeds"]))})
    try:
        _here(request, path.parent)
    except MowaError as wrong:
        sys.exit(f"mowa: {wrong}")


if __name__ == "__main__":
    main(sys.argv[1:])
