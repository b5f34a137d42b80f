"""A CTC net as an mlprogram for Apple's Core ML, for recordings of a few lengths; read again and compared with the net.

A folder holds `model.mlpackage`, itself a folder, and what `manifest` writes.

- inputs: `input_values` float32 [1, N], normalised as the audio settings say and then padded with zeros to one of the
  lengths that were asked for; where front ends let a mask keep padding out, `samples` int32 [1]: so many of the N are
  sound.
- output: `logits` float32 [1, T, V]. Of n samples the first (n - reach) // hop + 1 frames count.

Lengths are enumerated: with a range of them Core ML was seen to give NaN (github.com/apple/coremltools, issue 2166).
float32 is computed in float32, which Apple's Neural Engine has not. All else is computed in float16, but for norms
whose inputs are so large that their squares might not fit. Weights in integers are kept in their own codes, which Core
ML makes wide.

Prediction needs macOS. What is compared here is the program on disk, its operators computed by `coreml_check`: so what
is written is right, and how Apple's devices round it is not known. Who runs the folder is not known either.
"""

from __future__ import annotations

import copy
import io
import logging
import math
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
from mowa.errors import MissingDependency, ModelError
from mowa.exporters import verify
from mowa.exporters.coreml import check
from mowa.exporters.coreml import net as nets
from mowa.exporters.manifest import ExportResult
from mowa.exporters.onnx.exporter import collect_metadata, silence_exporter
from mowa.exporters.prepare import prepare_for_export
from mowa.models.ctc_encoder.chunk_mask import receptive_field
from mowa.types import Model

log = logging.getLogger("mowa")

PACKAGE = "model.mlpackage"
DEFAULT_SECONDS = (5.0, 10.0, 20.0)
SUPPORTED_NETS = ("Wav2Vec2ForCTC", "HubertForCTC", "WavLMForCTC")
MAX_FP16_NORM_INPUT = 128.0  # what a norm may see in float16: its square is a quarter of where that ends
NORM_SAMPLE_S = 10
MINIMUM_OS = {"iOS16": "iOS 16 or macOS 13", "iOS17": "iOS 17 or macOS 14", "iOS18": "iOS 18 or macOS 15"}
UNSUPPORTED_SCHEMES = {
    "bfloat16": "Core ML has no bfloat16; use fp16",
    "nf4": "Core ML's tables of levels have no step for each block of a row; use int4-weight",
}
NOT_RUN = "Core ML itself was not run, as it needs macOS"


def unsupported_reason(model: Model) -> str:
    """As `Exporter.can`."""
    name = type(model.net).__name__
    if name not in SUPPORTED_NETS:
        return f"only {', '.join(SUPPORTED_NETS)} are written so, not {name}; use onnx"
    if getattr(model.net.config, "add_adapter", False):
        return "its net has convolutions over its last frames; use onnx"
    return UNSUPPORTED_SCHEMES.get(model.scheme.weights, "")


def require_packages() -> None:
    """MissingPart where what exporting needs is not installed."""
    with _hushed():
        try:
            import_module("coremltools")
        except ImportError:
            raise MissingDependency("Core ML needs coremltools: pip install 'mowa[coreml]'") from None


def write(model: Model, folder: Path, *, seconds: Sequence[float] = DEFAULT_SECONDS) -> tuple[Any, ExportResult]:
    """As `Exporter.write`. `seconds`: the lengths of recordings that the program takes.

    float32 must say what the net says, and anything narrower must find the same output likeliest in 80 % of frames. Of
    int8-dynamic and mixed, inputs stay wide: Core ML finds no ranges as it goes.
    """
    wide, half = prepare_for_export(model, dequantize=True), model.scheme.weights != "float32"
    lengths = _lengths(wide.config, model.preprocessing.rate_hz, seconds)
    masked, system = wide.config.feat_extract_norm == "layer", _system(model)
    loud = _loud(model, wide) if half else []
    graph = nets.prepare_for_coreml(
        prepare_for_export(model), lengths, per_group_scales=system == "iOS18", float32_norms=loud
    )
    details = {
        "model": PACKAGE,
        "lengths": lengths,
        "masked": masked,
        "reach": receptive_field(wide.config),
        "hop": math.prod(wide.config.conv_stride),
        "computes": "float16" if half else "float32",
        "activations": "static" if model.scheme.activations == "static" else "none",
        "in_float32": loud,
        "needs": MINIMUM_OS[system],
    }
    with _hushed():
        made = _converted(graph, model.origin.name, lengths, masked, system, half)
        _describe(made, model, details)
        made.save(str(folder / PACKAGE))
        del made, graph
        farthest, agreeing, unchecked = _compared(model, wide, folder / PACKAGE, lengths, masked)
    if farthest is not None and agreeing is not None:
        verify.verify_tolerance(model, "Core ML", farthest, agreeing)
    if not masked:
        log.warning(
            "the front end of %s hears padding: recordings that are not of %s s may get other letters at their ends",
            *(model.origin.name, ", ".join(f"{length / model.preprocessing.rate_hz:g}" for length in lengths)),
        )
    files = [file for file in sorted((folder / PACKAGE).rglob("*")) if file.is_file()]
    names = tuple(file.relative_to(folder).as_posix() for file in files)
    return wide, ExportResult(names, details, farthest, agreeing, unchecked, packages=("coremltools",))


def _lengths(config: Any, rate_hz: int, seconds: Sequence[float]) -> list[int]:
    lengths = sorted({round(one * rate_hz) for one in seconds})
    if not lengths or lengths[0] < receptive_field(config):
        least = receptive_field(config) / rate_hz
        raise ModelError(f"lengths of recordings are {least} s or more, such as 5, 10 and 20; not {list(seconds)}")
    return lengths


