"""Export CTC models to Core ML as an mlprogram, for inputs of a few fixed lengths.

The folder holds `model.mlpackage`, itself a folder.

- inputs: `input_values` float32 [1, N], normalized as the audio settings say and then padded with zeros to one of the
  exported lengths; for models with layer norm in the feature extractor also `samples` int32 [1], the length without
  padding.
- output: `logits` float32 [1, T, V]. The first (samples - receptive_field) // hop + 1 frames are valid.

Lengths are enumerated, because Core ML returns NaN for a range of them (github.com/apple/coremltools, issue 2166).
float32 models compute in float32, which Apple's Neural Engine does not support. Others compute in float16, except norms
whose inputs are so large that their squares could overflow. Integer weights are stored quantized.

Core ML runs on macOS only. Here the written program is compared with the net by the interpreter in `check`, which shows
that it is correct, but not how Apple's devices round.
"""

from __future__ import annotations

import copy
import io
import logging
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mowa.data import audio
from mowa.errors import ModelError
from mowa.exporters import verify
from mowa.exporters.coreml import check
from mowa.exporters.coreml import net as nets
from mowa.exporters.manifest import ExportResult
from mowa.exporters.onnx.exporter import collect_metadata, silence_exporter
from mowa.exporters.prepare import prepare_for_export
from mowa.io.hub import SAMPLE_CLIP
from mowa.models.ctc_encoder import anatomy
from mowa.models.ctc_encoder.geometry import frame_geometry
from mowa.models.diff import ModelDiff, compare
from mowa.types import CTCModel

log = logging.getLogger("mowa")

PACKAGE = "model.mlpackage"
DEFAULT_LENGTHS_S = (5.0, 10.0, 20.0)
MAX_FP16_NORM_INPUT = 128.0  # its square is a quarter of the largest float16
NORM_SAMPLE_S = 10
MINIMUM_OS = {"iOS16": "iOS 16 or macOS 13", "iOS17": "iOS 17 or macOS 14", "iOS18": "iOS 18 or macOS 15"}
UNSUPPORTED_SCHEMES = {
    "bfloat16": "Core ML has no bfloat16; use fp16",
    "nf4": "Core ML's lookup tables have no scale per group; use int4-weight",
}
NOT_RUN = "Core ML was not run, because it needs macOS"


def unsupported_reason(model: CTCModel) -> str:
    """See `Exporter.unsupported_reason`."""
    if reason := anatomy.unsupported_reason(model.net, "coreml"):
        return f"{reason}; use onnx"
    if getattr(model.net.config, "add_adapter", False):
        return "convolutional adapters (add_adapter) are not supported; use onnx"
    return UNSUPPORTED_SCHEMES.get(model.scheme.weights, "")


def write(model: CTCModel, folder: Path, *, lengths_s: Sequence[float] = DEFAULT_LENGTHS_S) -> ExportResult:
    """See `Exporter.write`. `lengths_s`: the input lengths of the program, in seconds.

    Tolerances are those of `verify_tolerance`. With int8-dynamic and mixed, inputs are not quantized, because Core ML
    has no dynamic quantization.
    """
    reference, half = prepare_for_export(model, dequantize=True), model.scheme.weights != "float32"
    lengths = _convert_lengths(reference.config, model.preprocessing.rate_hz, lengths_s)
    takes_mask, target = anatomy.read_anatomy(reference).is_padding_exact, _minimum_target(model)
    float32_norms = _find_large_norms(model, reference) if half else []
    graph = nets.prepare_for_coreml(
        prepare_for_export(model), lengths, per_group_scales=target == "iOS18", float32_norms=float32_norms
    )
    geometry = frame_geometry(reference.config)
    details = {
        "model": PACKAGE,
        "lengths": lengths,
        "attention_mask": takes_mask,
        "receptive_field": geometry.receptive_field,
        "hop": geometry.hop,
        "compute_dtype": "float16" if half else "float32",
        "activations": "static" if model.scheme.activations == "static" else "none",
        "float32_norms": float32_norms,
        "minimum_os": MINIMUM_OS[target],
    }
    with _silence_coremltools():
        program = _convert(graph, model.origin.name, lengths, takes_mask, target, half)
        _set_metadata(program, model, details)
        program.save(str(folder / PACKAGE))
        del program, graph
        diff, unverified_reason = _compare(model, reference, folder / PACKAGE, lengths, takes_mask)
    if diff is not None:
        verify.verify_tolerance(model, "Core ML", diff)
    if not takes_mask:
        log.warning(
            "%s has no attention mask: padding changes the last tokens of recordings that are not exactly %s s long",
            *(model.origin.name, ", ".join(f"{length / model.preprocessing.rate_hz:g}" for length in lengths)),
        )
    files = [file for file in sorted((folder / PACKAGE).rglob("*")) if file.is_file()]
    names = tuple(file.relative_to(folder).as_posix() for file in files)
    largest, agreement = (diff.max_abs_diff, diff.agreement) if diff else (None, None)
    return ExportResult(
        reference.config, names, details, largest, agreement, unverified_reason, packages=("coremltools",)
    )


def _convert_lengths(config: Any, rate_hz: int, lengths_s: Sequence[float]) -> list[int]:
    """Return the lengths in samples, sorted."""
    lengths = sorted({round(length_s * rate_hz) for length_s in lengths_s})
    min_length = frame_geometry(config).receptive_field
    if not lengths or lengths[0] < min_length:
        min_s = min_length / rate_hz
        raise ModelError(f"input lengths must be at least {min_s} s, such as 5, 10 and 20; got {list(lengths_s)}")
    return lengths


