"""Select the engine that runs a model: the requested one, or the fastest one on this machine.

Engines are timed on two clips of noise after a warm-up; the timings are cached by CPU, package versions and the net's
shape. Only dtypes that keep the transcript are candidates: float32, and bfloat16 where the CPU computes in it
(`hardware.select_precision`, docs/speed.md). int8 and float16 must be requested.
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
from mowa.adapters.loading import load_adapter
from mowa.engines import onnx, pytorch
from mowa.engines.onnx import OnnxEngine
from mowa.engines.protocol import Engine
from mowa.engines.pytorch import PyTorchEngine
from mowa.engines.settings import ENGINES
from mowa.errors import ModelError
from mowa.exporters import manifest
from mowa.types import CTCModel

log = logging.getLogger("mowa")

EXTERNAL_FORMATS = {
    "coreml": "a Core ML package, which runs on Apple devices: see examples/run_coreml.py",
    "tensorrt": "a TensorRT export, which runs on a GPU with TensorRT: see examples/run_tensorrt.py",
}
TIMED_CLIPS_S = (2.0, 5.0)
ROUNDS = 3
TIMINGS_FILE = "engine_timings.json"


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """An engine, and the reason for choosing it in one line."""

    engine: Engine
    reason: str


def select_engine(
    model: CTCModel,
    *,
    name: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    adapter: str | Path | None = None,
) -> EngineChoice:
    """Return an engine that runs `model` in `dtype` on `device`, with the adapter in folder `adapter` if given.

    `name` is pytorch, onnx or auto. auto is PyTorch, unless an ONNX export of this model is in the cache (`--engine
    onnx` puts it there), supports the dtype and device, and is faster. The net may be converted in place.

    Raises ModelError for an unknown name and for a device or dtype that the engine does not support.
    """
    if name not in ENGINES:
        raise ModelError(f"unknown engine {name!r}: use {', '.join(ENGINES)}")
    if name == "onnx":
        _require_cpu(device)
        adapted = model if adapter is None else load_adapter(model, adapter)
        return _log_choice(onnx.open_engine(adapted, dtype=dtype, threads=threads), "onnx: requested")
    cached = _open_cached_export(model, device, dtype, threads, adapter) if name == "auto" else None
    torch_engine = pytorch.open_engine(model, device=device, dtype=dtype, threads=threads).with_adapter(adapter)
    if name == "pytorch":
        return _log_choice(torch_engine, f"pytorch, {torch_engine.dtype}: requested")
    if cached is None:
        reason = "GPU" if torch_engine.device != "cpu" else _dtype_reason(torch_engine, dtype)
        return _log_choice(torch_engine, f"pytorch, {torch_engine.dtype} on {torch_engine.device}: {reason}")
    seconds = _cached_timings([torch_engine, cached])
    fastest: PyTorchEngine | OnnxEngine = (
        cached if seconds[_label(cached)] < seconds[_label(torch_engine)] else torch_engine
    )
    timings = ", ".join(f"{label} {elapsed_s:.2f} s" for label, elapsed_s in seconds.items())
    audio_s = sum(TIMED_CLIPS_S)
    return _log_choice(fastest, f"{fastest.name}, {fastest.dtype}: fastest on {audio_s:.0f} s of audio ({timings})")


def open_artifact(
    folder: Path,
    *,
    name: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    adapter: str | Path | None = None,
) -> EngineChoice:
    """Return the engine of an export in a format other than safetensors.

    Raises ModelError for a format without an engine here, and for an engine, device or adapter it does not support.
    """
    export_format = manifest.read_artifact(folder).format
    if export_format in EXTERNAL_FORMATS:
        raise ModelError(f"{folder} is {EXTERNAL_FORMATS[export_format]}")
    if name not in ("auto", export_format):
        raise ModelError(
            f"{folder} is an export to {export_format} and cannot run with --engine {name}: omit --engine, or name the"
            " original model"
        )
    if adapter is not None:
        raise ModelError(
            f"{folder} is an export and takes no adapter: use `mowa export --adapter` on the original model"
        )
    _require_cpu(device)
    if export_format == "onnx":
        return _log_choice(onnx.open_engine(folder, dtype=dtype, threads=threads), "onnx: format of the export")
    from mowa.engines import ctranslate2

    engine = ctranslate2.open_engine(folder, dtype=dtype, threads=threads)
    return _log_choice(engine, f"{export_format}: format of the export")


def _log_choice(engine: Engine, reason: str) -> EngineChoice:
    log.info("engine: %s", reason)
    return EngineChoice(engine, reason)


def _require_cpu(device: str) -> None:
    if device not in ("auto", "cpu"):
        raise ModelError(f"this engine runs on the CPU only: omit --device, or use --engine pytorch on {device}")


def _dtype_reason(engine: PyTorchEngine, dtype: str) -> str:
    if engine.dtype == "int8" and dtype == "auto":
        return f"the model's scheme is {engine.model.scheme.name}"
    if dtype != "auto":
        return "dtype requested, no ONNX export of this model in the cache"
    if engine.dtype == "float32":
        return f"bfloat16 is less than {hardware.MIN_BFLOAT16_SPEEDUP} times as fast on this CPU"
    return f"more than {hardware.MIN_BFLOAT16_SPEEDUP} times as fast as float32 on this CPU"


def _open_cached_export(
    model: CTCModel, device: str, dtype: str, threads: int | None, adapter: str | Path | None
) -> OnnxEngine | None:
    """Return the model's ONNX export in the cache if it is a candidate. Call it before the net is converted."""
    import torch

    if device not in ("auto", "cpu") or (device == "auto" and torch.cuda.is_available()) or dtype not in onnx.DTYPES:
        return None
    if not any((hardware.cache_folder() / "onnx").glob("*")):
        return None  # avoids hashing the weights
    adapted = model if adapter is None else load_adapter(model, adapter)
    folder = onnx.cache_path(adapted, dtype)
    if not folder.is_dir():
        return None
    try:
        return onnx.open_engine(folder, threads=threads)
    except ModelError as error:
        log.warning("%s", error)
        return None


def time_engines(engines: list[Any]) -> dict[str, float]:
    """Return label → seconds for the noise clips: the minimum over ROUNDS interleaved rounds."""
    rng = np.random.default_rng(0)
    clips = [rng.standard_normal(int(s * 16_000)).astype(np.float32) for s in TIMED_CLIPS_S]
    elapsed_s: dict[str, list[float]] = {_label(one): [] for one in engines}
    for round_ in range(ROUNDS + 1):
        for one in engines:
            started_s = time.perf_counter()
            for clip in clips:
                one.emissions([clip])
            if round_:  # the first one is the warm-up
                elapsed_s[_label(one)].append(time.perf_counter() - started_s)
    return {label: min(rounds) for label, rounds in elapsed_s.items()}


def _label(one: Engine) -> str:
    return f"{one.name} {one.dtype}"


def _cached_timings(engines: list[Any]) -> dict[str, float]:
    """Return `time_engines`, from the cache where these engines were timed on this machine before."""
    config = engines[0].config
    shape = [config.model_type, config.hidden_size, config.intermediate_size, config.num_hidden_layers]
    versions = [f"{package} {hardware.installed_version(package)}" for package in ("mowa", "torch", "onnxruntime")]
    labels = [_label(one) for one in engines]
    parts = [hardware.cpu_name(), f"{hardware.cpu_count()} cores", *versions, *shape, list(config.conv_dim), *labels]
    key = " · ".join(map(str, parts))
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
            pass  # in a read-only cache folder the engines are timed again
    return known[key]
