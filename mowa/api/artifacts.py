"""Merge adapters, quantize models and export them: `mowa.merge`, `mowa.quantize` and `mowa.export`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, overload

from mowa import quantization
from mowa.adapters.loading import is_adapter, merge_adapter, read_base_name
from mowa.api.models import Run, can_stay_on_disk, load, resolve_model
from mowa.engines import llama_cpp
from mowa.errors import ModelError
from mowa.exporters import merged, protocol
from mowa.exporters.gguf.lora import read_layers
from mowa.exporters.gguf.verify import RUNTIME_TOP
from mowa.exporters.merged import OnComparison
from mowa.exporters.registry import FORMATS
from mowa.loading.checkpoint import validate_dtype
from mowa.models.tolerances import MAX_ABS_DIFF
from mowa.quantization import calibration, schemes
from mowa.tasks.verbs import require_ctc
from mowa.types import AnyModel, Artifact, Model, Scheme

__all__ = ["export", "merge", "quantize"]

ModelT = TypeVar("ModelT", bound=AnyModel)
ProgressCallback = Callable[[float], object]
StageCallback = Callable[[str, float], object]


@overload
def merge(adapted: ModelT, *, out: None = ..., dtype: str = ...) -> ModelT: ...
@overload
def merge(
    adapted: Run | str | Path,
    *,
    out: str | Path | None = ...,
    dtype: str = ...,
    base_model: str | None = ...,
    audio_files: Sequence[str | Path] = ...,
    data: Sequence[str] = ...,
    tolerance: float = ...,
    offline: bool = ...,
    on_comparison: OnComparison = ...,
) -> AnyModel: ...
def merge(
    adapted: Run | str | Path | AnyModel,
    *,
    out: str | Path | None = None,
    dtype: str = "auto",
    base_model: str | None = None,
    audio_files: Sequence[str | Path] = (),
    data: Sequence[str] = (),
    tolerance: float = MAX_ABS_DIFF,
    offline: bool = False,
    on_comparison: OnComparison = lambda label, diff: None,
) -> AnyModel:
    """Return a model whose adapter is merged into its weights; with `out`, write it as a checkpoint too.

    Args:
        adapted: a run, an adapter's folder, or a model with an adapter; it does not change. A bottleneck adapter stays
            in layers of its own, as in transformers.
        out: folder to create; `adapted` is then a run or a folder. The checkpoint is loaded again and compared with
            base model plus adapter before it is kept.
        dtype: dtype of a language model's weights; auto: as they are stored.
        base_model: with `out`, the base model, if it is not where the adapter recorded it.
        audio_files, tolerance: with `out`, recordings to compare a speech model on (none: the bundled sample), and the
            largest difference of a log-probability, in nats.
        data: with `out`, files to compare a language model on; none: the data that the run held out.
        offline: with `out`, use cached files only.
        on_comparison: called with what was compared and a `ModelDiff`.

    Raises:
        ModelError: as `mowa.load`, or the checkpoint differs, and `out` is not created.
        DataError: `out` exists.
    """
    if dtype != "auto":
        validate_dtype(dtype)
    if out is None:
        if base_model or audio_files or data or offline:
            raise ModelError("merge: base_model, audio_files, data and offline need out=FOLDER")
        return merge_adapter(resolve_model(adapted), dtype)
    if isinstance(adapted, Model):
        raise ModelError("merge: to write a checkpoint, name the folder of the run or adapter instead of a model")
    if not isinstance(adapted, Run | str | Path):
        raise ModelError(f"merge: expected a run or the folder of an adapter, not {type(adapted).__name__}")
    merged.write_merged(
        adapted.folder if isinstance(adapted, Run) else Path(adapted),
        Path(out),
        base_model=base_model,
        dtype=dtype,
        audio_files=audio_files,
        data=data,
        tolerance=tolerance,
        offline=offline,
        on_comparison=on_comparison,
    )
    return load(out)


def quantize(
    model: Run | str | Path | AnyModel,
    scheme: str | Scheme = "int8",
    *,
    calibration_data: str = "",
    calibration_split: str = "",
    on_progress: ProgressCallback = lambda fraction: None,
) -> AnyModel:
    """Return a copy of `model` whose weights are stored in `scheme`, with its adapter merged.

    Args:
        model: a model, or its name or folder as in `mowa.load`; it does not change.
        scheme: int8, int4, nf4, fp16, … with modifiers such as int4+gptq, or a `Scheme`; see docs/quantize.md.
        calibration_data: recordings, for the schemes of speech models that need them.
        on_progress: called with the fraction done.

    Raises:
        ModelError: an unknown scheme, or one that does not fit the model; DataError without calibration data.
    """
    if not isinstance(scheme, str | Scheme):
        raise ModelError(f"scheme: expected a name such as int8, or a Scheme, not {type(scheme).__name__}")
    loaded = resolve_model(model)
    parsed, clips = schemes.parse_scheme(scheme, loaded.task) if isinstance(scheme, str) else scheme, None
    if calibration_data and schemes.calibration_reason(parsed):
        clips = calibration.load_clips(calibration_data, require_ctc(loaded, "calibration"), split=calibration_split)
    return quantization.quantize(loaded, parsed, clips, on_progress=on_progress)


def export(
    model: Run | str | Path | AnyModel,
    to: str,
    out: str | Path,
    *,
    scheme: str | Sequence[str] = "",
    adapter: str | Path | None = None,
    revision: str | None = None,
    target_lang: str | None = None,
    offline: bool = False,
    calibration_data: str = "",
    calibration_split: str = "",
    on_progress: StageCallback = lambda stage, fraction: None,
    **options: Any,
) -> Artifact:
    """Write `model`, with its adapter, in the format `to` into the new folder `out`, and compare what was written.

    Args:
        model: a model, or its name or folder as in `mowa.load`; it does not change.
        to: a format in `exporters.registry`: onnx, safetensors, coreml, tensorrt, ctranslate2, gguf, or that of a
            package.
        out: folder to create; of gguf, the name of the only file to write may stand for it.
        scheme: quantize first; empty: as the model is. gguf has schemes of its own, such as q4_k_m, and writes one file
            for each.
        adapter: folder of an adapter to merge first.
        revision, target_lang, offline: as in `mowa.load`, if `model` is a name.
        on_progress: called with a stage and the fraction of it that is done.
        options: options of the format, as in `mowa export --help`.

    Raises:
        ModelError: the format does not support the model or scheme, or the export differs from it: `out` is then not
            created. DataError: `out` exists, or the disk is full. MissingDependency: a package is not installed.
    """
    protocol.require_packages(to)
    names = (scheme,) if isinstance(scheme, str) else tuple(scheme)
    if FORMATS.get(to).schemes:
        if calibration_data or calibration_split:
            raise ModelError(f"{to} takes no calibration_data: name a text or a matrix as imatrix")
        return _export_schemes(
            model,
            to,
            out,
            tuple(filter(None, names)),
            {"adapter": adapter, "revision": revision, "target_lang": target_lang, "offline": offline},
            {**options, "on_progress": on_progress},
        )
    if len(names) > 1:
        raise ModelError(f"{to} is written in one scheme at a time, not {len(names)}: {', '.join(names)}")
    scheme = "".join(names)
    if scheme:
        schemes.parse_scheme(scheme)
    loaded = resolve_model(model, adapter=adapter, revision=revision, target_lang=target_lang, offline=offline)
    if scheme:
        loaded = quantize(
            loaded,
            scheme,
            calibration_data=calibration_data,
            calibration_split=calibration_split,
            on_progress=lambda fraction: on_progress(f"{scheme}: quantizing", fraction),
        )
    return protocol.export(loaded, to, out, **options)


def _export_schemes(
    model: Run | str | Path | AnyModel,
    to: str,
    out: str | Path,
    names: tuple[str, ...],
    origin: dict[str, Any],
    options: dict[str, Any],
) -> Artifact:
    """Export to a format with schemes of its own. The weights of a checkpoint that is named are not loaded."""
    known = FORMATS.get(to).schemes
    if unknown := [name for name in names if name.lower() not in known]:
        raise ModelError(f"{to} has no scheme {unknown[0]!r}: choose from {', '.join(known)}")
    if names:
        options = {**options, "schemes": names}
    if to == "gguf" and llama_cpp.find_runtime():
        options = {**options, "runtimes": {"llama.cpp": partial(llama_cpp.score, top=RUNTIME_TOP)}}
    base, adapter = model, origin["adapter"]
    if isinstance(model, str | Path) and adapter is None and is_adapter(Path(model)):
        base, adapter = read_base_name(Path(model)), model
    if options.get("adapter_only"):
        if adapter is None or not isinstance(base, str | Path):
            raise ModelError("adapter_only: name the folder of an adapter, as the model or as adapter")
        read_layers(Path(adapter))
    if isinstance(base, str | Path) and can_stay_on_disk(base, adapter, origin["revision"], offline=origin["offline"]):
        loaded = load(base, device="meta", accelerate=False, revision=origin["revision"], offline=origin["offline"])
        options = options if adapter is None else {**options, "adapter": adapter}
    else:
        loaded = resolve_model(model, **origin)
    return protocol.export(loaded, to, out, **options)
