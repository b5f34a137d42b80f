"""The engines by name: what each opens and can do. Other packages add engines by an entry point.

The entry point group is `mowa.engines`; each names an `EngineInfo`. Importing this module imports no engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mowa.errors import ModelError
from mowa.plugins import Registry

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Description of one engine.

    name             unique name, for `--engine`
    open             "module:function": (source, *, device, dtype, threads) → an `Engine`. `source` is the folder of an
                     export in one of `artifact_formats`; with the capability `models`, also a `CTCModel`, and then
                     with `from_disk` (see `selection`): unless it is true, the model must not change
    artifact_formats formats of exports that it opens
    capabilities     `models`: opens models that are not exported; `adapters`: has `with_adapter`; `emissions`:
                     log-probabilities of clips; `step`: has `chunk_step`, for cached streaming; `cache`: exports models
                     to the cache, and `open` takes `from_disk` (see `selection`)
    devices          devices without their index
    dtypes           values of `--dtype`, auto first
    open_cached      of engines with the capability `cache`: "module:function" with the arguments of `open`, which
                     returns the engine of a model whose export is in the cache, in a folder called as the engine, and
                     otherwise None
    """

    name: str
    open: str
    artifact_formats: tuple[str, ...]
    capabilities: frozenset[str] = frozenset({"emissions"})
    devices: tuple[str, ...] = ("cpu",)
    dtypes: tuple[str, ...] = (AUTO, "float32")
    open_cached: str = ""


ENGINES = Registry(
    "mowa.engines",
    "engine",
    EngineInfo,
    (
        EngineInfo(
            name="pytorch",
            open="mowa.engines.pytorch:open_engine",
            artifact_formats=("safetensors",),
            capabilities=frozenset({"models", "adapters", "emissions", "step"}),
            devices=("cpu", "cuda", "mps", "xpu"),
            dtypes=(AUTO, "float32", "bfloat16", "float16", "int8"),
        ),
        EngineInfo(
            name="onnx",
            open="mowa.engines.onnx:open_engine",
            artifact_formats=("onnx",),
            capabilities=frozenset({"models", "emissions", "step", "cache"}),
            dtypes=(AUTO, "float32", "int8"),
            open_cached="mowa.engines.onnx:open_cached_engine",
        ),
        EngineInfo(
            name="ctranslate2",
            open="mowa.engines.ctranslate2:open_engine",
            artifact_formats=("ctranslate2",),
            dtypes=(AUTO, "float32", "int8"),
        ),
    ),
)


def engine_choices() -> tuple[str, ...]:
    """Return the values of `--engine`: auto, and the names of all engines."""
    return (AUTO, *ENGINES.names())


def find_engine_of_format(export_format: str) -> EngineInfo | None:
    """Return the first engine that opens exports of this format, or None."""
    return next((one for one in ENGINES.all() if export_format in one.artifact_formats), None)


def validate_device_and_dtype(info: EngineInfo, device: str, dtype: str, *, export: Path | None = None) -> None:
    """Raise ModelError if the engine does not run on `device` (auto, cpu, cuda:1, …) or in `dtype`.

    `export` is the folder of the export that is to be run, which another engine cannot.
    """
    if device != AUTO and device.partition(":")[0] not in info.devices:
        devices = " and ".join(info.devices)
        if export is not None:
            raise ModelError(
                f"{export} is an export to {info.artifact_formats[0]}, which runs on {devices} only: omit --device, or"
                " name the original model"
            )
        raise ModelError(f"the {info.name} engine runs on {devices} only: omit --device, or use --engine pytorch")
    if dtype not in info.dtypes:
        raise ModelError(f"dtype {dtype!r} is not supported by the {info.name} engine: use {', '.join(info.dtypes)}")
