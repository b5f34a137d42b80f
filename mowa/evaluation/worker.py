"""Measure one model in its own process: texts, log-probabilities, time and memory.

    python -m mowa.evaluation.worker REQUEST.json

The process loads nothing but the model, so its peak memory is that of the model and its engine.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np

from mowa.errors import DataError, ModelError

FORMAT_VERSION = 2
MEASUREMENT_FILE, EMISSIONS_FILE = "measurements.json", "emissions.npz"
TIMED_AUDIO_S = 5.0  # length of the clips on which throughput is measured
ROUNDS = 5
MAX_CLIP_S = 20.0  # of a longer recording, only the beginning is measured

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class MeasurementRequest:
    """What to measure: `model` as `mowa transcribe` takes it, recordings, and (threads, batch size) pairs to time."""

    model: str
    files: tuple[str, ...]
    engine: str = "auto"
    dtype: str = "auto"
    offline: bool = True
    throughput: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Throughput:
    """Real-time factor (seconds of computing per second of audio, median) with some threads and batch size."""

    threads: int
    batch_size: int
    rtf: float


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was measured of one model.

    texts, emissions   transcript and log-probabilities float32 [T, V] of each file
    audio_s            total length of the files
    inference_s        total time of the engine for them, one by one
    latency_s          median time for one of them
    load_s             time to load the model
    peak_memory_bytes  peak resident memory after loading and running the first file
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
        """Write measurements.json and emissions.npz into `folder`."""
        facts = {key: value for key, value in asdict(self).items() if key != "emissions"}
        numbered: Any = {str(index): scores for index, scores in enumerate(self.emissions)}
        np.savez(folder / EMISSIONS_FILE, **numbered)
        (folder / MEASUREMENT_FILE).write_text(json.dumps({"version": FORMAT_VERSION} | facts))

    @staticmethod
    def read(folder: Path) -> Measurement:
        """Read what `write` wrote. Raises DataError for another format version."""
        facts = json.loads((folder / MEASUREMENT_FILE).read_text())
        if (version := facts.pop("version", 1)) != FORMAT_VERSION:
            raise DataError(
                f"{folder / MEASUREMENT_FILE}: was written by another mowa (format {version}, this version reads"
                f" {FORMAT_VERSION}): delete {folder}, then run `mowa quantize` again"
            )
        with np.load(folder / EMISSIONS_FILE) as arrays:
            emissions = tuple(arrays[f"{index}"] for index in range(len(facts["texts"])))
        throughput = tuple(Throughput(**one) for one in facts["throughput"])
        return Measurement(**facts | {"texts": tuple(facts["texts"]), "emissions": emissions, "throughput": throughput})


def measure(request: MeasurementRequest) -> Measurement:
    """Measure in a child process. Raises ModelError with its last line of output if it fails."""
    return run_worker(__name__, request.model, asdict(request), Measurement.read)


def run_worker(module: str, model: str, request: dict[str, Any], read: Callable[[Path], ResultT]) -> ResultT:
    """Run `python -m module REQUEST.json` and return what `read` finds in the request's folder.

    Raises ModelError with the last line of its standard error if it fails; `model` is named where there is none.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(request))
        command = [sys.executable, "-m", module, str(folder / "request.json")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise ModelError(
                lines[-1].removeprefix("mowa: ") if lines else f"measuring {model} failed without a message"
            )
        return read(folder)


def _measure_in_process(request: MeasurementRequest, folder: Path) -> None:
    from mowa import hardware

    hardware.enable_huge_pages()
    from mowa.data import audio
    from mowa.decode import ctc
    from mowa.engines.settings import EngineSpec
    from mowa.engines.transcription import load_engine

    def load(threads: int | None = None) -> Any:
        spec = EngineSpec(
            request.model, offline=request.offline, engine=request.engine, dtype=request.dtype, threads=threads
        )
        return load_engine(spec).engine

    started_s = time.perf_counter()
    engine = load()
    load_s = time.perf_counter() - started_s
    rate_hz, vocabulary = engine.preprocessing.rate_hz, engine.vocabulary
    clips = []
    for file in request.files:
        samples = audio.load_audio(file, rate_hz)[: int(MAX_CLIP_S * rate_hz)]
        clips.append(audio.preprocess(samples, engine.preprocessing))
    engine.emissions([clips[0]])
    peak_memory_bytes = hardware.peak_rss_bytes()
    emissions, elapsed_s = [], []
    for clip in clips:
        started_s = time.perf_counter()
        emissions += engine.emissions([clip])
        elapsed_s.append(time.perf_counter() - started_s)
    texts = [ctc.join_words(ctc.path_to_words(ctc.best_path(one, vocabulary), vocabulary)) for one in emissions]
    timed_clip = np.concatenate(clips)[: int(TIMED_AUDIO_S * rate_hz)]
    Measurement(
        engine=engine.name,
        dtype=engine.dtype,
        texts=tuple(texts),
        emissions=tuple(emissions),
        audio_s=sum(map(len, clips)) / rate_hz,
        inference_s=sum(elapsed_s),
        latency_s=statistics.median(elapsed_s),
        load_s=load_s,
        peak_memory_bytes=peak_memory_bytes,
        throughput=tuple(
            _measure_throughput(load(threads), timed_clip, rate_hz, threads, batch_size)
            for threads, batch_size in request.throughput
        ),
    ).write(folder)


def _measure_throughput(engine: Any, clip: np.ndarray, rate_hz: int, threads: int, batch_size: int) -> Throughput:
    clips = [clip] * batch_size
    engine.emissions(clips)
    elapsed_s = []
    for _ in range(ROUNDS):
        started_s = time.perf_counter()
        engine.emissions(clips)
        elapsed_s.append(time.perf_counter() - started_s)
    return Throughput(threads, batch_size, statistics.median(elapsed_s) / (batch_size * len(clip) / rate_hz))


def main(arguments: Sequence[str]) -> None:
    from mowa.errors import MowaError

    path = Path(arguments[0])
    fields = json.loads(path.read_text())
    fields |= {"files": tuple(fields["files"]), "throughput": tuple(map(tuple, fields["throughput"]))}
    try:
        _measure_in_process(MeasurementRequest(**fields), path.parent)
    except MowaError as error:
        sys.exit(f"mowa: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
