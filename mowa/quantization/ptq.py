"""A model → the same in fewer bits, in memory. The spine: whoever measures, exports or runs it takes it from here.

Which linears may be narrow is the family's affair (`linears`, `widths`); how recordings are chosen, `calibrate`'s; how
files look, the exporters'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mowa.adapters import merge
from mowa.errors import DataError, ModelError
from mowa.kernels.quant import weights
from mowa.kernels.quant.gptq import quantize_gptq
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.kernels.quant.nf4 import quantize_nf4
from mowa.kernels.quant.weights import QuantizedWeight
from mowa.quantization import calibration, schemes
from mowa.types import FLOAT32, Model, Scheme

QKV_PROJECTIONS = ("q_proj", "k_proj", "v_proj")  # linears of one input
ProgressCallback = Callable[[float], object]  # of the share that is done


@dataclass(frozen=True, slots=True)
class LinearGroup:
    """Linears of block `block` that see the same input: they are narrow together, or not."""

    block_index: int
    module_names: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.module_names[0] if len(self.module_names) == 1 else self.module_names[0].rpartition(".")[0] + ".qkv"


def quantize(
    model: Model,
    scheme: Scheme | str,
    calibration_clips: Sequence[np.ndarray] | None = None,
    *,
    on_progress: ProgressCallback = lambda share: None,
) -> Model:
    """`model` in `scheme`, adapter included; `model` stays as it is, and what is not changed is shared with it.

    `sounds` are recordings, float32 [n] each, as the net hears them (`calibrate.sounds`): needed where
    `schemes.calibrated` says so. Raises ModelError where the model is shrunk already, or a tensor cannot be in the
    scheme; DataError where recordings are needed and there are none.
    """
    scheme = schemes.parse_scheme(scheme) if isinstance(scheme, str) else scheme
    if model.scheme != FLOAT32:
        raise ModelError(f"{model.origin.name} is in {model.scheme.name} already: shrink the model it was made of")
    why = schemes.calibration_reason(scheme)
    if why and not calibration_clips:
        raise DataError(f"{schemes.format_scheme(scheme)} needs recordings, {why}: name some with --data")
    shrunk = replace(model, net=merge.merge_adapter(model).net.to("cpu", torch.float32), scheme=scheme)
    net = shrunk.net
    with torch.no_grad():
        if scheme.weights in ("float16", "bfloat16"):
            for name, weight in list(net.named_parameters()):
                _put(net, name, weight.to(getattr(torch, scheme.weights)).float())
        elif scheme.weights != "float32":
            listed = linear_groups(shrunk)
            _refuse(net, listed, scheme)
            _round_others(shrunk, listed)
            widths = {unit: scheme for unit in listed}
            if scheme.weights == "mixed":
                from mowa.quantization import mixed_precision

                widths = mixed_precision.assign_schemes(shrunk, listed, calibration_clips or (), on_progress)
            _quantize_blocks(shrunk, widths, calibration_clips or (), on_progress)
    return shrunk


def linear_groups(model: Model) -> list[LinearGroup]:
    """The linears that a scheme is about, in the order in which a net meets them."""
    names = [name for group in model.family.linears.values() for name in group]
    found: dict[tuple[int, str], list[str]] = {}
    for depth, path in enumerate(block_names(model)):
        for name, module in model.net.get_submodule(path).named_modules():
            leaf = name.rpartition(".")[2]
            if leaf in names and isinstance(module, nn.Linear):
                key = "q_proj" if leaf in QKV_PROJECTIONS else leaf
                found.setdefault((depth, key), []).append(f"{path}.{name}")
    return [LinearGroup(depth, tuple(sorted(paths))) for (depth, _), paths in found.items()]


def block_names(model: Model) -> list[str]:
    return [name for name, module in model.net.named_modules() if type(module).__name__ in model.family.blocks]


def quantize_linear(
    linear: Any, scheme: Scheme, hessian: Tensor | None = None, input_range: Any = None
) -> QuantizedLinear:
    """A linear as `scheme` has it; `hessian` Σ x xᵀ where errors are compensated, `range_` where inputs are static."""
    weight, bits = linear.weight.detach(), 4 if scheme.weights == "int4" else 8
    made: QuantizedWeight
    if scheme.weights == "nf4":
        made = quantize_nf4(weight, scheme.group_size)
    elif scheme.gptq and hessian is not None:
        made = quantize_gptq(weight, hessian, bits, scheme.group_size, symmetric=scheme.symmetric)
    else:
        made = weights.quantize(weight, bits, scheme.group_size, symmetric=scheme.symmetric)
    return QuantizedLinear(made, linear.bias, scheme.activations, input_range)  # type: ignore[arg-type]


def _refuse(net: Any, listed: Sequence[LinearGroup], scheme: Scheme) -> None:
    """ModelError for the first matrix that the scheme cannot hold."""
    if not listed:
        raise ModelError("this net has no linears that could be narrow: use fp16")
    for unit in listed:
        for name in unit.module_names:
            columns = net.get_submodule(name).in_features
            if scheme.group_size and columns % scheme.group_size:
                smaller = [group for group in schemes.GROUP_SIZES if columns % group == 0]
                hint = f"{scheme.name}+{max(smaller)}" if smaller and scheme.weights != "nf4" else "int8-dynamic"
                raise ModelError(
                    f"{name}.weight cannot be in {scheme.name}: its {columns} columns do not fill groups of"
                    f" {scheme.group_size}; use {hint} instead"
                )


def _round_others(model: Model, listed: Sequence[LinearGroup]) -> None:
    """What is no block's linear, as the family has it."""
    net, family, base = model.net, model.family, model.net.base_model_prefix
    linears = {f"{name}.weight" for unit in listed for name in unit.module_names}
    for name, weight in list(net.named_parameters()):
        where = name.removeprefix(f"{base}.")
        width = next(
            (kept for part, kept in family.non_block_weights.items() if where.startswith(f"{part}.")), "float32"
        )
        if name in linears or weight.ndim < 2 or width == "float32":
            continue
        holder = net.get_submodule(name.rpartition(".")[0])
        group = weights.non_block_group_size(weight)
        if width == "float16" or not group:
            _put(net, name, weight.half().float())
        elif isinstance(holder, nn.Linear):
            net.set_submodule(
                name.removesuffix(".weight"), QuantizedLinear(weights.quantize(weight, 8, group), holder.bias)
            )
        else:
            _put(net, name, weights.quantize(weight.flatten(1), 8, group).dequantize().view_as(weight))


