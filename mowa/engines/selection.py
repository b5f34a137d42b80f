"""Select the engine that runs a model: the requested one, or the fastest one on this machine.

Engines are timed on two clips of noise after a warm-up; the timings are cached by CPU, package versions and the net's
shape. Only dtypes that keep the transcript are candidates: float32, and bfloat16 where the CPU computes in it
(`hardware.select_precision`, docs/speed.md). int8 and float16 must be requested.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mowa import hardware
from mowa.adapters.loading import load_adapter
from mowa.engines.protocol import Engine
from mowa.engines.registry import (
    AUTO,
    ENGINES,
    EngineInfo,
    find_engine_of_format,
    validate_device_and_dtype,
)
from mowa.errors import ModelError
from mowa.exporters import manifest
from mowa.exporters.registry import FORMATS
from mowa.io.atomic import read_json_cache, update_json_cache
from mowa.plugins import import_function
from mowa.types import CTCModel

log = logging.getLogger("mowa")

DEFAULT_ENGINE = "pytorch"
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
    name: str = AUTO,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    adapter: str | Path | None = None,
    from_disk: bool = False,
) -> EngineChoice:
    """Return an engine that runs `model` in `dtype` on `device`, with the adapter in folder `adapter` if given.

    Args:
        name: an engine that opens models, or auto: PyTorch, unless an export of this model is in the cache (`--engine
            onnx` puts it there), supports the dtype and device, and is faster.
        from_disk: the model was loaded by name for this engine and has not changed since: its net may be converted in
            place, and its export in the cache is found by the checksums of its files. Otherwise its weights are
            copied where they need another dtype, and hashed, which finds what changed in memory too.

    Raises ModelError for an unknown name and for a device or dtype that the engine does not support.
    """
    info = ENGINES.get(DEFAULT_ENGINE if name == AUTO else name)
    if "models" not in info.capabilities:
        formats = " or ".join(info.artifact_formats)
        raise ModelError(
            f"the {name} engine runs exports only: `mowa export --to {formats}` {model.origin.name} first, or omit"
            " --engine"
        )
    validate_device_and_dtype(info, device, dtype)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "threads": threads}
    cached = _open_cached(model, options, adapter, from_disk) if name == AUTO else None
    engine = _open(info, model, options, adapter, from_disk)
    if name != AUTO:
        return _log_choice(engine, f"{name}, {engine.dtype}: requested")
    if cached is None:
        reason = "GPU" if engine.device != "cpu" else _dtype_reason(engine, model, dtype)
        return _log_choice(engine, f"{engine.name}, {engine.dtype} on {engine.device}: {reason}")
    seconds = _cached_timings([engine, cached])
    fastest = cached if seconds[_label(cached)] < seconds[_label(engine)] else engine
    timings = ", ".join(f"{label} {elapsed_s:.2f} s" for label, elapsed_s in seconds.items())
    audio_s = sum(TIMED_CLIPS_S)
    return _log_choice(fastest, f"{fastest.name}, {fastest.dtype}: fastest on {audio_s:.0f} s of audio ({timings})")


def open_artifact(
    folder: Path,
    *,
    name: str = AUTO,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    adapter: str | Path | None = None,
) -> EngineChoice:
    """Return the engine of an export, the one in the registry that opens its format.

    Raises ModelError for a format without an engine here, and for an engine, device or adapter it does not support.
    """
    export_format = manifest.read_artifact(folder).format
    info = find_engine_of_format(export_format) if name == AUTO else ENGINES.get(name)
    if info is None:
        raise ModelError(f"{folder} is {describe_format(export_format)}")
    if export_format not in info.artifact_formats:
        raise ModelError(
            f"{folder} is an export to {export_format} and cannot run with --engine {name}: omit --engine, or name the"
            " original model"
        )
    if adapter is not None:
        raise ModelError(
            f"{folder} is an export and takes no adapter: use `mowa export --adapter` on the original model"
        )
    validate_device_and_dtype(info, device, dtype, export=folder)
    engine = import_function(info.open)(folder, device=device, dtype=dtype, threads=threads)
    return _log_choice(engine, f"{info.name}: format of the export")


def describe_format(export_format: str) -> str:
    """Return what an export in this format is and what runs it, to follow "FOLDER is"."""
    if find_engine_of_format(export_format) is not None:
        return f"an export to {export_format}, which mowa.transcribe(audio, model=FOLDER) runs"
    known = FORMATS.find(export_format)
    return known.runs if known and known.runs else f"an export to {export_format}, for which there is no engine here"


def _open(
    info: EngineInfo, model: CTCModel, options: dict[str, Any], adapter: str | Path | None, from_disk: bool
) -> Any:
    """Open the engine of a model with an adapter: the engine's own way, or else loaded over the model before."""
    options = options | {"from_disk": from_disk}
    opened = import_function(info.open)
    if adapter is None:
        return opened(model, **options)
    if "adapters" in info.capabilities:
        return opened(model, **options).with_adapter(adapter)
    return opened(load_adapter(model, adapter), **options)


def _open_cached(
    model: CTCModel, options: dict[str, Any], adapter: str | Path | None, from_disk: bool
) -> Engine | None:
    """Return an engine whose export of the model is in the cache. Call it before the net is converted."""
    import torch

    device, dtype = options["device"], options["dtype"]
    if device == "auto" and torch.cuda.is_available():
        return None
    for info in ENGINES.all():
        fits = device in ("auto", *info.devices) and dtype in info.dtypes
        if fits and info.open_cached and (hardware.cache_folder() / info.name).is_dir():
            adapted = model if adapter is None else load_adapter(model, adapter)
            engine: Engine | None = import_function(info.open_cached)(adapted, **options, from_disk=from_disk)
            if engine is not None:
                return engine
    return None


def _log_choice(engine: Engine, reason: str) -> EngineChoice:
    log.info("engine: %s", reason)
    return EngineChoice(engine, reason)


def _dtype_reason(engine: Engine, model: CTCModel, dtype: str) -> str:
    if engine.dtype == "int8" and dtype == "auto":
        return f"the model's scheme is {model.scheme.name}"
    if dtype != "auto":
        return "dtype requested, no ONNX export of this model in the cache"
    if engine.dtype == "float32":
        return f"bfloat16 is less than {hardware.MIN_BFLOAT16_SPEEDUP} times as fast on this CPU"
    return f"more than {hardware.MIN_BFLOAT16_SPEEDUP} times as fast as float32 on this CPU"


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
    known: dict[str, dict[str, float]] = read_json_cache(file)
    if key not in known:
        known[key] = time_engines(engines)
        update_json_cache(file, {key: known[key]})
    return known[key]
