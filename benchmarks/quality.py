"""How well a model hears: the table of its card, by one command.

    python benchmarks/quality.py [--model NAME] [--data build/pl-tiny] [--human FOLDER [--whisper FOLDER]] [--json FILE]

Greedy, no language model; jiwer over lower-cased text without punctuation. `--data` is what `mowa data synth` made:
`seen` and `unseen` are the same 300 held-out sentences in voices training has and has not heard. `--human` is a folder
with transcripts.tsv (columns file, a path in the folder, and normalized_text). Every row says how many of its sentences
stand in the training text: it must be none. `--whisper` names a Whisper model in CTranslate2 format, which hears the
same people with its decoder (greedy, told that it is Polish); it needs faster-whisper.
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
from mowa.data import audio
from mowa.data.audio import augment
from mowa.data.text.normalize import normalize_text
from mowa.engines.transcription import Failure
from mowa.tasks.metrics import error_rates
from mowa.types import Example
from projects.pl_tiny import synth

Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]
Hearing = Callable[[list[str]], list[str]]


def changed(examples: list[Example], change: Change, folder: Path) -> list[Example]:
    """The same examples with their audio changed, written under `folder`."""
    folder.mkdir()
    out = []
    for index, example in enumerate(examples):
        path = folder / f"{example.id}.wav"
        sound = change(audio.load_audio(example.audio), np.random.default_rng(index))
        soundfile.write(path, np.clip(sound, -1, 1), 16_000, subtype="PCM_16")
        out.append(Example(example.id, str(path), example.text, example.duration_s))
    return out


def people(folder: Path) -> list[Example]:
    with (folder / "transcripts.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return [
        Example(row["file"], str(folder / row["file"]), normalize_text(row["normalized_text"]), 0.0) for row in rows
    ]


def ours(model: str) -> Hearing:
    engine = mowa.open_engine(mowa.load(model), dtype="float32")

    def hear(files: list[str]) -> list[str]:
        heard = []
        for outcome in mowa.iter_transcripts(files, engine):
            if isinstance(outcome, Failure):
                raise outcome.error
            heard.append(outcome.text)
        return heard

    return hear


def whisper(folder: Path) -> Hearing:
    from faster_whisper import WhisperModel

    model = WhisperModel(str(folder), device="cpu", compute_type="float32")

    def hear(files: list[str]) -> list[str]:
        said = (model.transcribe(file, language="pl", beam_size=1, temperature=0.0)[0] for file in files)
        return ["".join(segment.text for segment in segments) for segments in said]

    return hear


def row(name: str, examples: list[Example], hear: Hearing, known: set[str]) -> dict[str, float]:
    """Measure one set and print its row."""
    rates = error_rates([example.text for example in examples], hear([example.audio for example in examples]))
    minutes = sum(soundfile.info(example.audio).duration for example in examples) / 60
    leaked = len({normalize_text(example.text) for example in examples} & known)
    shown = f"{minutes:.1f} | {rates['wer'] * 100:.1f} | {rates['cer'] * 100:.1f}"
    print(f"| {name} | {len(examples)} | {shown} | {leaked} |", flush=True)
    return rates | {"clips": len(examples), "minutes": minutes, "leaked": leaked}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pl-tiny")
    parser.add_argument("--data", type=Path, default=Path("build/pl-tiny"))
    parser.add_argument("--human", type=Path)
    parser.add_argument("--whisper", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    unseen = list(synth.read_manifest(options.data / "unseen.jsonl"))
    known = {normalize_text(line) for line in (options.data / "sentences.txt").read_text().splitlines()}
    hear = ours(options.model)
    with tempfile.TemporaryDirectory() as scratch:
        sets = {
            "synthetic, seen voices": list(synth.read_manifest(options.data / "seen.jsonl")),
            "synthetic, ten unseen voices": unseen,
            "unseen voices + noise at 10 dB": changed(
                unseen, lambda x, rng: augment.add_noise(x, rng, 10.0), Path(scratch) / "noise"
            ),
            "unseen voices, telephone band": changed(
                unseen, lambda x, _: augment.simulate_telephone(x), Path(scratch) / "telephone"
            ),
        }
        if options.human:
            sets["people"] = people(options.human)
        print("| recordings | clips | minutes | WER % | CER % | in training text |\n|---|---|---|---|---|---|")
        results = {name: row(name, examples, hear, known) for name, examples in sets.items()}
        if options.human and options.whisper:
            name = "people, by Whisper with its decoder"
            results[name] = row(name, sets["people"], whisper(options.whisper), known)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
