"""How fast recordings are transcribed, beside transformers' pipeline, ONNX Runtime and CTranslate2. All in one run.

    python benchmarks/transcribe.py [--clips 200] [--rounds 3] [--arms native-int8 …] [--minutes 20] [--json FILE]
    python benchmarks/transcribe.py --clips 24 --rounds 1 --minutes 0 --skip pl-tiny     # two or three minutes

The net has the shape of wav2vec2-large-xlsr-53-polish (24 layers, 1024 wide, 40 tokens, 315 M parameters) and random
weights, saved the way the hub stores that checkpoint. The clips, 1 to 15 s, are cut from the bundled recording; so is
a file of `--minutes`, which the arms in `--long-arms` hear. Every arm is a process of its own in every round; the
rounds cut the clips into as many parts, and within a round arms take turns, so that all meet the same weather. Shown
are medians over the rounds. Text is compared with transformers' own, read one clip at a time; where arithmetic is not
float32, the share of frames in which the same output is likeliest.

pl-tiny hears `--data` (made by `mowa data synth`; left out where it is not there), and its words are counted too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import soundfile
from recognisers import ARMS

EXAMPLE = Path(__file__).parents[1] / "examples" / "dzien-dobry.flac"
REFERENCE = "transformers-1"
PEER = "transformers-"
LONG_ARMS = ["transformers-1", "native-float32", "native-bfloat16", "native-int8"]
TINY_ARMS = ["transformers-1", "native-float32", "native-bfloat16", "native-int8", "onnx-float32", "onnx-int8"]
Result = dict[str, Any]


def checkpoint(folder: Path) -> Path:
    """A random XLSR-53 with the files of the hub's Polish checkpoint."""
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


def recording(path: Path, minutes: float) -> Path:
    """The sample, a pause, the sample, … in 16-bit FLAC."""
    if path.exists():
        return path
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


def clips(folder: Path, count: int) -> list[str]:
    """`count` cuts of 1 to 15 s out of the bundled recording, looped, in 16-bit WAV."""
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


