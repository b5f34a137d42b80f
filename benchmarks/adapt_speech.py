"""What fine-tuning makes of pl-tiny: human Russian in Cyrillic, and Polish over a bad telephone line, by every method.

    python benchmarks/adapt_speech.py russian [--methods head adapters lora all] [--epochs 8]
    python benchmarks/adapt_speech.py telephone [--methods adapters] [--epochs 2]

russian: the recordings of festvox-ru (one man, 99 minutes; `mowa data people`), every tenth sentence held out, and as a
speaker never heard in training the Russian prompts of Asterisk; a new head of Cyrillic letters. pl-tiny has heard all
of them before, respelt in Polish letters, so its rows flatter; `--model` names another checkpoint to begin from.
telephone: synthetic Polish (`mowa data synth`) in a telephone band with noise at 5 to 15 dB, and the same clips clean.
Each method is a run of `mowa train` of its own; the table is made of their report.json, and curves.png of their
histories. None is run twice.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

PEOPLE, SYNTHETIC = Path("build/people"), Path("build/pl-tiny")
HELD_OUT = 10  # every tenth sentence
SIZES = {"head": ["--learning-rate", "3e-3"], "adapters": [], "lora": [], "all": ["--learning-rate", "1e-4"]}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def manifest(path: Path, found: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found))
    return path


def russian(folder: Path) -> tuple[dict[str, Path], list[str]]:
    def cyrillic(name: str) -> list[dict[str, Any]]:
        return [
            {
                "id": row["id"],
                "audio": str((PEOPLE / row["audio"]).resolve()),
                "text": row["written"],
                "duration_s": row["duration_s"],
                "speaker": row["voice"],
            }
            for row in rows(PEOPLE / f"{name}.jsonl")
        ]

    man, woman = cyrillic("festvox-ru"), cyrillic("asterisk-ru")
    parts = {
        "train": manifest(folder / "train.jsonl", [row for i, row in enumerate(man) if i % HELD_OUT]),
        "dev": manifest(folder / "dev.jsonl", man[::HELD_OUT][::2]),
        "same-speaker": manifest(folder / "same-speaker.jsonl", man[::HELD_OUT][1::2]),
        "other-speaker": manifest(folder / "other-speaker.jsonl", woman),
    }
    return parts, ["--vocabulary", "new", "--data.letters", "ё=е", "--language", "ru"]


def telephone(folder: Path) -> tuple[dict[str, Path], list[str]]:
    from mowa.data import audio
    from mowa.data.audio import augment

    def rough(found: list[dict[str, Any]], name: str) -> Path:
        heard = []
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index, row in enumerate(found):
            rng = np.random.default_rng(index)
            samples = audio.load_audio(row["audio"], 16_000)
            samples = augment.simulate_telephone(augment.add_noise(samples, rng, float(rng.uniform(5, 15))))
            file = folder / name / f"{index}.wav"
            soundfile.write(file, np.clip(samples, -1, 1), 16_000)
            heard.append(row | {"audio": str(file.resolve())})
        return manifest(folder / f"{name}.jsonl", heard)

    def clean(name: str, count: int) -> list[dict[str, Any]]:
        found = rows(SYNTHETIC / f"{name}.jsonl")[:count]
        return [row | {"audio": str((SYNTHETIC / row["audio"]).resolve())} for row in found]

    parts = {
        "train": rough(clean("train", 3000), "train"),
        "dev": rough(clean("dev", 100), "dev"),
        "telephone": rough(clean("unseen", 300), "telephone"),
        "clean": manifest(folder / "clean.jsonl", clean("unseen", 300)),
    }
    return parts, []


def run(out: Path, given: argparse.Namespace, method: str, parts: dict[str, Path], flags: list[str]) -> dict[str, Any]:
    tests = [part for name, path in parts.items() if name not in ("train", "dev") for part in ("--test", str(path))]
    command = [sys.executable, "-m", "mowa", "train", "--model", given.model, "--train", method, "-o", str(out)]
    command += ["--data", str(parts["train"]), "--dev", str(parts["dev"]), *tests, "--epochs", str(given.epochs)]
    subprocess.run([*command, *SIZES[method], *flags, *given.also], check=True)
    return json.loads((out / "report.json").read_text())


def picture(folder: Path, runs: dict[str, Path]) -> None:
    """How the error rates fell, one line a method: curves.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, key in zip(axes, ("wer", "cer"), strict=True):
        for method, out in runs.items():
            seen = [row for row in rows(out / "history.jsonl") if f"eval_dev_{key}" in row]
            axis.plot([row["step"] for row in seen], [100 * row[f"eval_dev_{key}"] for row in seen], "o-", label=method)
        axis.set(xlabel="step", ylabel=f"{key.upper()} on dev, %", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(folder / "curves.png", dpi=80)


def before(model: str, parts: dict[str, Path]) -> None:
    """What the model says of the recordings to test on as it is."""
    import mowa
    from mowa.tasks import metrics

    engine = mowa.open_engine(mowa.load(model))
    for name in [name for name in parts if name not in ("train", "dev")]:
        found = rows(parts[name])
        files = [row["audio"] for row in found]
        said, heard = [row["text"] for row in found], [one.text for one in mowa.iter_transcripts(files, engine)]
        rates = metrics.error_rates(said, heard)
        print(f"| nothing | 0 | 0 | {name} | {100 * rates['wer']:.1f} | {100 * rates['cer']:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["russian", "telephone"])
    parser.add_argument("--methods", nargs="+", choices=list(SIZES))
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--model", default="pl-tiny")
    parser.add_argument("--folder", type=Path, default=Path("build/adapt"))
    parser.add_argument("also", nargs="*", help="further flags of mowa train, after --")
    given = parser.parse_args()
    made: dict[str, Callable[[Path], tuple[dict[str, Path], list[str]]]] = {"russian": russian, "telephone": telephone}
    folder = given.folder / given.what
    parts, flags = made[given.what](folder / "data")
    methods = given.methods or (list(SIZES) if given.what == "russian" else ["adapters"])
    print(
        "| what learns | parameters | minutes | recordings | WER % (95 %) | CER % (95 %) |\n|---|---|---|---|---|---|"
    )
    if given.what == "telephone":  # the letters stay, so there is something to compare with
        before(given.model, parts)
    for method in methods:
        out = folder / f"{Path(given.model).name}-{method}"
        report = run(out, given, method, parts, flags)
        for name, row in report["results"].items():
            rates = [
                "{:.1f} ({:.1f}–{:.1f})".format(100 * row[key], *(100 * edge for edge in row["interval"][key]))
                for key in ("wer", "cer")
            ]
            learning = f"{report['learning'] / 1e6:.2f} M"
            print(f"| {method} | {learning} | {report['minutes']:.0f} | {name} | {' | '.join(rates)} |", flush=True)
    picture(folder, {method: folder / f"{Path(given.model).name}-{method}" for method in methods})


if __name__ == "__main__":
    main()
