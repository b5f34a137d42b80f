"""Speed and memory on a long recording, with a full-size XLSR-53 net, beside transformers' own pipeline.

    python benchmarks/transcribe.py [--minutes 60] [--peer-minutes 5] [--folder build/bench]

The net has the shape of wav2vec2-large-xlsr-53-polish (24 layers, 1024 wide, 40 tokens, 315 M parameters) and random
weights, saved the way the hub stores that checkpoint: pytorch_model.bin, no safetensors. The recording is the bundled
sample again and again with pauses between. Every run is a process of its own; memory is the peak resident set.
Speeds on shared machines are noisy: read the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import soundfile

SAMPLE = Path(__file__).parents[1] / "examples" / "dzien-dobry.flac"


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
    sample, rate_hz = soundfile.read(SAMPLE, dtype="float32")
    rng = np.random.default_rng(0)
    written, total = 0, int(minutes * 60 * rate_hz)
    with soundfile.SoundFile(path, "w", rate_hz, 1, "PCM_16") as file:
        while written < total:
            pause = rng.standard_normal(int(rng.uniform(0.3, 1.5) * rate_hz)).astype(np.float32) * 1e-3
            part = np.concatenate([sample, pause])[: total - written]
            file.write(part)
            written += len(part)
    return path


def with_mowa(model: str, file: str, dtype: str) -> dict[str, float | str]:
    import mowa
    from mowa.engines.native import engine as engine_of  # imports torch: not part of loading
    from mowa.loading import load

    started = time.perf_counter()
    engine = engine_of(load(model), dtype=dtype)
    loaded = time.perf_counter()
    transcript = mowa.transcribe(file, engine)
    spent = time.perf_counter() - loaded
    return {
        "what": f"mowa, {engine.precision.dtype}"
        + (" (torch's medium)" if engine.precision.matmul == "medium" else ""),
        "load_s": loaded - started,
        "audio_s": transcript.duration_s,
        "spent_s": spent,
    }


def with_pipeline(model: str, file: str, dtype: str) -> dict[str, float | str]:
    import torch
    from transformers import AutoModelForCTC, AutoTokenizer, Wav2Vec2FeatureExtractor, pipeline

    started = time.perf_counter()
    net = AutoModelForCTC.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    pipe = pipeline(
        "automatic-speech-recognition", model=net, tokenizer=AutoTokenizer.from_pretrained(model),
        feature_extractor=Wav2Vec2FeatureExtractor.from_pretrained(model), chunk_length_s=24, stride_length_s=2,
        dtype=getattr(torch, dtype),
    )  # fmt: skip
    loaded = time.perf_counter()
    samples, rate_hz = soundfile.read(file, dtype="float32")
    pipe({"raw": samples, "sampling_rate": rate_hz})
    spent = time.perf_counter() - loaded
    return {
        "what": f"transformers pipeline, {dtype}",
        "load_s": loaded - started,
        "audio_s": len(samples) / rate_hz,
        "spent_s": spent,
    }


def in_child(who: str, model: Path, file: Path, dtype: str, cache: Path) -> dict[str, float | str]:
    environment = os.environ | {"MOWA_CACHE": str(cache)}
    command = [sys.executable, __file__, "--child", who, str(model), str(file), dtype]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def show(row: dict[str, float | str]) -> None:
    audio_s, load_s, spent_s, peak_mb = (float(row[key]) for key in ("audio_s", "load_s", "spent_s", "peak_mb"))
    factor = f"{spent_s / audio_s:.3f} | {audio_s / spent_s:.1f}"
    print(
        f"| {row['what']} | {audio_s / 60:.0f} | {load_s:.1f} | {spent_s:.0f} | {factor} | {peak_mb:.0f} |", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--peer-minutes", type=float, default=5)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    model = checkpoint(options.folder / "xlsr")
    weights_mb = (model / "pytorch_model.bin").stat().st_size / 1e6
    short = recording(options.folder / f"{options.peer_minutes:g}min.flac", options.peer_minutes)
    long = recording(options.folder / f"{options.minutes:g}min.flac", options.minutes)
    cache = options.folder / "cache"
    print(f"weights: {weights_mb:.0f} MB in pytorch_model.bin; cores: {os.cpu_count()}\n")
    print("| what | audio, min | load, s | spent, s | real-time factor | × real time | peak, MB |")
    print("|---|---|---|---|---|---|---|")
    for who, file, dtype in (
        ("mowa", short, "auto"),  # the first load also converts the pickle
        ("pipeline", short, "float32"),
        ("mowa", short, "float32"),
        ("pipeline", short, "bfloat16"),
        ("mowa", long, "auto"),
    ):
        show(in_child(who, model, file, dtype, cache))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        who, model, file, dtype = sys.argv[2:]
        result = (with_mowa if who == "mowa" else with_pipeline)(model, file, dtype)
        result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(result))
    else:
        main()