def _minimum_target(model: CTCModel) -> str:
    """Return the oldest deployment target with per-group scales or int8 inputs, if the scheme needs them."""
    if model.scheme.weights in ("int4", "mixed"):
        return "iOS18"
    return "iOS17" if model.scheme.activations == "static" else "iOS16"


@torch.inference_mode()
def _find_large_norms(model: CTCModel, net: Any) -> list[str]:
    """Return the layer norms whose inputs exceed `MAX_FP16_NORM_INPUT` on the bundled sample."""
    large: set[str] = set()

    def check_input(name: str, x: torch.Tensor) -> None:
        if float(x.abs().max()) > MAX_FP16_NORM_INPUT:
            large.add(name)

    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: check_input(name, args[0]))
        for name, module in net.named_modules()
        if isinstance(module, nn.LayerNorm)
    ]
    net(torch.from_numpy(_speech(model, NORM_SAMPLE_S * model.preprocessing.rate_hz))[None])
    for hook in hooks:
        hook.remove()
    return sorted(large)


def _speech(model: CTCModel, length: int) -> np.ndarray:
    """Return the bundled sample, repeated to `length` samples and preprocessed, float32 [length]."""
    clip = audio.load_audio(SAMPLE_CLIP, model.preprocessing.rate_hz)
    return audio.preprocess(np.resize(clip, length).astype(np.float32), model.preprocessing)


def _convert(graph: nn.Module, name: str, lengths: Sequence[int], takes_mask: bool, target: str, half: bool) -> Any:
    """Convert a net to an `MLModel`. Raises ModelError if Core ML lacks an operator or the conversion fails."""
    ct = import_module("coremltools")
    types = import_module("coremltools.converters.mil.mil.scope").ScopeSource.TORCHSCRIPT_MODULE_TYPE
    shapes = [(1, length) for length in lengths]
    shape = ct.EnumeratedShapes(shapes, default=shapes[0]) if len(shapes) > 1 else shapes[0]
    inputs, examples = [ct.TensorType("input_values", shape=shape, dtype=np.float32)], [torch.zeros(shapes[0])]
    if takes_mask:
        inputs.append(ct.TensorType("samples", shape=(1,), dtype=np.int32))
        examples.append(torch.tensor([lengths[0]], dtype=torch.int32))
    float16 = ct.transform.FP16ComputePrecision(lambda op: nets.Float32Module.__name__ not in op.scopes.get(types, ()))
    try:
        with torch.no_grad():
            traced = torch.jit.trace(graph, tuple(examples), check_trace=False)
        return ct.convert(
            traced,
            inputs=inputs,
            outputs=[ct.TensorType("logits", dtype=np.float32)],
            convert_to="mlprogram",
            compute_precision=float16 if half else ct.precision.FLOAT32,
            minimum_deployment_target=getattr(ct.target, target),
            skip_model_load=True,
        )
    except Exception as error:  # coremltools has no exception types of its own
        traceback.clear_frames(error.__traceback__)  # they hold a temporary folder
        if missing := re.search(r"op '(\S+)' not implemented", str(error)):
            raise ModelError(f"Core ML does not support {missing[1]}, which {name} needs: use onnx") from error
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"coremltools cannot convert {name}: {reason}; use onnx") from error


def _set_metadata(program: Any, model: CTCModel, details: dict[str, Any]) -> None:
    """Add the metadata that suffices to run the package without the other files."""
    program.short_description = f"Speech recognition: {model.origin.name} ({model.family.name}, {model.scheme.name})"
    program.license = model.origin.license or ""
    sizes = {name: str(details[name]) for name in ("receptive_field", "hop")}
    program.user_defined_metadata.update(collect_metadata(model, details["attention_mask"]) | sizes)


@torch.inference_mode()
def _compare(
    model: CTCModel, net: Any, package: Path, lengths: Sequence[int], takes_mask: bool
) -> tuple[ModelDiff | None, str]:
    """Compare the program with the net, and return what was not compared as the second value.

    Every length is compared with speech that fills it and, with a mask, with two thirds of it and with a single frame.
    A float32 program and the net are both computed in float64: in float32 their rounding errors, which depend on the
    processor, may exceed the tolerance (pl-tiny's do, at 30 s).
    """
    program = check.open_program(package)
    compute_dtype = torch.float64 if model.scheme.weights == "float32" else torch.float32
    exact_net = copy.deepcopy(net).double() if compute_dtype is torch.float64 else net
    min_length = frame_geometry(net.config).receptive_field
    logits: list[torch.Tensor] = []
    reference: list[torch.Tensor] = []
    for length in lengths:
        valid_lengths = (length, max(length * 2 // 3, min_length), min_length) if takes_mask else (length,)
        for valid in dict.fromkeys(valid_lengths):
            clip = torch.from_numpy(_speech(model, valid))[None]
            inputs = {"input_values": nn.functional.pad(clip, (0, length - valid)), "samples": torch.tensor([valid])}
            reference.append(exact_net(clip.to(exact_net.dtype)).logits[0])
            try:
                logits.append(check.run_program(program, inputs, compute_dtype)["logits"][0, : len(reference[-1])])
            except check.UnsupportedOperator as operator:
                return None, f"{NOT_RUN}; mowa's interpreter does not support {operator}"
    return compare(reference, logits), f"{NOT_RUN}; its operators were computed by torch"


@contextmanager
def _silence_coremltools() -> Iterator[None]:
    """Suppress progress bars and warnings of coremltools within the context; errors are raised."""
    loggers = [logging.getLogger(name) for name in ("coremltools", "torchao")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with silence_exporter(), redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
