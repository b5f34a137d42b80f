"""Compare the speed of two checkouts of mowa: a command, transcription, and fine-tuning, in alternated pairs.

    git worktree add --detach build/before COMMIT
    python -m benchmarks.before_after build/before --pairs 5

Every run is a process of its own, in its checkout, with the benchmarks of that checkout; the two take turns. The ratio
is seconds after / seconds before of a pair; the machine should be idle. Transcripts and losses must be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.debian_packages import prepare as prepare_conversations
from benchmarks.smollm2 import prepare as prepare_model
from benchmarks.train_speech import write_corpus
from benchmarks.transcribe import checkpoint, write_clips

CLIPS, SPEECH_STEPS, TEXT_STEPS = 6, 3, 4


def run(checkout: Path, *arguments: str) -> str:
    """Run a benchmark of a checkout and return what it printed."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{checkout}: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def transcribe(checkout: Path, folder: Path) -> tuple[float, Any]:
    """Return seconds and the transcripts."""
    model, out = checkpoint(folder / "xlsr-random"), folder / "arms" / "before-after"
    out.parent.mkdir(parents=True, exist_ok=True)
    files = folder / "arms" / "before-after-files.json"
    files.write_text(json.dumps(write_clips(folder / "clips", CLIPS)))
    run(checkout, "benchmarks.transcribe_arms", "pytorch-float32", str(model), str(files), str(out))
    measured = json.loads(Path(f"{out}.json").read_text())
    return measured["wall_s"], measured["texts"]


def train_speech(checkout: Path, folder: Path) -> tuple[float, Any]:
    """Return seconds per step."""
    checkpoint(folder / "xlsr-random")
    write_corpus(folder / "noise", 8 * SPEECH_STEPS)
    arguments = ("--one", "mowa", "lora", "--steps", str(SPEECH_STEPS), "--folder", str(folder))
    printed = run(checkout, "benchmarks.train_speech", *arguments)
    return json.loads(printed.splitlines()[-1])["s_per_step"], None


def train_text(checkout: Path, folder: Path) -> tuple[float, Any]:
    """Return seconds of the steps after the first, and the losses."""
    data = prepare_conversations() / "synopses"
    options = {
        "one": "mowa", "round": 0, "model": prepare_model(), "data": data / "train.jsonl", "dev": data / "dev.jsonl",
        "steps": TEXT_STEPS, "length": 1024, "precision": "autocast", "folder": folder / "text", "held-out": 0,
    }  # fmt: skip
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    measured = json.loads(run(checkout, "benchmarks.train_text", *arguments).splitlines()[-1])
    return sum(measured["seconds"][1:]), measured["loss"]


def command(checkout: Path, folder: Path) -> tuple[float, Any]:
    """Return seconds of `mowa transcribe` on the bundled recording, start and loading included, and its text."""
    started = time.perf_counter()
    text = run(checkout, "mowa", "transcribe", "examples/dzien-dobry.flac")
    return time.perf_counter() - started, text


MEASURES = {"command": command, "transcribe": transcribe, "train_text": train_text, "train_speech": train_speech}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--measures", nargs="+", default=list(MEASURES), choices=list(MEASURES))
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    record.add_argument(parser, "before-after")
    given = parser.parse_args()
    checkouts, folder = {"before": given.before.resolve(), "after": record.ROOT}, given.folder.resolve()
    rows: list[record.Row] = []
    for name in given.measures:
        seconds: dict[str, list[float]] = {side: [] for side in checkouts}
        outputs = set()
        for index in range(given.pairs):
            for side in checkouts if index % 2 == 0 else reversed(checkouts):
                spent, output = MEASURES[name](checkouts[side], folder)
                seconds[side].append(round(spent, 3))
                outputs.add(json.dumps(output))
        ratios = [after / before for before, after in zip(seconds["before"], seconds["after"], strict=True)]
        row = {"measure": name} | seconds | {"ratio": [round(ratio, 4) for ratio in ratios]}
        rows.append(row | {"median_ratio": round(statistics.median(ratios), 4), "same_output": len(outputs) == 1})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=checkouts["before"], capture_output=True, text=True, check=True
    )
    record.write(given.record, rows, rounds=given.pairs, before=commit.stdout.strip())


if __name__ == "__main__":
    main()
