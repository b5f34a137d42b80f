"""Transcription speed of mowa, transformers' pipeline, ONNX Runtime and CTranslate2 over the same recordings.

    python -m benchmarks.transcribe [--clips 60] [--rounds 3] [--arms transformers-1 pytorch-int8 …]
    python -m benchmarks.transcribe --clips 0 --minutes 5 60 --record transcribe-hour     # memory of long recordings
    python -m benchmarks.transcribe --clips 0 --data build/pl-tiny [--human FOLDER]       # speed and errors of pl-tiny
    python -m benchmarks.transcribe --clips 3 --rounds 1 --record ''                      # a check, two minutes

The network has the shape of wav2vec2-large-xlsr-53-polish (24 layers of width 1024, 40 tokens, 315 M parameters) and
random weights, stored the way the hub stores that checkpoint. The clips, of 1 to 15 s, and the long recordings are cut
from the bundled recording. The clips are split into as many parts as there are rounds; in every round each arm
transcribes that round's part in a process of its own, and the arms take turns. Texts and frames are compared with those
of transformers' pipeline in float32, one clip at a time (`transformers-1`).

With --data, pl-tiny transcribes the two test sets of `make model`, and with --human a folder of people.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from benchmarks import record
from benchmarks.tables import markdown
from benchmarks.transcribe_arms import ARMS
from benchmarks.views import VIEWS

EXAMPLE = record.ROOT / "examples" / "dzien-dobry.flac"
REFERENCE = "transformers-1"
LONG_ARMS = ["pytorch-bfloat16"]
TINY_ARMS = ["pytorch-float32", "pytorch-bfloat16", "pytorch-int8"]
Result = dict[str, Any]


def checkpoint(folder: Path) -> Path:
    """Write a random XLSR-53 with the files of the hub's Polish checkpoint, unless `folder` has one. Return it."""
    if (folder / "pytorch_model.bin").exists():
        return folder
    import torch
    from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", *"aąbcćdeęfghijklłmnńoóprsśtuwyzźżqvx"]
    config = Wav2Vec2Config(
        vocab_size=len(tokens), hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        feat_extract_norm="layer", conv_bias=True, do_stable_layer_norm=True, pad_token_id=0,
    )  # fmt: skip
    net = Wav2Vec2ForCTC(config)
    net.lm_head.bias.data[1:4] = -100  # transformers' pipeline would write <s> into the text
    config.architectures = ["Wav2Vec2ForCTC"]
    config.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), unk_token="<unk>", pad_token="<pad>").save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)
    torch.save(net.state_dict(), folder / "pytorch_model.bin")
    return folder


