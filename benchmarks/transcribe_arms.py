"""The arms of `transcribe`: one recognizer each, run over a list of recordings in the calling process.

    python -m benchmarks.transcribe_arms ARM MODEL FILES.json OUT

FILES.json lists recordings (16 kHz mono WAV). OUT.json receives the measurements, OUT.npz the argmax of every frame of
the first few recordings, computed after the clock has stopped. Recognizers that take samples are given what soundfile
reads. The first recording is transcribed once before the clock starts.
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


def read_samples(files: list[str]) -> list[np.ndarray]:
    return [soundfile.read(file, dtype="float32")[0] for file in files]


def transformers_pipeline(dtype: str, batch: int, model: str) -> Any:
    """Return transformers' own pipeline as its documentation has it, with batches of `batch` recordings."""
    import torch
    from transformers import AutoModelForCTC, AutoTokenizer, Wav2Vec2FeatureExtractor, pipeline

    torch.set_num_threads(THREADS)
    weights = getattr(torch, dtype)
    net = AutoModelForCTC.from_pretrained(model, dtype=weights).eval()
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    pipe = pipeline(
        "automatic-speech-recognition", model=net, tokenizer=tokenizer, feature_extractor=extractor, dtype=weights
    )

    def run(files: list[str]) -> list[str]:
        sounds = read_samples(files)
        chunks = {"chunk_length_s": 24, "stride_length_s": 2} if max(map(len, sounds)) > LONG_S * 16_000 else {}
        inputs = ({"raw": sound, "sampling_rate": 16_000} for sound in sounds)
        return [" ".join(out["text"].split()) for out in pipe(inputs, batch_size=batch, **chunks)]

    def frames(files: list[str]) -> Frames:
        with torch.inference_mode():
            inputs = (extractor(sound, sampling_rate=16_000, return_tensors="pt") for sound in read_samples(files))
            return [net(one.input_values.to(weights)).logits[0].argmax(-1).numpy() for one in inputs]

    return run, frames


def mowa_engine(name: str, dtype: str, model: str) -> Any:
    import mowa
    from mowa import hardware

    hardware.enable_huge_pages()
    from mowa.data import audio
    from mowa.engines import selection
    from mowa.engines.settings import TranscriptionSettings

    engine = selection.select_engine(mowa.load(model), name=name, device="cpu", dtype=dtype, threads=THREADS).engine
    threshold = 0.0 if "xlsr" in model else TranscriptionSettings().vad_threshold  # random weights: skip nothing

    def run(files: list[str]) -> list[str]:
        texts = []
        for outcome in mowa.transcribe(files, engine, vad_threshold=threshold):
            if not hasattr(outcome, "text"):
                raise SystemExit(f"{outcome.file}: {outcome.error}")
            texts.append(outcome.text)
        return texts

    def frames(files: list[str]) -> Frames:
        prepare = audio.normalize if engine.preprocessing.normalize else np.asarray
        return [engine.emissions([prepare(sound)])[0].argmax(-1) for sound in read_samples(files)]

    return run, frames


def ctranslate2_engine(dtype: str, model: str) -> Any:
    """Return CTranslate2's Wav2Vec2, which computes the emissions alone; normalization and decoding are mowa's."""
    import ctranslate2

    from mowa.data import audio
    from mowa.decode import ctc
    from mowa.loading import load

    folder = Path(model).parent / f"{Path(model).name}-ctranslate2"
    if not folder.is_dir():
        ctranslate2.converters.TransformersConverter(model).convert(str(folder))
    net = ctranslate2.models.Wav2Vec2(str(folder), device="cpu", compute_type=dtype, intra_threads=THREADS)
    vocabulary = load(model).vocabulary

    def emissions(sound: np.ndarray) -> np.ndarray:
        values = np.ascontiguousarray(audio.normalize(sound)[None, None], np.float32)
        return np.array(net.encode(ctranslate2.StorageView.from_array(values), to_cpu=True))[0]

    def decode(sound: np.ndarray) -> str:
        return ctc.join_words(ctc.path_to_words(ctc.best_path(emissions(sound), vocabulary), vocabulary))

    def run(files: list[str]) -> list[str]:
        return [decode(sound) for sound in read_samples(files)]

    def frames(files: list[str]) -> Frames:
        return [emissions(sound).argmax(-1) for sound in read_samples(files)]

    return run, frames


ARMS: dict[str, Arm] = {
    "transformers-1": partial(transformers_pipeline, "float32", 1),
    "transformers-bfloat16": partial(transformers_pipeline, "bfloat16", 1),
    "transformers-4": partial(transformers_pipeline, "float32", 4),
    "transformers-8": partial(transformers_pipeline, "float32", 8),
    "pytorch-float32": partial(mowa_engine, "pytorch", "float32"),
    "pytorch-bfloat16": partial(mowa_engine, "pytorch", "bfloat16"),
    "pytorch-int8": partial(mowa_engine, "pytorch", "int8"),
    "onnx-float32": partial(mowa_engine, "onnx", "float32"),
    "onnx-int8": partial(mowa_engine, "onnx", "int8"),
    "ctranslate2-float32": partial(ctranslate2_engine, "float32"),
    "ctranslate2-int8": partial(ctranslate2_engine, "int8"),
}


def main(arm: str, model: str, listed: str, out: str) -> None:
    warnings.simplefilter("ignore")
    files = json.loads(Path(listed).read_text())
    started = time.perf_counter()
    run, frames = ARMS[arm](model)
    run(files[:1])
    load_s = time.perf_counter() - started
    started, cpu_started = time.perf_counter(), time.process_time()
    texts = run(files)
    wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    from mowa import hardware

    peak_mb = hardware.peak_rss_bytes() / 2**20
    short = [file for file in files[:COMPARED] if soundfile.info(file).duration <= LONG_S]
    np.savez(f"{out}.npz", *frames(short))
    measured = {"load_s": load_s, "wall_s": wall_s, "cpu_s": cpu_s, "peak_mb": peak_mb, "texts": texts}
    Path(f"{out}.json").write_text(json.dumps(measured, ensure_ascii=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
