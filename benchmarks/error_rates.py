"""Error rates of a Polish model on synthetic speech, clean and degraded, and on recordings of people.

    python -m benchmarks.error_rates [--model pl-tiny] [--human FOLDER [--whisper FOLDER]]
    python -m benchmarks.error_rates --max-samples 5 --record ''        # a check

Greedy decoding, no language model; jiwer over lower-case text without punctuation. The synthetic sets are made where
they are missing (`speech_sets`). --human is a folder with transcripts.tsv. Every row says how many of its sentences
occur in the training text: it must be none. --whisper names a Whisper model in CTranslate2 format, which transcribes
the people too (greedy, language set to Polish); it needs faster-whisper. Other models than pl-tiny are not recorded.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

import mowa
from benchmarks import record
from benchmarks.speech_sets import prepare, read_people, read_set
from benchmarks.tables import markdown
from benchmarks.views import VIEWS
from mowa.data import audio
from mowa.data.audio import augment
from mowa.data.text.normalize import normalize_text
from mowa.tasks.metrics import error_rates
from mowa.types import Example, Failure

Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]
Transcriber = Callable[[list[str]], list[str]]


def change_audio(examples: list[Example], change: Change, folder: Path) -> list[Example]:
    """Return the same examples with their audio changed, written under `folder`."""
    folder.mkdir()
    out = []
    for index, example in enumerate(examples):
        path = folder / f"{index}.wav"
        sound = change(audio.load_audio(example.audio), np.random.default_rng(index))
        soundfile.write(path, np.clip(sound, -1, 1), 16_000, subtype="PCM_16")
        out.append(Example(example.id, str(path), example.text, example.duration_s))
    return out


def degrade(name: str, examples: list[Example], folder: Path) -> dict[str, list[Example]]:
    """Return the same examples with noise and in the telephone band, by the name of the set."""
    noise = change_audio(examples, lambda x, rng: augment.add_noise(x, rng, 10.0), folder / f"{name}-noise")
    telephone = change_audio(examples, lambda x, _: augment.simulate_telephone(x), folder / f"{name}-telephone")
    return {f"{name}, noise at 10 dB": noise, f"{name}, telephone band": telephone}


def open_model(model: str) -> Transcriber:
    engine = mowa.open_engine(mowa.load(model), dtype="float32")

    def transcribe(files: list[str]) -> list[str]:
        texts = []
        for outcome in mowa.transcribe(files, engine):
            if isinstance(outcome, Failure):
                raise outcome.error
            texts.append(outcome.text)
        return texts

    return transcribe


def open_whisper(folder: Path) -> Transcriber:
    from faster_whisper import WhisperModel

    model = WhisperModel(str(folder), device="cpu", compute_type="float32")

    def transcribe(files: list[str]) -> list[str]:
        found = (model.transcribe(file, language="pl", beam_size=1, temperature=0.0)[0] for file in files)
        return ["".join(segment.text for segment in segments) for segments in found]

    return transcribe


def measure(model: str, name: str, examples: list[Example], transcribe: Transcriber, training: set[str]) -> record.Row:
    rates = error_rates([example.text for example in examples], transcribe([example.audio for example in examples]))
    minutes = sum(soundfile.info(example.audio).duration for example in examples) / 60
    return {
        "model": model,
        "recordings": name,
        "clips": len(examples),
        "minutes": round(minutes, 2),
        "wer": round(rates["wer"], 5),
        "cer": round(rates["cer"], 5),
        "leaked": len({normalize_text(example.text) for example in examples} & training),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pl-tiny")
    parser.add_argument("--data", type=Path, help="folder with seen.jsonl, unseen.jsonl and sentences.txt")
    parser.add_argument("--human", type=Path)
    parser.add_argument("--whisper", type=Path)
    parser.add_argument("--max-samples", type=int, help="recordings per set")
    record.add_argument(parser, "error-rates")
    options = parser.parse_args()
    data = prepare(options.data)
    seen, unseen = (read_set(data / f"{name}.jsonl")[: options.max_samples] for name in ("seen", "unseen"))
    training = {normalize_text(line) for line in (data / "sentences.txt").read_text().splitlines()}
    transcribe, rows, peers = open_model(options.model), [], []
    with tempfile.TemporaryDirectory() as scratch:
        sets = {"synthetic, voices from training": seen, "synthetic, ten other voices": unseen}
        sets |= degrade("ten other voices", unseen, Path(scratch))
        if options.human:
            sets["people"] = read_people(options.human)[: options.max_samples]
            sets |= degrade("people", sets["people"], Path(scratch))
        name = Path(options.model).name
        for of, examples in sets.items():
            rows.append(measure(name, of, examples, transcribe, training))
        if options.human and options.whisper:
            model = f"{options.whisper.name} with its decoder"
            peers.append(measure(model, "people", sets["people"], open_whisper(options.whisper), training))
    print(markdown(VIEWS["error-rates"]["table"], rows + peers))
    if options.model == "pl-tiny" and not options.max_samples:
        record.write(options.record, rows)
        if peers:
            record.write(options.record and f"{options.record}-whisper", peers)


if __name__ == "__main__":
    main()
