"""Quantization-aware training: train with rounded weights, then replace the weights by their rounded values.

Linears compute with ŵ = s q instead of their weights w, rounded anew in every step; gradients pass straight through
to w (arXiv:1308.3432, arXiv:1712.05877):

    q = clip(round(w / s), -2^(b-1), 2^(b-1) - 1),   s = 2 max |w| / (2^b - 1)   of each group of columns, or of the row

torchao's fake quantization does this; the family and the scheme decide on which linears, and in how many bits. The
weights that `round_weights` leaves lie on grids that `kernels.quant.weights.quantize` finds again exactly.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from mowa.errors import MissingDependency, RecipeError
from mowa.kernels.quant.weights import quantize
from mowa.quantization.schemes import non_block_dtype, non_block_group_size
from mowa.types import Family

SCHEMES = {"int8": "int8-dynamic", "int4": "int4-weight"}  # recipe value `qat` → scheme to quantize to afterwards
BITS = {"int8": 8, "int4": 4}
CONFIG_KEY = "qat"  # in config.json of a checkpoint that was trained for a scheme

QuantGrid = tuple[int, int]  # bits and group size; group size 0: the whole row


def config_entry(qat: str, group_size: int) -> dict[str, Any]:
    """Return the value of `CONFIG_KEY` for a checkpoint trained with `qat` (int8 or int4)."""
    return {"scheme": SCHEMES[qat], "group_size": group_size if qat == "int4" else 0}


def prepare(net: Any, family: Family, qat: str, group_size: int = 32) -> None:
    """Let the linears that `mowa quantize` will quantize compute with rounded weights. Changes `net` in place.

    Weights beyond the range that rounding to nearest would choose are clipped to it first.

    Args:
        net: a transformers net in float32.
        family: which linears, and how those outside the blocks are stored (in int8, with unquantized inputs).
        qat: int8 (one scale per row, inputs in int8 per frame) or int4 (one scale per `group_size` columns).
        group_size: 32, 64 or 128.

    Raises:
        RecipeError: the net has no such linears, is not in float32, or its columns do not fill groups.
        MissingDependency: torchao is not installed.
    """
    try:
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
    except ImportError:
        raise MissingDependency("quantization-aware training (qat) needs torchao: pip install 'mowa[qat]'") from None
    blocks, others = select_linears(net, family, qat, group_size)
    if reason := _unsupported_reason(net, blocks):
        raise RecipeError(f"qat: {qat}: {reason}")
    int8_inputs = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False) if qat == "int8" else None
    for linears, inputs in ((blocks, int8_inputs), (others, None)):
        for name, (bits, columns) in linears.items():
            _clip_outliers(net.get_submodule(name).weight, bits, columns)
            granularity: dict[str, Any] = {"group_size": columns} if columns else {"granularity": "per_channel"}
            weights = IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), is_symmetric=True, **granularity)
            config = QATConfig(activation_config=inputs, weight_config=weights, step="prepare")
            quantize_(net, config, filter_fn=partial(_has_name, name))


def select_linears(
    net: Any, family: Family, qat: str, group_size: int
) -> tuple[dict[str, QuantGrid], dict[str, QuantGrid]]:
    """Return the linears in the blocks, and those outside, that are quantized; module name → (bits, group size)."""
    blocks: dict[str, QuantGrid] = {}
    for path, block in net.named_modules():
        if type(block).__name__ in family.blocks:
            for name, module in block.named_modules():
                if family.find_linear(name) and isinstance(module, nn.Linear):
                    blocks[f"{path}.{name}"] = BITS[qat], group_size if qat == "int4" else 0
    others: dict[str, QuantGrid] = {}
    for name, module in net.named_modules():
        int8 = non_block_dtype(family, name, net.base_model_prefix) == "int8"
        if int8 and isinstance(module, nn.Linear) and name not in blocks and non_block_group_size(module.weight):
            others[name] = 8, non_block_group_size(module.weight)
    return blocks, others


def _unsupported_reason(net: Any, blocks: dict[str, QuantGrid]) -> str:
    """Why the net cannot be trained with rounded weights; empty where it can."""
    if not blocks:
        return "the net has no unquantized linears; start from the full-precision checkpoint"
    for name, (_, columns) in blocks.items():
        linear = net.get_submodule(name)
        if linear.weight.dtype != torch.float32:
            dtype = str(linear.weight.dtype).removeprefix("torch.")
            return f"{name} is in {dtype}, which loses small updates; load the model in float32"
        if columns and linear.in_features % columns:
            return (
                f"the {linear.in_features} columns of {name} are not a multiple of {columns}; choose another"
                " qat_group_size, or int8"
            )
    return ""


def _has_name(wanted: str, _: nn.Module, name: str) -> bool:
    return name == wanted


@torch.no_grad()
def _clip_outliers(weight: nn.Parameter, bits: int, columns: int) -> None:
    """Clip the weights so that the scale that follows from the largest one is the scale that `quantize` chooses."""
    quantized = quantize(weight, bits, columns)
    limit = quantized.scale * (2**bits - 1) / 2
    limit = limit.repeat_interleave(quantized.group_size, 1)[:, : weight.shape[1]]
    weight.copy_(torch.minimum(torch.maximum(weight, -limit), limit))


@torch.no_grad()
def round_weights(net: Any) -> None:
    """Replace the weights of a prepared net by their rounded values, in place; inputs are still rounded.

    Scales become float16 numbers, as files store them. The integers stay those of training, except perhaps in groups
    whose largest weight is below 1e-5, where float16 has few scales left.
    """
    for module in _prepared_modules(net):
        quantizer = module.weight_fake_quantizer
        bits = int(str(quantizer.config.dtype).removeprefix("torch.int"))
        columns = getattr(quantizer.config.granularity, "group_size", 0)
        rounded, before = quantizer(module.weight), None
        while before is None or not torch.equal(rounded, before):
            rounded, before = quantize(rounded, bits, columns).dequantize(), rounded
        module.weight.copy_(rounded)
        quantizer.enabled = False


def convert(net: Any) -> None:
    """Undo `prepare` in place: plain nn.Linear modules, with the weights as they are now."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    prepared = {id(module) for module in _prepared_modules(net)}
    quantize_(net, QATConfig(step="convert"), filter_fn=lambda module, _: id(module) in prepared)


def _prepared_modules(net: Any) -> list[Any]:
    return [module for module in net.modules() if hasattr(module, "weight_fake_quantizer")]
