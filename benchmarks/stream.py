"""Live transcription: latency, delay of words, error rates and cost for each mode and chunk; long and parallel streams.

    python -m benchmarks.stream [--clips 60] [--human FOLDER] [--skip sets hour parallel]
    python -m benchmarks.stream --clips 4 --minutes 2 --seconds 5 --record ''      # a check, two minutes

sets: clips of the synthetic test set (made where it is missing) and of people are fed in pieces of 20 ms, a pause of
1 s after each, one after another through one stream, as a microphone would. Recorded per mode:

- latency: how much later than its audio a frame can be final at most, without compute time;
- compute: time of those feeds in which the network ran, median and 95th percentile;
- delay: from the end of a word, as offline transcription has it, until the word is final, on a clock where audio takes
  its duration and computing its own time; median and 95th percentile;
- error rates, also of offline transcription of the same clips;
- real-time factor over speech and pauses.

hour: the bundled recording, repeated for --minutes through one stream: memory, speed, and drift of the word times.
parallel: --streams streams at once, each in a thread that feeds in real time.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import soundfile
import torch

import mowa
from benchmarks import record
from benchmarks.speech_sets import prepare, read_people, read_set
from benchmarks.tables import markdown
from benchmarks.transcribe import EXAMPLE
from benchmarks.views import VIEWS
from mowa import hardware
from mowa.data import audio
from mowa.engines import streaming
from mowa.engines.pytorch import PyTorchEngine
from mowa.engines.streaming import StreamingConfig
from mowa.tasks.metrics import error_rates

PIECE = 320
PAUSE_S = 1.0
MODES = (
    StreamingConfig("cached", 0.32, lookahead_s=0.0),
    StreamingConfig("cached", 0.32, lookahead_s=0.16),
    StreamingConfig("cached", 0.32, lookahead_s=0.32),
    StreamingConfig("cached", 0.64, lookahead_s=0.32),
    StreamingConfig("cached", 1.28, lookahead_s=0.32),
    StreamingConfig("window", 0.64, 4.0, 0.64),
    StreamingConfig("window", 1.28, 4.0, 1.28),
)
CACHED, WINDOW = MODES[1], MODES[-1]
Clip = tuple[np.ndarray, str]
WordEnds = list[tuple[str, float]]


@dataclass(slots=True)
class Streamed:
    """What one mode made of the clips of a set, and the time it took."""

    texts: list[str] = field(default_factory=list)
    compute_s: list[float] = field(default_factory=list)  # of feeds in which the network ran
    total_s: float = 0.0
    audio_s: float = 0.0
    delays_s: list[float] = field(default_factory=list)


def label(config: StreamingConfig) -> dict[str, Any]:
    return {"mode": config.mode, "chunk_s": config.chunk_s, "lookahead_s": config.lookahead_s}


def load_clips(examples: list[Any], count: int) -> list[Clip]:
    chosen = np.random.default_rng(0).permutation(len(examples))[:count]
    return [(audio.load_audio(examples[i].audio), examples[i].text) for i in chosen]


def stream_clips(engine: PyTorchEngine, config: StreamingConfig, clips: list[Clip], ends: list[WordEnds]) -> Streamed:
    """Feed all clips to one stream. `ends`: for each clip, its words and where they end offline."""
    stream, out = streaming.stream(engine, config), Streamed()
    pause, ready_s = np.zeros(int(PAUSE_S * 16_000), np.float32), 0.0
    for (sound, _), words in zip(clips, ends, strict=True):
        start_s, found = stream.received_s, []
        samples = np.concatenate([sound, pause])
        for start in range(0, len(samples), PIECE):
            frames, clock = frames_seen(stream), time.perf_counter()
            events = stream.feed(samples[start : start + PIECE])
            spent = time.perf_counter() - clock
            out.total_s += spent
            ready_s = max(ready_s, stream.received_s) + spent  # a feed waits for its audio and for the feed before
            if frames_seen(stream) != frames:
                out.compute_s.append(spent)
            found += [(w.text, w.end_s - start_s, ready_s - start_s) for e in events if e.is_final for w in e.words]
        found += [(w.text, w.end_s - start_s, ready_s - start_s) for e in stream.flush() if e.is_final for w in e.words]
        out.texts.append(" ".join(text for text, _, _ in found))
        out.delays_s += delays(found, words)
        out.audio_s += len(samples) / 16_000
    return out


def frames_seen(stream: Any) -> int:
    return int(stream.state.frames_decoded + len(stream.state.stable_ids))


def delays(found: list[tuple[str, float, float]], words: WordEnds) -> list[float]:
    """Seconds from the end of each word to when it was final, for words in both that end within half a second."""
    out = []
    for text, end_s, ready_s in found:
        near = [other for same, other in words if same == text and abs(other - end_s) < 0.5]
        if near:
            out.append(ready_s - min(near, key=lambda other: abs(other - end_s)))
    return out


def transcribe_offline(engine: PyTorchEngine, clips: list[Clip]) -> tuple[list[str], list[WordEnds]]:
    texts, ends = [], []
    with tempfile.TemporaryDirectory() as scratch:
        file = f"{scratch}/clip.wav"
        for sound, _ in clips:
            soundfile.write(file, sound, 16_000, "FLOAT")
            transcript = mowa.transcribe(file, engine)
            texts.append(transcript.text)
            ends.append([(word.text, word.end_s) for word in transcript.words])
    return texts, ends


def quantiles(key: str, values: list[float], scale: float = 1.0) -> dict[str, float]:
    found = {name: float(np.quantile(values, share)) * scale for name, share in (("p50", 0.5), ("p95", 0.95)) if values}
    return {f"{key}_{name}": round(value, 3) for name, value in found.items()}


def set_rows(engine: PyTorchEngine, name: str, clips: list[Clip]) -> list[record.Row]:
    """One row for offline transcription of a set, and one per mode."""
    references = [text for _, text in clips]
    texts, ends = transcribe_offline(engine, clips)
    rows: list[record.Row] = [{"set": name, "mode": "offline", "clips": len(clips)} | error_rates(references, texts)]
    for config in MODES:
        found = stream_clips(engine, config, clips, ends)
        latency_s = streaming.create_streaming_encoder(engine, config).latency_s
        times = quantiles("compute_ms", found.compute_s, 1e3) | quantiles("delay_s", found.delays_s)
        rates = error_rates(references, found.texts)
        row = {"set": name, **label(config), "latency_s": round(latency_s, 3), **times, **rates}
        rows.append(row | {"rtf": round(found.total_s / found.audio_s, 4)})
    return rows


def hour_row(engine: PyTorchEngine, config: StreamingConfig, minutes: float) -> record.Row:
    """Memory and speed by the minute, and how far the start of a recurring word moves."""
    sound = np.concatenate([audio.load_audio(EXAMPLE), np.zeros(16_000, np.float32)])
    turn_s = len(sound) / 16_000
    stream, spent, memory, at = streaming.stream(engine, config), [0.0], list[int](), 0
    starts: dict[str, list[float]] = {}
    while stream.received_s < minutes * 60:
        piece = np.take(sound, range(at, at + PIECE), mode="wrap")
        clock = time.perf_counter()
        events = stream.feed(piece)
        spent[-1] += time.perf_counter() - clock
        for word in (word for event in events if event.is_final for word in event.words):
            starts.setdefault(word.text, []).append(word.start_s % turn_s)
        at += PIECE
        if stream.received_s >= (len(memory) + 1) * 60:
            memory.append(resident_mb())
            spent.append(0.0)
    frequent = max(starts, key=lambda text: len(starts[text]))
    drift_s = median(starts[frequent][-9:]) - median(starts[frequent][:9])
    return label(config) | {
        "minutes": len(memory),
        "first_memory_mb": memory[0],
        "max_memory_mb": max(memory),
        "last_memory_mb": memory[-1],
        "second_minute_rtf": round(spent[min(1, len(memory) - 1)] / 60, 4),
        "last_minute_rtf": round(spent[len(memory) - 1] / 60, 4),
        "drift_ms": round(drift_s * 1e3, 1),
    }


def resident_mb() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) // 1024
    return 0


def parallel_row(engine: PyTorchEngine, streams: int, seconds: float) -> record.Row:
    """Run streams at once, each in a thread that feeds in real time; the largest lag behind the input."""
    sound, lag_s = audio.load_audio(EXAMPLE), [0.0] * streams
    torch.set_num_threads(1)  # the streams are what runs in parallel
    begin = time.monotonic() + 1

    def run(index: int) -> None:
        stream, at = streaming.stream(engine, CACHED), 0
        while at < seconds * 16_000:
            at += 1600
            due = begin + index * 0.032 + at / 16_000
            time.sleep(max(0.0, due - time.monotonic()))
            stream.feed(np.take(sound, range(at - 1600, at), mode="wrap"))
            lag_s[index] = max(lag_s[index], time.monotonic() - due) if at > 16_000 else 0.0

    cpu_s = time.process_time()
    threads = [threading.Thread(target=run, args=(index,)) for index in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    busy = (time.process_time() - cpu_s) / seconds
    torch.set_num_threads(hardware.cpu_count())
    found = {"cores_busy": round(busy, 3), "cores": hardware.cpu_count(), "max_lag_s": round(max(lag_s), 3)}
    return {"streams": streams, "seconds": seconds} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pl-tiny")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--clips", type=int, default=60, help="clips per set [60]")
    parser.add_argument("--data", type=Path, help="a manifest instead of the synthetic test set")
    parser.add_argument("--human", type=Path, help="a folder with transcripts.tsv")
    parser.add_argument("--minutes", type=float, default=60, help="length of the long stream [60]")
    parser.add_argument("--streams", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=30, help="length of the parallel streams [30]")
    parser.add_argument("--skip", nargs="+", choices=["sets", "hour", "parallel"], default=[])
    record.add_argument(parser, "stream")
    options = parser.parse_args()
    engine = mowa.open_engine(mowa.load(options.model), device="cpu", dtype=options.dtype)
    if "sets" not in options.skip:
        sets = {"synthetic": read_set(options.data or prepare() / "unseen.jsonl")}
        if options.human:
            sets["people"] = read_people(options.human)
        rows = [row for name, found in sets.items() for row in set_rows(engine, name, load_clips(found, options.clips))]
        for name in sets:
            print(markdown(VIEWS["stream"][name], rows))
        record.write(options.record, rows, dtype=engine.dtype)
    if "parallel" not in options.skip:
        rows = [parallel_row(engine, options.streams, options.seconds)]
        print(markdown(VIEWS["stream-parallel"]["table"], rows))
        record.write(options.record and f"{options.record}-parallel", rows, dtype=engine.dtype)
    if "hour" not in options.skip:
        rows = [hour_row(engine, config, options.minutes) for config in (CACHED, WINDOW)]
        print(markdown(VIEWS["stream-hour"]["table"], rows))
        record.write(options.record and f"{options.record}-hour", rows, dtype=engine.dtype)


if __name__ == "__main__":
    main()
