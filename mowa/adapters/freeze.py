"""Freeze parts of a CTC net for a training method, and count trainable parameters per part.

A parameter belongs to a part by its name: both weight-norm tensors of the positional convolution to that convolution,
and the layers that LoRA or a bottleneck adapter adds to a block to `lora` or `bottleneck`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from mowa.errors import RecipeError
from mowa.models.ctc_encoder.anatomy import read_anatomy
from mowa.types import Family

HEAD, LORA, BOTTLENECK, BLOCK = "head", "lora", "bottleneck", "block"
MASK_EMBEDDING, POSITIONAL_CONV, CONV_ADAPTER = "mask embedding", "positional convolution", "convolutional adapter"
NORM_BEFORE_BLOCKS, NORM_AFTER_BLOCKS = "norm before the blocks", "norm after the blocks"

# Name below the base model → part, in the order of computation.
_ENCODER_PARTS = {
    "masked_spec_embed": MASK_EMBEDDING,
    "encoder.pos_conv_embed.": POSITIONAL_CONV,
    "adapter.": CONV_ADAPTER,
}
_FIRST, _LAST = (
    ("feature extractor", "feature projection", MASK_EMBEDDING),
    (NORM_AFTER_BLOCKS, CONV_ADAPTER, BOTTLENECK, LORA, HEAD),
)


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Number of parameters of a part of a net, and how many of them are trainable."""

    part: str
    parameters: int
    trainable: int


@dataclass(frozen=True, slots=True)
class _Parameter:
    name: str
    tensor: Any
    part: str
    block: int | None  # also of layers that were added to a block


def set_trainable(net: Any, family: Family, method: str) -> None:
    """Make the parameters that `method` trains trainable and freeze all others, in place.

    head         the CTC head
    bottleneck   bottleneck adapters (added by `bottleneck.add`) and the head
    lora         LoRA (added by `lora.add`) and the head
    top-N        the last N blocks and the layers added to them, the norm after the blocks (which nets with stable layer
                 norm have), a convolutional adapter, and the head
    encoder      everything but `family.frozen`, the convolutional feature extractor
    full         everything

    SpecAugment's mask embedding gets a gradient only in steps in which frames are masked.

    Raises RecipeError for an unknown method, for more blocks than the net has, and for bottleneck or lora on a net
    without them.
    """
    parameters = list(_parameters(net, family))
    is_trainable = _trainable_rule(method, parameters, family)
    for parameter in parameters:
        parameter.tensor.requires_grad_(is_trainable(parameter))
    set_front_end_gradient(net)


def set_front_end_gradient(net: Any) -> None:
    """Set `_requires_grad` of transformers' front ends in `net` to whether any of their weights is trained.

    While it is true, training mode computes the gradient of the input samples, and so a frozen front end takes part in
    the backward pass.
    """
    for module in net.modules():
        if hasattr(module, "_requires_grad"):
            module._requires_grad = any(weight.requires_grad for weight in module.parameters())


def _trainable_rule(method: str, parameters: list[_Parameter], family: Family) -> Callable[[_Parameter], bool]:
    if method == HEAD:
        return lambda parameter: parameter.part == HEAD
    if method in (BOTTLENECK, LORA):
        if method not in {parameter.part for parameter in parameters}:
            raise RecipeError(f"method: {method}: this model has no {method} layers; add them first")
        return lambda parameter: parameter.part in (method, HEAD)
    if method == "encoder":
        frozen = {_readable(name) for name in family.frozen}
        return lambda parameter: parameter.part not in frozen
    if method == "full":
        return lambda parameter: True
    if (match := re.fullmatch(r"top-([1-9]\d*)", method)) is None:
        raise RecipeError(f"method: {method!r} is not one of head, bottleneck, lora, top-N, encoder, full (N: blocks)")
    blocks = 1 + max((parameter.block for parameter in parameters if parameter.block is not None), default=-1)
    if (count := int(match[1])) > blocks:
        raise RecipeError(f"method: {method}: the model has {blocks} blocks; use at most top-{blocks}, or encoder")
    parts = (NORM_AFTER_BLOCKS, CONV_ADAPTER, HEAD)
    return lambda parameter: (
        parameter.part in parts or (parameter.block is not None and parameter.block >= blocks - count)
    )


def count_parameters(net: Any, family: Family) -> list[ParameterCount]:
    """Count the parameters of `net` per part, in the order of computation, then of added layers, then of the head."""
    counts: dict[str, list[int]] = {}
    for parameter in _parameters(net, family):
        numel = getattr(parameter.tensor, "ds_numel", parameter.tensor.numel())  # ZeRO-3 shards have 0 elements here
        count = counts.setdefault(parameter.part, [0, 0])
        count[0] += numel
        count[1] += numel if parameter.tensor.requires_grad else 0
    between = [part for part in counts if part not in (*_FIRST, *_LAST)]
    return [ParameterCount(part, *counts[part]) for part in (*_FIRST, *between, *_LAST) if part in counts]


def format_table(counts: list[ParameterCount]) -> str:
    """Format the table as text. Consecutive blocks that are all trainable, or all frozen, share a line."""
    lines = [("part", "parameters", "trainable")]
    for _, group in groupby(
        counts, key=lambda row: (_is_block(row), bool(row.trainable), row.part * (not _is_block(row)))
    ):
        run = list(group)
        part = run[0].part
        if len(run) > 1:
            part = f"{BLOCK}s {_number(run[0])}–{_number(run[-1])}"
        lines.append((part, f"{sum(row.parameters for row in run):,}", f"{sum(row.trainable for row in run):,}"))
    total, trainable = sum(row.parameters for row in counts), sum(row.trainable for row in counts)
    lines.append(("total", f"{total:,}", f"{trainable:,} ({trainable / max(1, total):.2%})"))
    widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
    figures = max(len(line[2].partition(" ")[0]) for line in lines)
    return "\n".join(
        f"{part:<{widths[0]}}  {count:>{widths[1]}}  {trained.partition(' ')[0]:>{figures}}"
        + (f" {percentage}" if (percentage := trained.partition(" ")[2]) else "")
        for part, count, trained in lines
    )


def _is_block(row: ParameterCount) -> bool:
    return row.part.startswith(f"{BLOCK} ")


def _number(row: ParameterCount) -> str:
    return row.part.rpartition(" ")[2]


def _parameters(net: Any, family: Family) -> Iterator[_Parameter]:
    """Yield every parameter of `net` with the part that it belongs to."""
    block_names = (name for name, module in net.named_modules() if type(module).__name__ in family.blocks)
    blocks = {f"{name}.": index for index, name in enumerate(block_names)}
    stable = family.task == "ctc" and read_anatomy(net).stable
    for name, parameter in net.named_parameters():
        block = next((index for prefix, index in blocks.items() if name.startswith(prefix)), None)
        yield _Parameter(name, parameter, _part(name, block, net.base_model_prefix, family, stable), block)


def _part(name: str, block: int | None, base_prefix: str, family: Family, stable: bool) -> str:
    if name.startswith(f"{family.head}."):
        return HEAD
    if ".lora_" in name:
        return LORA
    if block is not None:
        return BOTTLENECK if ".adapter_layer." in name else f"{BLOCK} {block}"
    name = name.removeprefix(f"{base_prefix}.")
    if name.startswith("encoder.layer_norm."):
        return NORM_AFTER_BLOCKS if stable else NORM_BEFORE_BLOCKS
    part = next((part for prefix, part in _ENCODER_PARTS.items() if name.startswith(prefix)), None)
    return part or _readable(name.partition(".")[0])


def _readable(name: str) -> str:
    return name.replace("_", " ")
