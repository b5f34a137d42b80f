"""Post-training quantization: return a copy of a model in memory whose weights are stored in another scheme.

The family says which linears are quantized and how the rest is stored (`Family.linears`, `Family.non_block_weights`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from mowa.adapters.loading import merge_adapter
from mowa.errors import DataError, ModelError
from mowa.kernels.quant import weights
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.models.causal import fused_modules
from mowa.quantization import calibration, mixed_precision, schemes
from mowa.quantization.linears import LinearGroup, block_names, linear_groups, quantize_linear
from mowa.types import FLOAT32, AnyModel, Scheme

ProgressCallback = Callable[[float], object]  # called with the fraction done, in [0, 1]
ModelT = TypeVar("ModelT", bound=AnyModel)


def quantize(
    model: ModelT,
    scheme: Scheme | str,
    calibration_clips: Sequence[np.ndarray] | None = None,
    *,
    on_progress: ProgressCallback = lambda fraction: None,
) -> ModelT:
    """Return `model` in `scheme`, with its adapter merged. `model` is not changed; unquantized tensors are shared.

    Args:
        model: a speech or language model. The copy is in float32 and on the CPU.
        scheme: a `Scheme`, or a name that `schemes.parse_scheme` accepts.
        calibration_clips: preprocessed recordings, float32 [n] each, from `calibration.load_clips`.
        on_progress: called with the fraction done.

    Raises:
        ModelError: the model is quantized already, or a matrix does not fit the scheme. Language models: the scheme
            needs calibration or quantizes inputs, or the model is a mixture of experts.
        DataError: the scheme needs calibration clips and there are none.
    """
    scheme = schemes.parse_scheme(scheme, model.task) if isinstance(scheme, str) else scheme
    if model.scheme != FLOAT32:
        raise ModelError(
            f"{model.origin.name} is quantized already ({model.scheme.name}); start from the full-precision checkpoint"
        )
    if reason := unsupported_reason(model, scheme):
        raise ModelError(f"{model.origin.name} cannot be quantized to {schemes.format_scheme(scheme)}: {reason}")
    reason = schemes.calibration_reason(scheme)
    if reason and not calibration_clips:
        raise DataError(
            f"{schemes.format_scheme(scheme)} needs calibration recordings {reason}; pass some with --calibration-data"
        )
    net = merge_adapter(model).net
    if {(weight.dtype, weight.device.type) for weight in net.parameters()} != {(torch.float32, "cpu")}:
        net = copy.deepcopy(net).to("cpu", torch.float32)
    fused_modules.unfuse_modules(net)  # fused MLPs would need whole weights
    quantized = replace(model, net=net, scheme=scheme)
    with torch.no_grad():
        if scheme.weights in ("float16", "bfloat16"):
            _round_parameters(net, getattr(torch, scheme.weights))
        elif scheme.weights != "float32":
            groups = linear_groups(quantized)
            _validate_group_sizes(net, groups, scheme, schemes.parse_scheme("int8", model.task).name)
            _quantize_non_blocks(quantized, groups)
            schemes_by_group = dict.fromkeys(groups, scheme)
            if scheme.weights == "mixed":
                schemes_by_group = mixed_precision.assign_schemes(
                    quantized, groups, calibration_clips or (), on_progress
                )
            _quantize_blocks(quantized, schemes_by_group, calibration_clips or (), on_progress)
    return quantized


def unsupported_reason(model: AnyModel, scheme: Scheme) -> str:
    """Return why the model cannot be stored in the scheme, as far as its family says, and what works; else empty.

    A mixture of experts is rejected: its experts, most of its weights, would stay in full precision.
    """
    if model.task != "causal":
        return ""
    if reason := schemes.causal_unsupported_reason(scheme):
        return reason
    convolutions = {f"{name}.weight" for name, module in model.net.named_modules() if isinstance(module, nn.Conv1d)}
    counts = {
        name: weight.numel()
        for name, weight in model.net.named_parameters()
        if weight.ndim == 3 and name not in convolutions
    }
    if scheme.weights in ("float32", "float16", "bfloat16") or not counts:
        return ""
    share = sum(counts.values()) / sum(weight.numel() for weight in model.net.parameters())
    return (
        f"its experts, {share:.0%} of the weights, are one tensor per block ({next(iter(counts))}) and not linear"
        " layers, which is what schemes quantize; use bf16 or fp16"
    )


def _round_parameters(net: Any, dtype: torch.dtype) -> None:
    """Round every parameter to `dtype` and keep it in float32; tied parameters stay tied."""
    rounded: dict[int, nn.Parameter] = {}
    for name, weight in list(net.named_parameters(remove_duplicate=False)):
        if id(weight) not in rounded:
            rounded[id(weight)] = nn.Parameter(weight.to(dtype).float(), requires_grad=False)
        _set_parameter(net, name, rounded[id(weight)])


def _validate_group_sizes(net: Any, groups: Sequence[LinearGroup], scheme: Scheme, int8: str) -> None:
    """Raise ModelError for the first matrix whose columns are not a multiple of the group size; suggest `int8`."""
    if not groups:
        raise ModelError("the model has no linear layers to quantize; use fp16")
    for group in groups:
        for name in group.module_names:
            columns = net.get_submodule(name).in_features
            if scheme.group_size and columns % scheme.group_size:
                smaller = [size for size in schemes.GROUP_SIZES if columns % size == 0]
                hint = f"{scheme.name}+{max(smaller)}" if smaller and scheme.weights != "nf4" else int8
                raise ModelError(
                    f"{name}.weight cannot be quantized to {scheme.name}: its {columns} columns are not a multiple of"
                    f" the group size {scheme.group_size}; use {hint}"
                )


def _quantize_non_blocks(model: AnyModel, groups: Sequence[LinearGroup]) -> None:
    """Round the matrices outside `groups` as the family stores them."""
    net = model.net
    linears = {f"{name}.weight" for group in groups for name in group.module_names}
    for name, weight in list(net.named_parameters()):
        dtype = schemes.non_block_dtype(model.family, name, net.base_model_prefix)
        if name in linears or weight.ndim < 2 or dtype == "float32":
            continue
        module = net.get_submodule(name.rpartition(".")[0])
        group_size = schemes.non_block_group_size(weight)
        if dtype == "float16" or not group_size:
            _set_parameter(net, name, nn.Parameter(weight.half().float(), requires_grad=False))
        elif isinstance(module, nn.Linear):
            quantized = QuantizedLinear(weights.quantize(weight, 8, group_size), module.bias)
            net.set_submodule(name.removesuffix(".weight"), quantized)
        else:
            rounded = weights.quantize(weight.flatten(1), 8, group_size).dequantize()
            _set_parameter(net, name, nn.Parameter(rounded.view_as(weight), requires_grad=False))


def _quantize_blocks(
    model: AnyModel,
    schemes_by_group: dict[LinearGroup, Scheme],
    clips: Sequence[np.ndarray],
    on_progress: ProgressCallback,
) -> None:
    """Quantize each group in its scheme, block by block, so that GPTQ sees the quantized blocks before it."""
    net = model.net
    input_qparams: dict[str, tuple[float, int]] = {}
    if model.scheme.activations == "static":
        first_names = [group.module_names[0] for group in schemes_by_group]
        input_qparams = calibration.estimate_input_ranges(net, first_names, clips)
    blocks = block_names(model)
    for index, block in enumerate(blocks):
        groups = [group for group in schemes_by_group if group.block_index == index]
        hessians: dict[str, Tensor] = {}
        if any(schemes_by_group[group].gptq for group in groups):
            first_names = [group.module_names[0] for group in groups]
            hessians = calibration.accumulate_hessians(net, block, first_names, clips)
        for group in groups:
            scheme, first_name = schemes_by_group[group], group.module_names[0]
            if scheme.weights == "float16":
                continue
            for name in group.module_names:
                linear = net.get_submodule(name)
                net.set_submodule(
                    name, quantize_linear(linear, scheme, hessians.get(first_name), input_qparams.get(first_name))
                )
        on_progress((index + 1) / len(blocks))


def _set_parameter(net: Any, name: str, parameter: nn.Parameter) -> None:
    """Give this net a parameter of its own, as other nets may share the old one."""
    module, _, leaf = name.rpartition(".")
    net.get_submodule(module)._parameters[leaf] = parameter
