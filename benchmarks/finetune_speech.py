"""Fine-tune pl-tiny: to Russian in Cyrillic, and to Polish over a bad telephone line, by every method.

    python -m benchmarks.finetune_speech russian [--methods head bottleneck lora full] [--epochs 5]
    python -m benchmarks.finetune_speech telephone [--methods bottleneck] [--epochs 2]
    python -m benchmarks.finetune_speech telephone --clips 40 --epochs 1 --record ''      # a check, two minutes

russian: the recordings of festvox-ru (one man, 99 minutes, from a Debian package), every tenth sentence held out for
dev and test, and as another speaker the Russian prompts of Asterisk; a new head of Cyrillic characters. pl-tiny was
trained on all of these recordings, with their text in Polish letters, so the figures flatter it; --model names another
checkpoint to start from. telephone: synthetic Polish (`speech_sets`) in a telephone band with noise at 5 to 15 dB, and
the same clips clean. Each method is a run of `mowa train` of its own, which is resumed if it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from benchmarks import record, speech_sets
from benchmarks.tables import markdown
from benchmarks.views import VIEWS

HELD_OUT = 10  # every tenth sentence
METHODS = {"head": ["--learning-rate", "3e-3"], "bottleneck": [], "lora": [], "full": ["--learning-rate", "1e-4"]}
Splits = dict[str, Path]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_manifest(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def russian(folder: Path, clips: int | None) -> tuple[Splits, list[str]]:
    people = speech_sets.prepare_people()

    def in_cyrillic(name: str) -> list[dict[str, Any]]:
        return [
            {
                "id": row["id"],
                "audio": str((people / row["audio"]).resolve()),
                "text": row["written"],
                "duration_s": row["duration_s"],
                "speaker": row["voice"],
            }
            for row in read_lines(people / f"{name}.jsonl")[:clips]
        ]

    man, woman = in_cyrillic("festvox-ru"), in_cyrillic("asterisk-ru")
    splits = {
        "train": write_manifest(folder / "train.jsonl", [row for i, row in enumerate(man) if i % HELD_OUT]),
        "dev": write_manifest(folder / "dev.jsonl", man[::HELD_OUT][::2]),
        "same_speaker": write_manifest(folder / "same_speaker.jsonl", man[::HELD_OUT][1::2]),
        "other_speaker": write_manifest(folder / "other_speaker.jsonl", woman),
    }
    return splits, ["--vocabulary", "new", "--data.char-map", "ё=е", "--language", "ru"]


def telephone(folder: Path, clips: int | None) -> tuple[Splits, list[str]]:
    from mowa.data import audio
    from mowa.data.audio import augment

    synthetic = speech_sets.prepare()

    def clean(name: str, count: int) -> list[dict[str, Any]]:
        rows = read_lines(synthetic / f"{name}.jsonl")[: min(count, clips or count)]
        return [row | {"audio": str((synthetic / row["audio"]).resolve())} for row in rows]

    def degrade(rows: list[dict[str, Any]], name: str) -> Path:
        out = []
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index, row in enumerate(rows):
            rng = np.random.default_rng(index)
            samples = audio.load_audio(row["audio"], 16_000)
            samples = augment.simulate_telephone(augment.add_noise(samples, rng, float(rng.uniform(5, 15))))
            file = folder / name / f"{index}.wav"
            soundfile.write(file, np.clip(samples, -1, 1), 16_000)
            out.append(row | {"audio": str(file.resolve())})
        return write_manifest(folder / f"{name}.jsonl", out)

    splits = {
        "train": degrade(clean("train", 3000), "train"),
        "dev": degrade(clean("dev", 100), "dev"),
        "telephone": degrade(clean("unseen", 300), "telephone"),
        "clean": write_manifest(folder / "clean.jsonl", clean("unseen", 300)),
    }
    return splits, []


def test_sets(splits: Splits) -> Splits:
    return {name: path for name, path in splits.items() if name not in ("train", "dev")}


def train(out: Path, given: argparse.Namespace, method: str, splits: Splits, flags: list[str]) -> record.Row:
    """Fine-tune with one method and return its row."""
    tests = [part for path in test_sets(splits).values() for part in ("--test", str(path))]
    command = [sys.executable, "-m", "mowa", "train", "--model", given.model, "--method", method, "-o", str(out)]
    command += ["--data", str(splits["train"]), "--dev", str(splits["dev"]), *tests, "--epochs", str(given.epochs)]
    subprocess.run([*command, *METHODS[method], *flags, *given.options], check=True)
    report = json.loads((out / "report.json").read_text())
    row: record.Row = {
        "method": method,
        "trainable_m": round(report["num_trainable_parameters"] / 1e6, 3),
        "minutes": round(report["train_runtime_s"] / 60, 1),
    }
    for name, path in test_sets(splits).items():
        (found,) = (metrics for key, metrics in report["metrics"].items() if path.stem in key)
        for key in ("wer", "cer"):
            low, high = found["confidence_interval"][key]
            estimate = {"value": found[key], "low": low, "high": high}
            row[f"{name}_{key}"] = {edge: round(value, 4) for edge, value in estimate.items()}
    return row


def evaluate_base(model: str, splits: Splits) -> record.Row:
    """Return the row of the model before fine-tuning."""
    import mowa
    from mowa.tasks.metrics import error_rates

    engine = mowa.open_engine(mowa.load(model))
    row: record.Row = {"method": "before"}
    for name, path in test_sets(splits).items():
        rows = read_lines(path)
        texts = [outcome.text for outcome in mowa.transcribe([one["audio"] for one in rows], engine)]
        rates = error_rates([one["text"] for one in rows], texts)
        row |= {f"{name}_{key}": round(rates[key], 4) for key in ("wer", "cer")}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["russian", "telephone"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS))
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--clips", type=int, help="at most this many recordings of each kind")
    parser.add_argument("--model", default="pl-tiny")
    parser.add_argument("--folder", type=Path, default=Path("build/finetune-speech"))
    parser.add_argument("options", nargs="*", help="further options of mowa train, after --")
    parser.add_argument("--record", metavar="NAME", help="write benchmarks/results/NAME.json; '' for none")
    given = parser.parse_args()
    result = f"finetune-speech-{given.task}"
    folder = given.folder / given.task
    splits, flags = {"russian": russian, "telephone": telephone}[given.task](folder / "data", given.clips)
    # The vocabulary stays on the telephone task, so there is something to compare with.
    rows = [evaluate_base(given.model, splits)] if given.task == "telephone" else []
    for method in given.methods or (list(METHODS) if given.task == "russian" else ["bottleneck"]):
        rows.append(train(folder / f"{Path(given.model).name}-{method}", given, method, splits, flags))
    print(markdown(VIEWS[result]["table"], rows))
    record.write(result if given.record is None else given.record, rows)


if __name__ == "__main__":
    main()
