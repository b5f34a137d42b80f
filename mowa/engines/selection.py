"""Which engine computes a model here: the one that is named, or the one that measures fastest and keeps the text.

What is measured is the net itself over two clips of noise, after each engine has warmed up; it is remembered by
processor, versions and the net's shape. Text is kept by float32, and by bfloat16 where the processor computes in it
(`machine.precision`; docs/speed.md says what that was held to). int8 and float16 are never picked, only named.
"""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mowa import hardware
from mowa.adapters import checkpoint
from mowa.engines import onnx, pytorch
from mowa.engines.onnx import OnnxEngine
from mowa.engines.protocol import Engine
from mowa.engines.pytorch import PyTorchEngine
from mowa.errors import ModelError
from mowa.exporters import manifest
from mowa.types import Model

log = logging.getLogger("mowa")

ENGINES = ("auto", "pytorch", "onnx")
EXTERNAL_FORMATS = {
    "coreml": "a Core ML package: Apple's devices run it, examples/run_coreml.py shows how",
    "tensorrt": "for a GPU with TensorRT: examples/run_tensorrt.py shows how to build and run it",
}
TIMED_CLIPS_S = (2.0, 5.0)
ROUNDS = 3
TIMINGS_FILE = "engines.json"


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """An engine and why it is this one, in one line."""

    engine: Engine
    reason: str


def select_engine(
    model: Model,
    *,
    name: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    adapter: str | Path | None = None,
) -> EngineChoice:
    """The engine called `name` over `model`, in `dtype` on `device`, with the adapter in a folder where one is named.

    auto: PyTorch, unless an ONNX export of this very model is in the cache (`--engine onnx` puts it there), may be
    asked for this dtype and device, and measures faster. The net of `model` may be converted in place.

    Raises ModelError: an unknown name; a device or dtype that the engine does not have. As the engines do.
    """
    if name not in ENGINES:
        raise ModelError(f"engine {name!r} is not one of {', '.join(ENGINES)}")
    if name == "onnx":
        _refuse_device(device)
        whole = model if adapter is None else checkpoint.load_adapter(model, adapter)
        return _said(EngineChoice(onnx.open_engine(whole, dtype=dtype, threads=threads), "onnx: as it was named"))
    beside = _exported(model, device, dtype, threads, adapter) if name == "auto" else None
    ours = pytorch.open_engine(model, device=device, dtype=dtype, threads=threads).with_adapter(adapter)
    if name == "pytorch":
        return _said(EngineChoice(ours, f"pytorch, {ours.dtype}: as it was named"))
    if beside is None:
        why = "a GPU" if ours.device != "cpu" else _why(ours, dtype)
        return _said(EngineChoice(ours, f"pytorch, {ours.dtype} on {ours.device}: {why}"))
    seconds = _remembered([ours, beside])
    fastest: PyTorchEngine | OnnxEngine = beside if seconds[_label(beside)] < seconds[_label(ours)] else ours
    shown = ", ".join(f"{label} {spent:.2f} s" for label, spent in seconds.items())
    audio_s = sum(TIMED_CLIPS_S)
    return _said(
        EngineChoice(fastest, f"{fastest.name}, {fastest.dtype}: measured on {audio_s:.0f} s of audio, {shown}")
    )


def open_artifact(
    folder: Path,
    *,
    name: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    adapter: str | Path | None = None,
) -> EngineChoice:
    """The engine that runs what was exported to `folder` as something else than safetensors, which `engine` runs.

    Raises ModelError: a format that nothing here runs, or an engine, device or adapter that it cannot have.
    """
    kind = manifest.read_artifact(folder).format
    if kind in EXTERNAL_FORMATS:
        raise ModelError(f"{folder} is {EXTERNAL_FORMATS[kind]}")
    if name not in ("auto", kind):
        raise ModelError(f"{folder} was exported as {kind}: leave --engine out, or name the model it was made of")
    if adapter is not None:
        raise ModelError(f"{folder} was exported, and takes no adapter: export the model with the adapter in it")
    _refuse_device(device)
    if kind == "onnx":
        return _said(EngineChoice(onnx.open_engine(folder, dtype=dtype, threads=threads), "onnx: so it was exported"))
    from mowa.engines import ctranslate2

    return _said(
        EngineChoice(ctranslate2.open_engine(folder, dtype=dtype, threads=threads), f"{kind}: so it was exported")
    )


