"""One model, measured in a process of its own: what it says of recordings, how fast, and in how much memory.

    python -m mowa.evaluation.worker REQUEST.json

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

TIMED_AUDIO_S = 5.0  # how long recordings are over which speed is measured
ROUNDS = 5
MEASUREMENT_FILE, EMISSIONS_FILE = "measured.json", "measured.npz"
MAX_CLIP_S = 20.0  # longer recordings are heard so far, as windows of `transcribe` are


@dataclass(frozen=True, slots=True)
class MeasurementRequest:
    """`model` as `mowa transcribe` takes it; `files` are recordings; `speeds` are (threads, batch) to time."""

    model: str
    files: tuple[str, ...]
    engine: str = "auto"
    dtype: str = "auto"
    offline: bool = True
    throughput: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Throughput:
    """Median seconds of computing for a second of sound, with `batch` recordings at a time in `threads` threads."""

    threads: int
    batch_size: int
    rtf: float


@dataclass(frozen=True, slots=True)
class Measurement:
    """`texts` and `emissions` (float32 [T, V]) of each file; `hearing_s` is what hearing them all took, of `audio_s`.

    `memory` is the most that the process had resident after loading and hearing one recording, in bytes; `latency_s`
    the median time for the recordings one by one.
    """

    engine: str
    dtype: str
    texts: tuple[str, ...]
    emissions: tuple[np.ndarray, ...]
    audio_s: float
    inference_s: float
    latency_s: float
    load_s: float
    peak_memory_bytes: int
    throughput: tuple[Throughput, ...] = field(default_factory=tuple)

    def write(self, folder: Path) -> None:
        """Into two files of `folder`, that `read` gives it back from."""
        facts = {key: value for key, value in asdict(self).items() if key != "emissions"}
        numbered: Any = {str(index): scores for index, scores in enumerate(self.emissions)}
        np.savez(folder / EMISSIONS_FILE, **numbered)
        (folder / MEASUREMENT_FILE).write_text(json.dumps(facts, ensure_ascii=False))

    @staticmethod
    def read(folder: Path) -> Measurement:
        facts = json.loads((folder / MEASUREMENT_FILE).read_text())
        with np.load(folder / EMISSIONS_FILE) as kept:
            emissions = tuple(kept[f"{index}"] for index in range(len(facts["texts"])))
        speeds = tuple(Throughput(**one) for one in facts.pop("speeds"))
        return Measurement(**facts | {"texts": tuple(facts["texts"]), "emissions": emissions, "speeds": speeds})


def measure(request: MeasurementRequest) -> Measurement:
    """In a process of its own. ModelError with what it said where it failed."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(asdict(request)))
        run = [sys.executable, "-m", "mowa.evaluation.worker", str(folder / "request.json")]
        done = subprocess.run(run, capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            raise ModelError(said[-1].removeprefix("mowa: ") if said else f"measuring {request.model} failed")
        return Measurement.read(folder)


def _measure_in_process(request: MeasurementRequest, folder: Path) -> None:
    from mowa import hardware

    hardware.enable_huge_pages()
    from mowa.data import audio
    from mowa.decode import ctc
    from mowa.engines.settings import EngineSpec
    from mowa.engines.transcription import load_engine

    def loaded(threads: int | None = None) -> Any:
        how: Any = {"engine": request.engine, "dtype": request.dtype, "threads": threads}
        return load_engine(EngineSpec(request.model, offline=request.offline, **how)).engine

    began = time.perf_counter()
    engine = loaded()
    loading_s = time.perf_counter() - began
    sound, words = engine.preprocessing, engine.vocabulary
    clips = []
    for file in request.files:
        samples = audio.load_audio(file, sound.rate_hz)[: int(MAX_CLIP_S * sound.rate_hz)]
        clips.append(audio.normalize(samples) if sound.normalize else samples)
    engine.emissions([clips[0]])
    memory = hardware.peak_rss_bytes()
    emissions, spent = [], []
    for clip in clips:
        began = time.perf_counter()
        emissions += engine.emissions([clip])
        spent.append(time.perf_counter() - began)
    texts = [ctc.join_words(ctc.path_to_words(ctc.best_path(scores, words), words)) for scores in emissions]
    piece = np.concatenate(clips)[: int(TIMED_AUDIO_S * sound.rate_hz)]
    speeds = [_timed(loaded(threads), piece, sound.rate_hz, threads, batch) for threads, batch in request.throughput]
    Measurement(
        engine.name, engine.dtype, tuple(texts), tuple(emissions), sum(map(len, clips)) / sound.rate_hz, sum(spent),
        statistics.median(spent), loading_s, memory, tuple(speeds),
    ).write(folder)  # fmt: skip


def _timed(engine: Any, piece: np.ndarray, rate_hz: int, threads: int, batch: int) -> Throughput:
    clips = [piece] * batch
    engine.emissions(clips)
    spent = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        engine.emissions(clips)
        spent.append(time.perf_counter() - began)
    return Throughput(threads, batch, statistics.median(spent) / (batch * len(piece) / rate_hz))


def main(arguments: Sequence[str]) -> None:
    from mowa.errors import MowaError

    path = Path(arguments[0])
    given = json.loads(path.read_text())
    request = MeasurementRequest(
        **given | {"files": tuple(given["files"]), "speeds": tuple(map(tuple, given["speeds"]))}
    )
    try:
        _measure_in_process(request, path.parent)
    except MowaError as wrong:
        sys.exit(f"mowa: {wrong}")


if __name__ == "__main__":
    main(sys.argv[1:])