def _quantize_blocks(
    model: Model,
    schemes_by_group: dict[LinearGroup, Scheme],
    clips: Sequence[np.ndarray],
    on_progress: ProgressCallback,
) -> None:
    """Every unit in its scheme; where errors are compensated, block after block, so that each sees what came before."""
    net = model.net
    static = model.scheme.activations == "static"
    ranges = (
        calibration.estimate_input_ranges(net, [unit.module_names[0] for unit in schemes_by_group], clips)
        if static
        else {}
    )
    compensating = [unit for unit, scheme in schemes_by_group.items() if scheme.gptq]
    paths = block_names(model)
    for depth, path in enumerate(paths):
        of_block = [unit for unit in schemes_by_group if unit.block_index == depth]
        seen: dict[str, Tensor] = {}
        if any(unit in compensating for unit in of_block):
            seen = calibration.accumulate_hessians(net, path, [unit.module_names[0] for unit in of_block], clips)
        for unit in of_block:
            if schemes_by_group[unit].weights == "float16":
                continue
            for name in unit.module_names:
                made = quantize_linear(
                    net.get_submodule(name),
                    schemes_by_group[unit],
                    seen.get(unit.module_names[0]),
                    ranges.get(unit.module_names[0]),
                )
                net.set_submodule(name, made)
        on_progress((depth + 1) / len(paths))


def _put(net: Any, name: str, value: Tensor) -> None:
    """A parameter of this net alone, whoever shares its old one."""
    holder, _, leaf = name.rpartition(".")
    net.get_submodule(holder)._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def estimate_tensor_bytes(model: Model) -> Iterator[tuple[str, int]]:
    """Tensor → bytes it takes on disk, of a shrunk net or a whole one: codes, scales and zeros, or in what it is kept.

    An exporter may need some more, for its graph, or less, where it folds two tensors into one.
    """
    net, scheme, base = model.net, model.scheme, model.net.base_model_prefix
    for name, module in net.named_modules():
        if isinstance(module, QuantizedLinear):
            scales = module.scale.numel() * (2 if module.group_size < module.in_features else 4)
            zeros = 0 if module.zero_point is None else module.zero_point.numel() * module.bits // 8
            bias = 0 if module.bias is None else module.bias.numel() * 4
            yield name, module.qweight.numel() * module.bits // 8 + scales + zeros + bias
    for name, weight in net.named_parameters():
        where = name.removeprefix(f"{base}.")
        width = next(
            (kept for part, kept in model.family.non_block_weights.items() if where.startswith(f"{part}.")), "float32"
        )
        if scheme.weights in ("float32", "float16", "bfloat16"):
            width = scheme.weights
        elif weight.ndim < 2:
            width = "float32"
        elif width == "int8" and not weights.non_block_group_size(weight):
            width = "float16"
        scales = (
            2 * len(weight) * -(-weight[0].numel() // weights.non_block_group_size(weight)) if width == "int8" else 0
        )
        yield name, scales + weight.numel() * {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}[width]


def estimate_size_bytes(model: Model) -> int:
    """Bytes of all that `kept` lists."""
    return sum(count for _, count in estimate_tensor_bytes(model))