def in_child(arm: str, model: str, files: list[str], folder: Path) -> Result:
    """One arm over `files`, in a process of its own. → what it found, with the audio's length and its frames."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "files.json").write_text(json.dumps(files))
    out = folder / arm
    environment = os.environ | {"MOWA_CACHE": str(folder.parent / "cache"), "HF_HUB_OFFLINE": "1"}
    script = Path(__file__).with_name("recognisers.py")
    command = [sys.executable, str(script), arm, model, str(folder / "files.json"), str(out)]
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{arm} failed:\n{done.stderr[-2000:]}")
    found: Result = json.loads(Path(f"{out}.json").read_text())
    with np.load(f"{out}.npz") as frames:
        found["frames"] = [frames[name] for name in frames.files]
    found["audio_s"] = sum(soundfile.info(file).duration for file in files)
    return found


def measured(arms: Iterable[str], model: str, files: list[str], rounds: int, folder: Path) -> dict[str, list[Result]]:
    """What every arm found in every round; the reference goes first, so that it is there where a run is broken off."""
    found: dict[str, list[Result]] = {arm: [] for arm in arms}
    for turn in range(rounds):
        for arm in found:
            found[arm].append(in_child(arm, model, files[turn::rounds], folder))
            speed = found[arm][-1]["audio_s"] / found[arm][-1]["wall_s"]
            print(f"round {turn + 1}: {arm}: {speed:.1f} × real time", file=sys.stderr, flush=True)
    return found


def agreement(ours: list[Result], theirs: list[Result]) -> tuple[int, int, float]:
    """Recordings with the very same text, all recordings, and the share of compared frames that agree."""
    pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a["texts"], b["texts"], strict=True)]
    frames = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a["frames"], b["frames"], strict=True)]
    same = sum(int((a == b).sum()) for a, b in frames) / max(1, sum(len(a) for a, _ in frames))
    return sum(a == b for a, b in pairs), len(pairs), same


def table(found: dict[str, list[Result]], *, said: list[str] | None = None, rounds: int = 1) -> list[dict[str, Any]]:
    """Print a row for each arm: speed, beside the best of transformers' pipeline, and what became of the text."""
    times = {arm: median(one["wall_s"] / one["audio_s"] for one in results) for arm, results in found.items()}
    peers = [spent for arm, spent in times.items() if arm.startswith(PEER)]
    words = "" if said is None else " WER % |"
    print(f"| what | s per 10 s | × real time | × pipeline | same text | frames agreeing | peak MB |{words}")
    print("|---|---|---|---|---|---|---|" + ("" if said is None else "---|"))
    rows = []
    for arm, results in found.items():
        row: dict[str, Any] = {"arm": arm, "s_per_s": times[arm], "peak_mb": max(one["peak_mb"] for one in results)}
        ratio, text, same = "", "", ""
        if peers:
            row["ratio"] = min(peers) / times[arm]
            ratio = f"{row['ratio']:.2f}"
        if REFERENCE in found:
            equal, count, share = agreement(results, found[REFERENCE])
            row |= {"same_text": equal, "texts": count, "frames_agreeing": share}
            text, same = f"{equal} of {count}", f"{share:.2%}" if any(one["frames"] for one in results) else ""
        cells = [ARMS[arm][0], f"{times[arm] * 10:.3f}", f"{1 / times[arm]:.1f}", ratio, text, same]
        cells.append(f"{row['peak_mb']:.0f}")
        if said is not None:
            from mowa.tasks.metrics import error_rates

            heard = dict[int, str]()
            for turn, one in enumerate(results):
                heard |= dict(zip(range(turn, len(said), rounds), one["texts"], strict=True))
            row["wer"] = error_rates(said, [heard[index] for index in range(len(said))])["wer"]
            cells.append(f"{row['wer'] * 100:.2f}")
        print(f"| {' | '.join(cells)} |", flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--minutes", type=float, default=20, help="of the long file; 0 leaves it out")
    parser.add_argument("--long-arms", nargs="+", choices=list(ARMS), default=LONG_ARMS)
    parser.add_argument("--skip", nargs="+", choices=["xlsr", "pl-tiny"], default=[])
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--model", type=Path, help="a checkpoint's folder, instead of the random one")
    parser.add_argument("--data", type=Path, default=Path("build/pl-tiny"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores; {options.clips} clips in {options.rounds} rounds\n")
    results = {}
    if "xlsr" not in options.skip:
        model = str(options.model or checkpoint(options.folder / "xlsr-random"))
        files = clips(options.folder / "clips", options.clips)
        found = measured(options.arms, model, files, options.rounds, options.folder / "arms")
        results["clips"] = table(found)
        if options.minutes:
            long = recording(options.folder / f"{options.minutes:g}min.wav", options.minutes)
            print(f"\none file of {options.minutes:g} minutes\n")
            found = measured(options.long_arms, model, [str(long)], 1, options.folder / "arms")
            results["long"] = table(found)
    manifest = options.data / "unseen.jsonl"
    if "pl-tiny" not in options.skip and manifest.exists():
        from mowa.io.hub import MODEL_ALIASES
        from projects.pl_tiny import synth

        examples = list(synth.read_manifest(manifest)) + list(synth.read_manifest(options.data / "seen.jsonl"))
        print(f"\npl-tiny, {len(examples)} recordings in voices it has and has not learnt from\n")
        files = [example.audio for example in examples]
        found = measured(
            [arm for arm in TINY_ARMS if arm in options.arms],
            str(MODEL_ALIASES["pl-tiny"]),
            files,
            options.rounds,
            options.folder / "arms",
        )
        results["pl-tiny"] = table(found, said=[example.text for example in examples], rounds=options.rounds)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
