"""Test sets of Polish speech: synthetic ones, synthesized where they are missing, and folders of people.

    python -m benchmarks.speech_sets

The synthetic sets are those of `make model`: `seen` and `unseen` are the same 300 held-out sentences in voices that
training has and has not. Where build/pl-tiny has none, the sentences are collected from Debian packages (200 MB are
fetched) and read aloud by espeak-ng into build/speech-sets, with 3,000 training clips.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT

FULL, SMALL = ROOT / "build" / "pl-tiny", ROOT / "build" / "speech-sets"
TRAINING_CLIPS = 3000


def prepare(folder: Path | None = None) -> Path:
    """Return a folder with train, dev, seen and unseen.jsonl and sentences.txt: `folder`, or one made on demand."""
    if folder is not None:
        return folder
    if (FULL / "unseen.jsonl").is_file():
        return FULL
    if not (SMALL / "unseen.jsonl").is_file() or not (SMALL / "train.jsonl").is_file():
        if not (SMALL / "text.txt").is_file():
            _build("text", "--debian", "all", "--out", str(SMALL / "text.txt"))
        _build("synth", str(SMALL / "text.txt"), "--out", str(SMALL), "--clips", str(TRAINING_CLIPS))
    return SMALL


def prepare_people() -> Path:
    """Return build/people with recordings of other languages from Debian packages, fetched where it is missing."""
    folder = ROOT / "build" / "people"
    if not (folder / "festvox-ru.jsonl").is_file() or not (folder / "asterisk-ru.jsonl").is_file():
        _build("people", "--out", str(folder), "--source", "festvox-ru", "--source", "asterisk-ru")
    return folder


def _build(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "projects.pl_tiny", *arguments], cwd=ROOT, check=True)


def read_set(manifest: Path) -> list[Any]:
    """Return the examples of a manifest, or of any other source that mowa reads."""
    from mowa.data.manifests.examples import read_examples

    return list(read_examples(manifest))


def read_people(folder: Path) -> list[Any]:
    """Return the examples of a folder with transcripts.tsv (columns file, relative to it, and normalized_text)."""
    from mowa.data.text.normalize import normalize_text
    from mowa.types import Example

    with (folder / "transcripts.tsv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return [
        Example(row["file"], str(folder / row["file"]), normalize_text(row["normalized_text"]), 0.0) for row in rows
    ]


if __name__ == "__main__":
    print(prepare())
