"""How well a model hears: the table of its card, by one command.

    python benchmarks/quality.py [--model pl-tiny] [--data build/pl-tiny] [--human FOLDER] [--json FILE]

Greedy, no language model; jiwer over lower-cased text without punctuation. `--data` is what `mowa data synth` made:
`seen` and `unseen` are the same 300 held-out sentences in voices training has and has not heard. `--human` is a folder
with transcripts.tsv (columns file, a path in the folder, and normalized_text). Every row says how many of its sentences
stand in the training text: it must be none.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

import mowa
from mowa.data import audio, augment, synth
from mowa.data.text import plain
from mowa.engines.transcription import Failure
from mowa.nouns import Example
from mowa.tasks.ctc import error_rates

Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def changed(examples: list[Example], change: Change, folder: Path) -> list[Example]:
    """The same examples with their audio changed, written under `folder`."""
    folder.mkdir()
    out = []
    for index, example in enumerate(examples):
        path = folder / f"{example.id}.wav"
        sound = change(audio.load(example.audio), np.random.default_rng(index))
        soundfile.write(path, np.clip(sound, -1, 1), 16_000, subtype="PCM_16")
        out.append(Example(example.id, str(path), example.text, example.duration_s))
    return out


def people(folder: Path) -> list[Example]:
    with (folder / "transcripts.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return [Example(row["file"], str(folder / row["file"]), plain(row["normalized_text"]), 0.0) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pl-tiny")
    parser.add_argument("--data", type=Path, default=Path("build/pl-tiny"))
    parser.add_argument("--human", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    unseen = list(synth.read_manifest(options.data / "unseen.jsonl"))
    known = {plain(line) for line in (options.data / "sentences.txt").read_text().splitlines()}
    engine = mowa.engine(mowa.load(options.model), dtype="float32")
    with tempfile.TemporaryDirectory() as scratch:
        sets = {
            "synthetic, seen voices": list(synth.read_manifest(options.data / "seen.jsonl")),
            "synthetic, ten unseen voices": unseen,
            "unseen voices + noise at 10 dB": changed(
                unseen, lambda x, rng: augment.noise(x, rng, 10.0), Path(scratch) / "noise"
            ),
            "unseen voices, telephone band": changed(
                unseen, lambda x, _: augment.telephone(x), Path(scratch) / "telephone"
            ),
        }
        if options.human:
            sets["people"] = people(options.human)
        print("| recordings | clips | minutes | WER % | CER % | in training text |\n|---|---|---|---|---|---|")
        results = {}
        for name, examples in sets.items():
            heard, seconds = [], 0.0
            for outcome in mowa.transcripts([example.audio for example in examples], engine):
                if isinstance(outcome, Failure):
                    raise outcome.error
                heard.append(outcome.text)
                seconds += outcome.duration_s
            rates = error_rates([example.text for example in examples], heard)
            leaked = len({plain(example.text) for example in examples} & known)
            results[name] = rates | {"clips": len(examples), "minutes": seconds / 60, "leaked": leaked}
            shown = f"{seconds / 60:.1f} | {rates['wer'] * 100:.1f} | {rates['cer'] * 100:.1f}"
            print(f"| {name} | {len(examples)} | {shown} | {leaked} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
