"""What of a net learns and what stays frozen, spelt out by part; and the table that a run prints before it starts.

A parameter belongs to the part that its place in the net says, whichever way it is stored: the weight norm of the
positional convolution (two tensors, direction and size) is part of the positional convolution, and what LoRA or a
bottleneck adds to a block is part of `lora` or `adapters`. How fast anything learns is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from mowa.errors import RecipeError
from mowa.types import Family

HEAD, LORA, BOTTLENECK, BLOCK = "head", "lora", "bottleneck", "block"
MASK_EMBEDDING, POSITIONAL_CONV, CONV_ADAPTER = "mask vector", "positional convolution", "convolutional adapter"
NORM_BEFORE_BLOCKS, NORM_AFTER_BLOCKS = "norm before the blocks", "norm after the blocks"

# What stands below the encoder's name, in the order in which sound goes through it.
_BELOW = {
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
    """A part of a net: how many parameters it has, and how many of them learn."""

    part: str
    parameters: int
    trainable: int


@dataclass(frozen=True, slots=True)
class _Place:
    name: str
    parameter: Any
    part: str
    block: int | None  # also of what was added to a block


def set_trainable(net: Any, family: Family, method: str) -> None:
    """Let `what` of `net` (a CTC net of `family`) learn and freeze everything else, in place.

    head       the CTC head alone
    adapters   bottleneck adapters (`bottleneck.add` puts them in) and the head
    lora       low-rank updates (`lora.add` puts them in) and the head
    top-N      the N blocks nearest the head with all that was added to them, the norm after the blocks (nets with
               stable layer norm have it there, others before them), a convolutional adapter, and the head
    encoder    everything but `family.frozen`, the convolutions that listen to samples: the feature projection, the
               positional convolution, SpecAugment's mask vector, both kinds of norm, blocks, and the head
    all        everything

    The mask vector gets a gradient only in steps in which SpecAugment hides frames.

    Raises RecipeError: an unknown word, more blocks than there are, adapters or LoRA in a net without any.
    """
    places = list(_places(net, family))
    rule = _rule(method, places, family)
    for place in places:
        place.parameter.requires_grad_(rule(place))
    for module in net.modules():
        if hasattr(module, "_requires_grad"):  # stock front ends ask for the gradient of the samples, unless told so
            module._requires_grad = any(weight.requires_grad for weight in module.parameters())


def _rule(method: str, places: list[_Place], family: Family) -> Callable[[_Place], bool]:
    there = {place.part for place in places}
    if method == HEAD:
        return lambda place: place.part == HEAD
    if method in (BOTTLENECK, LORA):
        if method not in there:
            raise RecipeError(f"train: {method}: this net has none; add them to it first")
        return lambda place: place.part in (method, HEAD)
    if method == "encoder":
        deaf = {_spoken(name) for name in family.frozen}
        return lambda place: place.part not in deaf
    if method == "full":
        return lambda place: True
    if (found := re.fullmatch(r"top-([1-9]\d*)", method)) is None:
        raise RecipeError(f"train: {method!r} is none of head, adapters, lora, top-N, encoder, all (N: blocks)")
    blocks = 1 + max((place.block for place in places if place.block is not None), default=-1)
    if (count := int(found[1])) > blocks:
        raise RecipeError(f"train: {method}: the net has {blocks} blocks; top-{blocks} at most, or encoder")
    also = (NORM_AFTER_BLOCKS, CONV_ADAPTER, HEAD)
    return lambda place: place.part in also or (place.block is not None and place.block >= blocks - count)


def count_parameters(net: Any, family: Family) -> list[ParameterCount]:
    """What `net` is made of, part by part in the order sound takes, then what was added to it, then the head."""
    counts: dict[str, list[int]] = {}
    for place in _places(net, family):
        size = getattr(place.parameter, "ds_numel", place.parameter.numel())  # ZeRO-3 leaves 0 of it here
        row = counts.setdefault(place.part, [0, 0])
        row[0] += size
        row[1] += size if place.parameter.requires_grad else 0
    between = [part for part in counts if part not in (*_FIRST, *_LAST)]
    return [ParameterCount(part, *counts[part]) for part in (*_FIRST, *between, *_LAST) if part in counts]


def format_table(counts: list[ParameterCount]) -> str:
    """The table as text. Neighbouring blocks that all learn, or all do not, are one line."""
    lines = [("part", "parameters", "learning")]
    for _, same in groupby(
        counts, key=lambda row: (_is_block(row), bool(row.trainable), row.part * (not _is_block(row)))
    ):
        run = list(same)
        part = run[0].part
        if len(run) > 1:
            part = f"{BLOCK}s {_number(run[0])}–{_number(run[-1])}"
        lines.append((part, f"{sum(row.parameters for row in run):,}", f"{sum(row.trainable for row in run):,}"))
    whole, learning = (sum(getattr(row, key) for row in counts) for key in ("parameters", "learning"))
    lines.append(("total", f"{whole:,}", f"{learning:,} ({learning / max(1, whole):.2%})"))
    widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
    figures = max(len(line[2].partition(" ")[0]) for line in lines)
    return "\n".join(
        f"{part:<{widths[0]}}  {count:>{widths[1]}}  {learns.partition(' ')[0]:>{figures}}"
        + (f" {share}" if (share := learns.partition(" ")[2]) else "")
        for part, count, learns in lines
    )


def _is_block(row: ParameterCount) -> bool:
    return row.part.startswith(f"{BLOCK} ")


def _number(row: ParameterCount) -> str:
    return row.part.rpartition(" ")[2]


def _places(net: Any, family: Family) -> Iterator[_Place]:
    """Every parameter once, with the part it belongs to."""
    named = (name for name, module in net.named_modules() if type(module).__name__ in family.blocks)
    blocks = {f"{name}.": index for index, name in enumerate(named)}
    stable = bool(getattr(net.config, "do_stable_layer_norm", False))
    for name, parameter in net.named_parameters():
        block = next((index for stem, index in blocks.items() if name.startswith(stem)), None)
        yield _Place(name, parameter, _part(name, block, net.base_model_prefix, family, stable), block)


def _part(name: str, block: int | None, encoder: str, family: Family, stable: bool) -> str:
    if name.startswith(f"{family.head}."):
        return HEAD
    if ".lora_" in name:
        return LORA
    if block is not None:
        return BOTTLENECK if ".adapter_layer." in name else f"{BLOCK} {block}"
    below = name.removeprefix(f"{encoder}.")
    if below.startswith("encoder.layer_norm."):
        return NORM_AFTER_BLOCKS if stable else NORM_BEFORE_BLOCKS
    found = next((part for stem, part in _BELOW.items() if below.startswith(stem)), None)
    return found or _spoken(below.partition(".")[0])


def _spoken(name: str) -> str:
    return name.replace("_", " ")