def _system(model: Model) -> str:
    """The oldest systems that have what is needed: weights in groups, or inputs in eight bits."""
    if model.scheme.weights in ("int4", "mixed"):
        return "iOS18"
    return "iOS17" if model.scheme.activations == "static" else "iOS16"


@torch.inference_mode()
def _loud(model: Model, net: Any) -> list[str]:
    """The norms whose inputs are so large in the bundled sample that float16 might not hold their squares."""
    found: set[str] = set()

    def look(name: str, x: torch.Tensor) -> None:
        if float(x.abs().max()) > MAX_FP16_NORM_INPUT:
            found.add(name)

    hooks = [
        module.register_forward_pre_hook(lambda _, given, name=name: look(name, given[0]))
        for name, module in net.named_modules()
        if isinstance(module, nn.LayerNorm)
    ]
    net(torch.from_numpy(_speech(model, NORM_SAMPLE_S * model.preprocessing.rate_hz))[None])
    for hook in hooks:
        hook.remove()
    return sorted(found)


def _speech(model: Model, length: int) -> np.ndarray:
    """The bundled sample, over and over, as the net hears it."""
    whole = audio.load_audio(verify.SAMPLE, model.preprocessing.rate_hz)
    return verify.preprocess(model, np.resize(whole, length).astype(np.float32))


def _converted(graph: nn.Module, name: str, lengths: Sequence[int], masked: bool, system: str, half: bool) -> Any:
    """The `MLModel` of a net. ModelError: an operator has no equal in Core ML, or conversion fails."""
    ct = import_module("coremltools")
    types = import_module("coremltools.converters.mil.mil.scope").ScopeSource.TORCHSCRIPT_MODULE_TYPE
    shapes = [(1, length) for length in lengths]
    shape = ct.EnumeratedShapes(shapes, default=shapes[0]) if len(shapes) > 1 else shapes[0]
    inputs, given = [ct.TensorType("input_values", shape=shape, dtype=np.float32)], [torch.zeros(shapes[0])]
    if masked:
        inputs.append(ct.TensorType("samples", shape=(1,), dtype=np.int32))
        given.append(torch.tensor([lengths[0]], dtype=torch.int32))
    halves = ct.transform.FP16ComputePrecision(lambda op: nets.Float32Module.__name__ not in op.scopes.get(types, ()))
    try:
        with torch.no_grad():
            traced = torch.jit.trace(graph, tuple(given), check_trace=False)
        return ct.convert(
            traced,
            inputs=inputs,
            outputs=[ct.TensorType("logits", dtype=np.float32)],
            convert_to="mlprogram",
            compute_precision=halves if half else ct.precision.FLOAT32,
            minimum_deployment_target=getattr(ct.target, system),
            skip_model_load=True,
        )
    except Exception as error:  # coremltools raises whatever its parts do, and keeps to no types of its own
        traceback.clear_frames(error.__traceback__)  # they hold a temporary folder
        if missing := re.search(r"op '(\S+)' not implemented", str(error)):
            raise ModelError(f"Core ML has no equal of {missing[1]}, which {name} needs: use onnx") from error
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"coremltools cannot write {name}: {reason}; use onnx") from error


def _describe(made: Any, model: Model, details: dict[str, Any]) -> None:
    """What whoever has the package alone must know to feed it and to read what it gives."""
    made.short_description = f"Letters of speech: {model.origin.name} ({model.family.name}, {model.scheme.name})"
    made.license = model.origin.license or ""
    numbers = {name: str(details[name]) for name in ("reach", "hop")}
    made.user_defined_metadata.update(collect_metadata(model, details["masked"]) | numbers)


@torch.inference_mode()
def _compared(
    model: Model, net: Any, package: Path, lengths: Sequence[int], masked: bool
) -> tuple[float | None, float | None, str]:
    """The largest difference of a log-probability over speech, and the share of the frames with the same likeliest
    output, in every length: filled, and where a mask keeps padding out, by two thirds and by a single frame. And what
    was not compared.

    float32 is compared with float64, as the roundings of both would be seen otherwise.
    """
    program = check.open_program(package)
    exact = copy.deepcopy(net).double() if model.scheme.weights == "float32" else net
    least = receptive_field(net.config)
    found: list[torch.Tensor] = []
    truth: list[torch.Tensor] = []
    for length in lengths:
        for heard in dict.fromkeys((length, max(length * 2 // 3, least), least) if masked else (length,)):
            clip = torch.from_numpy(_speech(model, heard))[None]
            given = {"input_values": nn.functional.pad(clip, (0, length - heard)), "samples": torch.tensor([heard])}
            truth.append(exact(clip.to(exact.dtype)).logits[0])
            try:
                found.append(check.run_program(program, given)["logits"][0, : len(truth[-1])])
            except check.UnsupportedOperator as operator:
                return None, None, f"{NOT_RUN}, and nothing was compared: {operator} is not known here"
    return *verify.compare_logits(found, truth), f"{NOT_RUN}: what is compared are its operators, computed by torch"


@contextmanager
def _hushed() -> Iterator[None]:
    """coremltools draws bars, and warns of versions and of what only macOS has."""
    chatter = [logging.getLogger(name) for name in ("coremltools", "torchao")]
    levels = [one.level for one in chatter]
    for one in chatter:
        one.setLevel(logging.CRITICAL)  # what goes wrong is raised, too
    try:
        with silence_exporter(), redirect_stderr(io.StringIO()):
            yield
    finally:
        for one, level in zip(chatter, levels, strict=True):
            one.setLevel(level)