def long_recording(path: Path, minutes: float) -> Path:
    """Write the bundled recording over and over, with pauses between, as 16-bit FLAC."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    sample, rate_hz = soundfile.read(EXAMPLE, dtype="float32")
    rng = np.random.default_rng(0)
    written, total = 0, int(minutes * 60 * rate_hz)
    with soundfile.SoundFile(path, "w", rate_hz, 1, "PCM_16") as file:
        while written < total:
            pause = rng.standard_normal(int(rng.uniform(0.3, 1.5) * rate_hz)).astype(np.float32) * 1e-3
            part = np.concatenate([sample, pause])[: total - written]
            file.write(part)
            written += len(part)
    return path


def write_clips(folder: Path, count: int) -> list[str]:
    """Write `count` cuts of 1 to 15 s out of the bundled recording, looped, as 16-bit WAV."""
    folder.mkdir(parents=True, exist_ok=True)
    sample, rate_hz = soundfile.read(EXAMPLE, dtype="float32")
    rng = np.random.default_rng(0)
    looped = np.tile(sample, -(-16 * rate_hz // len(sample)) + 1)
    files = []
    for index in range(count):
        length = int(rng.uniform(1, 15) * rate_hz)
        start = int(rng.integers(len(sample)))
        noise = rng.standard_normal(length).astype(np.float32) * 1e-3  # so that no two are alike
        file = folder / f"{index:03}.wav"
        if not file.exists():
            soundfile.write(file, np.clip(looped[start : start + length] + noise, -1, 1), rate_hz, "PCM_16")
        files.append(str(file))
    return files


def run_arm(arm: str, model: str, files: list[str], folder: Path) -> Result:
    """Run one arm over `files` in a process of its own. Return its measurements, audio length and frames."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "files.json").write_text(json.dumps(files))
    out = folder / arm
    environment = os.environ | {"MOWA_CACHE": str((folder.parent / "cache").resolve()), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.transcribe_arms", arm, model, str(folder / "files.json"), str(out)]
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{arm} failed:\n{done.stderr[-2000:]}")
    measured: Result = json.loads(Path(f"{out}.json").read_text())
    with np.load(f"{out}.npz") as frames:
        measured["frames"] = [frames[name] for name in frames.files]
    measured["audio_s"] = sum(soundfile.info(file).duration for file in files)
    return measured


def run_rounds(arms: Iterable[str], model: str, files: list[str], rounds: int, folder: Path) -> dict[str, list[Result]]:
    """Run every arm in every round over that round's part of `files`; the arms take turns."""
    results: dict[str, list[Result]] = {arm: [] for arm in arms}
    for index in range(rounds):
        for arm in results:
            results[arm].append(run_arm(arm, model, files[index::rounds], folder))
            speed = results[arm][-1]["audio_s"] / results[arm][-1]["wall_s"]
            print(f"round {index + 1}: {arm}: {speed:.1f} × real time", file=sys.stderr, flush=True)
    return results


def agreement(ours: list[Result], reference: list[Result]) -> Result:
    """Count recordings with the same text, and the share of compared frames whose argmax is the same."""
    texts = [pair for a, b in zip(ours, reference, strict=True) for pair in zip(a["texts"], b["texts"], strict=True)]
    frames = [pair for a, b in zip(ours, reference, strict=True) for pair in zip(a["frames"], b["frames"], strict=True)]
    same = sum(int((a == b).sum()) for a, b in frames) / max(1, sum(len(a) for a, _ in frames))
    return {"same_text": sum(a == b for a, b in texts), "texts": len(texts), "frame_agreement": round(same, 5)}


def to_rows(results: dict[str, list[Result]], **label: Any) -> list[record.Row]:
    rows = []
    for arm, rounds in results.items():
        row = label | {"arm": arm, "s_per_s": [round(one["wall_s"] / one["audio_s"], 5) for one in rounds]}
        if REFERENCE in results:
            row |= agreement(rounds, results[REFERENCE])
        rows.append(row | {"peak_mb": [round(one["peak_mb"]) for one in rounds]})
    return rows


def tiny_rows(data: Path, human: Path | None, rounds: int, folder: Path) -> list[record.Row]:
    """Speed and error rates of pl-tiny for each dtype, per test set and over all recordings."""
    from benchmarks.speech_sets import read_people, read_set
    from mowa.io.hub import MODEL_ALIASES
    from mowa.tasks.metrics import error_rates

    sets = {name: read_set(data / f"{name}.jsonl") for name in ("unseen", "seen")}
    if human:
        sets["people"] = read_people(human)
    examples = [example for found in sets.values() for example in found]
    files, model = [example.audio for example in examples], str(MODEL_ALIASES["pl-tiny"])
    results = run_rounds(TINY_ARMS, model, files, rounds, folder)
    rows = to_rows(results)
    for row, of_rounds in zip(rows, results.values(), strict=True):
        texts = [""] * len(files)
        for index, one in enumerate(of_rounds):
            texts[index::rounds] = one["texts"]
        start = 0
        for name, found in sets.items():
            rates = error_rates([one.text for one in found], texts[start : start + len(found)])
            row[f"{name}_wer"] = round(rates["wer"], 5)
            start += len(found)
        rates = error_rates([one.text for one in examples], texts)
        row |= {"wer": round(rates["wer"], 5), "cer": round(rates["cer"], 5), "recordings": len(files)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=60, help="number of short clips; 0 skips them [60]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--minutes", nargs="+", type=float, default=[], help="lengths of long recordings to transcribe")
    parser.add_argument("--long-arms", nargs="+", choices=list(ARMS), default=LONG_ARMS)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--model", type=Path, help="a checkpoint's folder, instead of the random one")
    parser.add_argument("--data", type=Path, help="build/pl-tiny as `make model` makes it; measures pl-tiny too")
    parser.add_argument("--human", type=Path, help="a folder with transcripts.tsv, with --data")
    record.add_argument(parser, "transcribe")
    options = parser.parse_args()
    model = str(options.model or checkpoint(options.folder / "xlsr-random"))
    arms_folder = options.folder / "arms"
    if options.clips:
        files = write_clips(options.folder / "clips", options.clips)
        rows = to_rows(run_rounds(options.arms, model, files, options.rounds, arms_folder), set="clips")
        if REFERENCE in options.arms:
            print(markdown(VIEWS["transcribe"]["table"], rows))
        record.write(options.record, rows, rounds=options.rounds)
    if options.minutes:
        rows = []
        for minutes in options.minutes:
            file = long_recording(options.folder / f"{minutes:g}min.flac", minutes)
            for arm, (found,) in run_rounds(options.long_arms, model, [str(file)], 1, arms_folder).items():
                long = {"spent_s": round(found["wall_s"], 1), "peak_mb": round(found["peak_mb"])}
                rows.append({"arm": arm, "minutes": minutes, **long})
        print(markdown(VIEWS["transcribe-hour"]["table"], rows))
        record.write(options.record and "transcribe-hour", rows)
    if options.data:
        rows = tiny_rows(options.data, options.human, options.rounds, arms_folder)
        print(markdown(VIEWS["transcribe-pl-tiny"]["table"], rows))
        record.write(options.record and "transcribe-pl-tiny", rows, rounds=options.rounds)


if __name__ == "__main__":
    main()
