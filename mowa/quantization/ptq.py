"""Post-training quantization: return a copy of a model in memory whose weights are stored in another scheme.

The family says which linears are quantized and how the rest is stored (`Family.linears`, `Family.non_block_weights`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mowa.adapters import merge
from mowa.errors import DataError, ModelError
from mowa.kernels.quant import weights
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.quantization import calibration, mixed_precision, schemes
from mowa.quantization.linears import LinearGroup, block_names, linear_groups, quantize_linear
from mowa.types import FLOAT32, CTCModel, Scheme

ProgressCallback = Callable[[float], object]  # called with the fraction done, in [0, 1]


def quantize(
    model: CTCModel,
    scheme: Scheme | str,
    calibration_clips: Sequence[np.ndarray] | None = None,
    *,
    on_progress: ProgressCallback = lambda fraction: None,
) -> CTCModel:
    """Return `model` in `scheme`, with its adapter merged. `model` is not changed; unquantized tensors are shared.

    Args:
        model: in float32.
        scheme: a `Scheme`, or a name that `schemes.parse_scheme` accepts.
        calibration_clips: preprocessed recordings, float32 [n] each, from `calibration.load_clips`.
        on_progress: called with the fraction done.

    Raises:
        ModelError: the model is quantized already, or a matrix does not fit the scheme.
        DataError: the scheme needs calibration clips and there are none.
    """
    scheme = schemes.parse_scheme(scheme) if isinstance(scheme, str) else scheme
    if model.scheme != FLOAT32:
        raise ModelError(
            f"{model.origin.name} is quantized already ({model.scheme.name}); start from the full-precision checkpoint"
        )
    reason = schemes.calibration_reason(scheme)
    if reason and not calibration_clips:
        raise DataError(
            f"{schemes.format_scheme(scheme)} needs calibration recordings {reason}; pass some with --calibration-data"
        )
    quantized = replace(model, net=merge.merge_adapter(model).net.to("cpu", torch.float32), scheme=scheme)
    net = quantized.net
    with torch.no_grad():
        if scheme.weights in ("float16", "bfloat16"):
            for name, weight in list(net.named_parameters()):
                _replace_parameter(net, name, weight.to(getattr(torch, scheme.weights)).float())
        elif scheme.weights != "float32":
            groups = linear_groups(quantized)
            _validate_group_sizes(net, groups, scheme)
            _quantize_non_blocks(quantized, groups)
            schemes_by_group = dict.fromkeys(groups, scheme)
            if scheme.weights == "mixed":
                schemes_by_group = mixed_precision.assign_schemes(
                    quantized, groups, calibration_clips or (), on_progress
                )
            _quantize_blocks(quantized, schemes_by_group, calibration_clips or (), on_progress)
    return quantized


def _validate_group_sizes(net: Any, groups: Sequence[LinearGroup], scheme: Scheme) -> None:
    """Raise ModelError for the first matrix whose columns are not a multiple of the group size."""
    if not groups:
        raise ModelError("the model has no linear layers to quantize; use fp16")
    for group in groups:
        for name in group.module_names:
            columns = net.get_submodule(name).in_features
            if scheme.group_size and columns % scheme.group_size:
                smaller = [size for size in schemes.GROUP_SIZES if columns % size == 0]
                hint = f"{scheme.name}+{max(smaller)}" if smaller and scheme.weights != "nf4" else "int8-dynamic"
                raise ModelError(
                    f"{name}.weight cannot be quantized to {scheme.name}: its {columns} columns are not a multiple of"
                    f" the group size {scheme.group_size}; use {hint}"
                )


def _quantize_non_blocks(model: CTCModel, groups: Sequence[LinearGroup]) -> None:
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
            _replace_parameter(net, name, weight.half().float())
        elif isinstance(module, nn.Linear):
            quantized = QuantizedLinear(weights.quantize(weight, 8, group_size), module.bias)
            net.set_submodule(name.removesuffix(".weight"), quantized)
        else:
            rounded = weights.quantize(weight.flatten(1), 8, group_size).dequantize()
            _replace_parameter(net, name, rounded.view_as(weight))


def _quantize_blocks(
    model: CTCModel,
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


def _replace_parameter(net: Any, name: str, value: Tensor) -> None:
    """Give this net a parameter of its own, as other nets may share the old one."""
    module, _, leaf = name.rpartition(".")
    net.get_submodule(module)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
