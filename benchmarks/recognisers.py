"""The arms of transcribe.py: one recogniser each, over the same recordings, in the process that calls it.

    python benchmarks/recognisers.py ARM MODEL FILES.json OUT

FILES.json lists recordings (16 kHz mono WAV). OUT.json gets what was measured; OUT.npz the likeliest output of every
frame of the first few, made after the clock has stopped. Recognisers that take samples are given what soundfile reads.
The first recording is read once before the clock starts.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

COMPARED = 4  # recordings whose frames are compared
THREADS = len(os.sched_getaffinity(0))
LONG_S = 60
Frames = list[np.ndarray]
Arm = Callable[[str], tuple[Callable[[list[str]], list[str]], Callable[[list[str]], Frames]]]


def sounds(files: list[str]) -> list[np.ndarray]:
    return [soundfile.read(file, dtype="float32")[0] for file in files]


def transformers_pipeline(batch: int, model: str) -> Any:
    """transformers' own pipeline as its documentation has it: float32, recordings in batches of `batch`."""
    import torch
    from transformers import AutoModelForCTC, AutoTokenizer, Wav2Vec2FeatureExtractor, pipeline

    torch.set_num_threads(THREADS)
    net = AutoModelForCTC.from_pretrained(model).eval()
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    pipe = pipeline("automatic-speech-recognition", model=net, tokenizer=tokenizer, feature_extractor=extractor)

    def run(files: list[str]) -> list[str]:
        heard = sounds(files)
        long = {"chunk_length_s": 24, "stride_length_s": 2} if max(map(len, heard)) > LONG_S * 16_000 else {}
        inputs = ({"raw": sound, "sampling_rate": 16_000} for sound in heard)
        return [" ".join(out["text"].split()) for out in pipe(inputs, batch_size=batch, **long)]

    def frames(files: list[str]) -> Frames:
        with torch.inference_mode():
            inputs = (extractor(sound, sampling_rate=16_000, return_tensors="pt") for sound in sounds(files))
            return [net(one.input_values).logits[0].argmax(-1).numpy() for one in inputs]

    return run, frames


def mowa_engine(name: str, dtype: str, model: str) -> Any:
    import mowa
    from mowa import hardware

    hardware.enable_huge_pages()
    from mowa.data import audio
    from mowa.engines import selection
    from mowa.engines.settings import TranscriptionSettings

    engine = selection.select_engine(mowa.load(model), name=name, device="cpu", dtype=dtype, threads=THREADS).engine
    speech = 0.0 if "xlsr" in model else TranscriptionSettings().vad_threshold  # random weights are to read everything

    def run(files: list[str]) -> list[str]:
        texts = []
        for outcome in mowa.iter_transcripts(files, engine, TranscriptionSettings(vad_threshold=speech)):
            if not hasattr(outcome, "text"):
                raise SystemExit(f"{outcome.file}: {outcome.error}")
            texts.append(outcome.text)
        return texts

    def frames(files: list[str]) -> Frames:
        made = audio.normalize if engine.preprocessing.normalize else np.asarray
        return [engine.emissions([made(sound)])[0].argmax(-1) for sound in sounds(files)]

    return run, frames


def ctranslate2_engine(dtype: str, model: str) -> Any:
    """CTranslate2's Wav2Vec2, which is the net alone: normalising and reading letters are mowa's."""
    import ctranslate2

    from mowa.data import audio
    from mowa.decode import ctc
    from mowa.loading import load

    folder = Path(model).parent / f"{Path(model).name}-ctranslate2"
    if not folder.is_dir():
        ctranslate2.converters.TransformersConverter(model).convert(str(folder))
    net = ctranslate2.models.Wav2Vec2(str(folder), device="cpu", compute_type=dtype, intra_threads=THREADS)
    words = load(model).vocabulary

    def scores(sound: np.ndarray) -> np.ndarray:
        values = np.ascontiguousarray(audio.normalize(sound)[None, None], np.float32)
        return np.array(net.encode(ctranslate2.StorageView.from_array(values), to_cpu=True))[0]

    def run(files: list[str]) -> list[str]:
        return [
            ctc.join_words(ctc.path_to_words(ctc.best_path(scores(sound), words), words)) for sound in sounds(files)
        ]

    def frames(files: list[str]) -> Frames:
        return [scores(sound).argmax(-1) for sound in sounds(files)]

    return run, frames


ARMS: dict[str, tuple[str, Arm]] = {
    "transformers-1": ("transformers pipeline, float32, batch 1", partial(transformers_pipeline, 1)),
    "transformers-4": ("transformers pipeline, float32, batch 4", partial(transformers_pipeline, 4)),
    "transformers-8": ("transformers pipeline, float32, batch 8", partial(transformers_pipeline, 8)),
    "native-float32": ("mowa native, float32", partial(mowa_engine, "pytorch", "float32")),
    "native-bfloat16": ("mowa native, bfloat16", partial(mowa_engine, "pytorch", "bfloat16")),
    "native-int8": ("mowa native, int8", partial(mowa_engine, "pytorch", "int8")),
    "onnx-float32": ("mowa onnx, float32", partial(mowa_engine, "onnx", "float32")),
    "onnx-int8": ("mowa onnx, int8", partial(mowa_engine, "onnx", "int8")),
    "ctranslate2-float32": ("CTranslate2, float32", partial(ctranslate2_engine, "float32")),
    "ctranslate2-int8": ("CTranslate2, int8", partial(ctranslate2_engine, "int8")),
}


def main(arm: str, model: str, listed: str, out: str) -> None:
    warnings.simplefilter("ignore")
    files = json.loads(Path(listed).read_text())
    started = time.perf_counter()
    run, frames = ARMS[arm][1](model)
    run(files[:1])
    load_s = time.perf_counter() - started
    started, spent = time.perf_counter(), time.process_time()
    texts = run(files)
    wall_s, cpu_s = time.perf_counter() - started, time.process_time() - spent
    from mowa import hardware

    peak_mb = hardware.peak_rss_bytes() / 2**20
    short = [file for file in files[:COMPARED] if soundfile.info(file).duration <= LONG_S]
    np.savez(f"{out}.npz", *frames(short))
    found = {"load_s": load_s, "wall_s": wall_s, "cpu_s": cpu_s, "peak_mb": peak_mb, "texts": texts}
    Path(f"{out}.json").write_text(json.dumps(found, ensure_ascii=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