def _said(choice: EngineChoice) -> EngineChoice:
    log.info("engine: %s", choice.reason)
    return choice


def _refuse_device(device: str) -> None:
    if device not in ("auto", "cpu"):
        raise ModelError(f"the onnx engine runs on processors: leave --device out, or use --engine pytorch on {device}")


def _why(ours: PyTorchEngine, dtype: str) -> str:
    if ours.dtype == "int8" and dtype == "auto":
        return f"its scheme is {ours.model.scheme.name}"
    if dtype != "auto":
        return "the dtype was named, and there is no ONNX export of this model to compare with"
    if ours.dtype == "float32":
        return f"half precision is not {hardware.MIN_BFLOAT16_SPEEDUP} times as fast on this processor"
    return f"its products are more than {hardware.MIN_BFLOAT16_SPEEDUP} times as fast as float32 on this processor"


def _exported(
    model: Model, device: str, dtype: str, threads: int | None, adapter: str | Path | None
) -> OnnxEngine | None:
    """The cached export of `model`, where it could be picked. Asked before the net is converted to another dtype."""
    import torch

    if device not in ("auto", "cpu") or (device == "auto" and torch.cuda.is_available()) or dtype not in onnx.DTYPES:
        return None
    if not any((hardware.cache_folder() / "onnx").glob("*")):
        return None  # nothing to look for, so no weights to read
    whole = model if adapter is None else checkpoint.load_adapter(model, adapter)
    folder = onnx.cache_path(whole, dtype)
    if not folder.is_dir():
        return None
    try:
        return onnx.open_engine(folder, threads=threads)
    except ModelError as damaged:
        log.warning("%s", damaged)
        return None


def time_engines(engines: list[Any]) -> dict[str, float]:
    """Seconds that each takes over the clips, the least of some rounds, in turn."""
    rng = np.random.default_rng(0)
    clips = [rng.standard_normal(int(s * 16_000)).astype(np.float32) for s in TIMED_CLIPS_S]
    spent: dict[str, list[float]] = {_label(one): [] for one in engines}
    for turn in range(ROUNDS + 1):
        for one in engines:
            started = time.perf_counter()
            for clip in clips:
                one.emissions([clip])
            if turn:
                spent[_label(one)].append(time.perf_counter() - started)
    return {label: min(rounds) for label, rounds in spent.items()}


def _label(one: Engine) -> str:
    return f"{one.name} {one.dtype}"


def _remembered(engines: list[Any]) -> dict[str, float]:
    config = engines[0].config
    shape = [config.model_type, config.hidden_size, config.intermediate_size, config.num_hidden_layers]
    versions = [f"{package} {checkpoint.installed_version(package)}" for package in ("mowa", "torch", "onnxruntime")]
    labels = [_label(one) for one in engines]
    said = [hardware.cpu_name(), f"{hardware.cpu_count()} cores", *versions, *shape, list(config.conv_dim), *labels]
    key = " · ".join(map(str, said))
    file = hardware.cache_folder() / TIMINGS_FILE
    try:
        known: dict[str, dict[str, float]] = json.loads(file.read_text())
    except (OSError, ValueError):
        known = {}
    if key not in known:
        known[key] = time_engines(engines)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            fresh = file.with_suffix(f".{os.getpid()}")
            fresh.write_text(json.dumps(known, ensure_ascii=False, indent=1))
            fresh.replace(file)
        except OSError:
            pass  # a read-only home only means measuring again
    return known[key]
