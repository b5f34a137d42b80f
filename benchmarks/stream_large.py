"""Live transcription with a network of XLSR-53's size in windows, beside transformers' pipeline over the same audio.

    python -m benchmarks.stream_large [--seconds 30] [--rounds 3]
    python -m benchmarks.stream_large --seconds 6 --rounds 1 --record ''      # a check, two minutes

The weights are random. Windows have 4 s of context, a chunk of 1.28 s and 1.28 s of look-ahead. The pipeline (batch
1) is run once per chunk, over the same window, and over everything received so far. Every arm is a process of its own
and the arms take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import soundfile

from benchmarks import record
from benchmarks.tables import markdown
from benchmarks.transcribe import EXAMPLE, checkpoint
from benchmarks.views import VIEWS

LEFT_S, CHUNK_S, LOOKAHEAD_S = 4.0, 1.28, 1.28
PIECE = 320
ARMS = ("transformers-windows", "transformers-growing", "pytorch-float32", "pytorch-bfloat16", "pytorch-int8")


def transformers_rtf(model: str, samples: np.ndarray, *, growing: bool) -> float:
    from transformers import pipeline

    run = pipeline("automatic-speech-recognition", model=model)
    run(samples[:16_000].copy())
    clock = time.perf_counter()
    for index in range(1, int(len(samples) / 16_000 / CHUNK_S) + 1):
        end = min(len(samples), int((index * CHUNK_S + LOOKAHEAD_S) * 16_000))
        begin = 0 if growing else max(0, int(((index - 1) * CHUNK_S - LEFT_S) * 16_000))
        run(samples[begin:end].copy())
    return (time.perf_counter() - clock) / (len(samples) / 16_000)


def mowa_rtf(model: str, samples: np.ndarray, dtype: str) -> float:
    import mowa
    from mowa.decode.stream import EndpointConfig
    from mowa.engines import streaming
    from mowa.engines.streaming import StreamingConfig

    engine = mowa.open_engine(mowa.load(model), device="cpu", dtype=dtype)
    config, spent = StreamingConfig("window", CHUNK_S, LEFT_S, LOOKAHEAD_S), 0.0
    for warm in (True, False):
        stream = streaming.stream(engine, config, EndpointConfig(vad=False))
        clock = time.perf_counter()
        for start in range(0, len(samples) // (8 if warm else 1), PIECE):
            stream.feed(samples[start : start + PIECE])
        stream.close()
        spent = time.perf_counter() - clock
    return spent / (len(samples) / 16_000)


def measure(arm: str, model: str, samples: np.ndarray) -> float:
    side, _, how = arm.partition("-")
    if side == "transformers":
        return transformers_rtf(model, samples, growing=how == "growing")
    return mowa_rtf(model, samples, how)


def run_arm(arm: str, folder: Path, sound: Path) -> float:
    command = [sys.executable, "-m", "benchmarks.stream_large", "--one", arm, str(sound), "--folder", str(folder)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{arm} failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    record.add_argument(parser, "stream-xlsr")
    options = parser.parse_args()
    model = str(checkpoint(options.folder / "xlsr-random"))
    if options.one:
        arm, sound = options.one
        samples, _ = soundfile.read(sound, dtype="float32")
        print(json.dumps(measure(arm, model, samples)))
        return
    sound, (sample, rate_hz) = options.folder / "live.wav", soundfile.read(EXAMPLE, dtype="float32")
    soundfile.write(sound, np.take(sample, range(int(options.seconds * rate_hz)), mode="wrap"), rate_hz)
    rows: list[record.Row] = [{"arm": arm, "rtf": []} for arm in ARMS]
    for _ in range(options.rounds):
        for row in rows:
            row["rtf"].append(round(run_arm(row["arm"], options.folder, sound), 4))
    print(markdown(VIEWS["stream-xlsr"]["table"], rows))
    record.write(options.record, rows, rounds=options.rounds)


if __name__ == "__main__":
    main()
