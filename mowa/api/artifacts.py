"""`mowa.merge`, `mowa.quantize` and `mowa.export`: other forms of a model, in memory or on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from mowa import quantization
from mowa.adapters import causal
from mowa.adapters import merge as merging
from mowa.api.models import load
from mowa.api.training import Run
from mowa.exporters import protocol
from mowa.quantization import calibration, schemes
from mowa.tasks.verbs import require_ctc
from mowa.types import AnyModel, Artifact, CausalModel, CTCModel

__all__ = ["export", "merge", "quantize"]

ModelT = TypeVar("ModelT", bound=AnyModel)
ProgressCallback = Callable[[float], object]


def merge(adapted: Run | str | Path | ModelT, *, dtype: str = "auto") -> ModelT:
    """Return a model whose adapter is merged into its weights. It needs no PEFT.

    Args:
        adapted: a run, an adapter's folder, or a model with an adapter; it does not change. A bottleneck adapter stays
            in layers of its own, as in transformers.
        dtype: of a language model's weights; auto: as they are.

    Raises: ModelError as `mowa.load`.
    """
    model: Any = resolve_model(adapted)
    if model.task == "ctc":
        return cast(ModelT, merging.merge_adapter(cast(CTCModel, model)))
    if dtype == "auto":
        dtype = str(model.net.dtype).removeprefix("torch.")
    return cast(ModelT, causal.merge_adapter(cast(CausalModel, model), dtype))


def quantize(
    model: Run | str | Path | AnyModel,
    scheme: str = "int8",
    *,
    calibration_data: str = "",
    calibration_split: str = "",
    on_progress: ProgressCallback = lambda fraction: None,
) -> AnyModel:
    """Return a copy of `model` whose weights are stored in `scheme`, with its adapter merged.

    Args:
        model: a model, or its name or folder as in `mowa.load`; it does not change.
        scheme: int8, int4, nf4, fp16, … with modifiers such as int4+gptq; see docs/quantize.md.
        calibration_data: recordings, for schemes that need them.
        on_progress: called with the fraction done.

    Raises:
        ModelError: an unknown scheme, or one that does not fit the model; DataError without calibration data.
    """
    loaded, parsed = resolve_model(model), schemes.parse_scheme(scheme)
    clips = None
    if calibration_data and schemes.calibration_reason(parsed):
        clips = calibration.load_clips(calibration_data, require_ctc(loaded, "calibration"), split=calibration_split)
    return quantization.quantize(loaded, parsed, clips, on_progress=on_progress)


def export(
    model: Run | str | Path | AnyModel,
    to: str,
    out: str | Path,
    *,
    scheme: str = "",
    adapter: str | Path | None = None,
    calibration_data: str = "",
    calibration_split: str = "",
    on_progress: ProgressCallback = lambda fraction: None,
    **options: Any,
) -> Artifact:
    """Write `model`, with its adapter, in the format `to` into the new folder `out`, and compare what was written.

    Args:
        model: a model, or its name or folder as in `mowa.load`; it does not change.
        to: onnx, safetensors, coreml, tensorrt or ctranslate2.
        scheme: quantize first; empty: as the model is.
        adapter: folder of an adapter to merge first.
        options: of the format, as in `mowa export --help`.

    Raises:
        ModelError: the format does not support the model or scheme, or the export differs from it: `out` is then not
            created. DataError: `out` exists, or the disk is full. MissingDependency: a package is not installed.
    """
    protocol.get_exporter(to).require_packages()
    loaded = load(model if isinstance(model, str | Path) else "", adapter=adapter) if adapter else resolve_model(model)
    if scheme:
        loaded = quantize(
            loaded,
            scheme,
            calibration_data=calibration_data,
            calibration_split=calibration_split,
            on_progress=on_progress,
        )
    return protocol.export(loaded, to, out, **options)


def resolve_model(model: Any) -> AnyModel:
    """Return a model: itself, that of a run, or the one with this name."""
    if isinstance(model, Run):
        return model.model
    return load(model) if isinstance(model, str | Path) else cast(AnyModel, model)
