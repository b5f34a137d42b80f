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

from mowa.adapt import merge
from mowa.errors import DataError, ModelError
from mowa.kernels import narrow
from mowa.kernels.narrow import Narrow, NarrowLinear
from mowa.nouns import FLOAT32, Model, Scheme
from mowa.shrink import calibrate, schemes

TOGETHER = ("q_proj", "k_proj", "v_proj")  # linears of one input
Told = Callable[[float], object]  # of the share that is done


@dataclass(frozen=True, slots=True)
class Unit:
    """Linears of block `block` that see the same input: they are narrow together, or not."""

    block: int
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.names[0] if len(self.names) == 1 else self.names[0].rpartition(".")[0] + ".qkv"


def shrink(
    model: Model, scheme: Scheme | str, sounds: Sequence[np.ndarray] | None = None, *, told: Told = lambda share: None
) -> Model:
    """`model` in `scheme`, adapter included; `model` stays as it is, and what is not changed is shared with it.

    `sounds` are recordings, float32 [n] each, as the net hears them (`calibrate.sounds`): needed where
    `schemes.calibrated` says so. Raises ModelError where the model is shrunk already, or a tensor cannot be in the
    scheme; DataError where recordings are needed and there are none.
    """
    scheme = schemes.named(scheme) if isinstance(scheme, str) else scheme
    if model.scheme != FLOAT32:
        raise ModelError(f"{model.origin.name} is in {model.scheme.name} already: shrink the model it was made of")
    why = schemes.calibrated(scheme)
    if why and not sounds:
        raise DataError(f"{schemes.label(scheme)} needs recordings, {why}: name some with --data")
    shrunk = replace(model, net=merge.merge(model).net.to("cpu", torch.float32), scheme=scheme)
    net = shrunk.net
    with torch.no_grad():
        if scheme.weights in ("float16", "bfloat16"):
            for name, weight in list(net.named_parameters()):
                _put(net, name, weight.to(getattr(torch, scheme.weights)).float())
        elif scheme.weights != "float32":
            listed = units(shrunk)
            _refuse(net, listed, scheme)
            _round_others(shrunk, listed)
            widths = {unit: scheme for unit in listed}
            if scheme.weights == "mixed":
                from mowa.shrink import mixed

                widths = mixed.chosen(shrunk, listed, sounds or (), told)
            _narrow(shrunk, widths, sounds or (), told)
    return shrunk


def units(model: Model) -> list[Unit]:
    """The linears that a scheme is about, in the order in which a net meets them."""
    names = [name for group in model.family.linears.values() for name in group]
    found: dict[tuple[int, str], list[str]] = {}
    for depth, path in enumerate(blocks(model)):
        for name, module in model.net.get_submodule(path).named_modules():
            leaf = name.rpartition(".")[2]
            if leaf in names and isinstance(module, nn.Linear):
                key = "q_proj" if leaf in TOGETHER else leaf
                found.setdefault((depth, key), []).append(f"{path}.{name}")
    return [Unit(depth, tuple(sorted(paths))) for (depth, _), paths in found.items()]


def blocks(model: Model) -> list[str]:
    return [name for name, module in model.net.named_modules() if type(module).__name__ in model.family.blocks]


def in_scheme(linear: Any, scheme: Scheme, hessian: Tensor | None = None, range_: Any = None) -> NarrowLinear:
    """A linear as `scheme` has it; `hessian` Σ x xᵀ where errors are compensated, `range_` where inputs are static."""
    weight, bits = linear.weight.detach(), 4 if scheme.weights == "int4" else 8
    made: Narrow
    if scheme.weights == "nf4":
        made = narrow.to_nf4(weight, scheme.group)
    elif scheme.compensated and hessian is not None:
        made = narrow.compensated(weight, hessian, bits, scheme.group, symmetric=scheme.symmetric)
    else:
        made = narrow.to_int(weight, bits, scheme.group, symmetric=scheme.symmetric)
    return NarrowLinear(made, linear.bias, scheme.activations, range_)  # type: ignore[arg-type]


def _refuse(net: Any, listed: Sequence[Unit], scheme: Scheme) -> None:
    """ModelError for the first matrix that the scheme cannot hold."""
    if not listed:
        raise ModelError("this net has no linears that could be narrow: use fp16")
    for unit in listed:
        for name in unit.names:
            columns = net.get_submodule(name).in_features
            if scheme.group and columns % scheme.group:
                smaller = [group for group in schemes.GROUPS if columns % group == 0]
                hint = f"{scheme.name}+{max(smaller)}" if smaller and scheme.weights != "nf4" else "int8-dynamic"
                raise ModelError(
                    f"{name}.weight cannot be in {scheme.name}: its {columns} columns do not fill groups of"
                    f" {scheme.group}; use {hint} instead"
                )


def _round_others(model: Model, listed: Sequence[Unit]) -> None:
    """What is no block's linear, as the family has it."""
    net, family, base = model.net, model.family, model.net.base_model_prefix
    linears = {f"{name}.weight" for unit in listed for name in unit.names}
    for name, weight in list(net.named_parameters()):
        where = name.removeprefix(f"{base}.")
        width = next((kept for part, kept in family.widths.items() if where.startswith(f"{part}.")), "float32")
        if name in linears or weight.ndim < 2 or width == "float32":
            continue
        holder = net.get_submodule(name.rpartition(".")[0])
        group = narrow.side_group(weight)
        if width == "float16" or not group:
            _put(net, name, weight.half().float())
        elif isinstance(holder, nn.Linear):
            net.set_submodule(name.removesuffix(".weight"), NarrowLinear(narrow.to_int(weight, 8, group), holder.bias))
        else:
            _put(net, name, narrow.to_int(weight.flatten(1), 8, group).wide().view_as(weight))


def _narrow(model: Model, widths: dict[Unit, Scheme], sounds: Sequence[np.ndarray], told: Told) -> None:
    """Every unit in its scheme; where errors are compensated, block after block, so that each sees what came before."""
    net = model.net
    static = model.scheme.activations == "static"
    ranges = calibrate.ranges(net, [unit.names[0] for unit in widths], sounds) if static else {}
    compensating = [unit for unit, scheme in widths.items() if scheme.compensated]
    paths = blocks(model)
    for depth, path in enumerate(paths):
        of_block = [unit for unit in widths if unit.block == depth]
        seen: dict[str, Tensor] = {}
        if any(unit in compensating for unit in of_block):
            seen = calibrate.hessians(net, path, [unit.names[0] for unit in of_block], sounds)
        for unit in of_block:
            if widths[unit].weights == "float16":
                continue
            for name in unit.names:
                made = in_scheme(
                    net.get_submodule(name), widths[unit], seen.get(unit.names[0]), ranges.get(unit.names[0])
                )
                net.set_submodule(name, made)
        told((depth + 1) / len(paths))


def _put(net: Any, name: str, value: Tensor) -> None:
    """A parameter of this net alone, whoever shares its old one."""
    holder, _, leaf = name.rpartition(".")
    net.get_submodule(holder)._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def kept(model: Model) -> Iterator[tuple[str, int]]:
    """Tensor → bytes it takes on disk, of a shrunk net or a whole one: codes, scales and zeros, or in what it is kept.

    An exporter may need some more, for its graph, or less, where it folds two tensors into one.
    """
    net, scheme, base = model.net, model.scheme, model.net.base_model_prefix
    for name, module in net.named_modules():
        if isinstance(module, NarrowLinear):
            scales = module.scales.numel() * (2 if module.group < module.in_features else 4)
            zeros = 0 if module.zeros is None else module.zeros.numel() * module.bits // 8
            bias = 0 if module.bias is None else module.bias.numel() * 4
            yield name, module.codes.numel() * module.bits // 8 + scales + zeros + bias
    for name, weight in net.named_parameters():
        where = name.removeprefix(f"{base}.")
        width = next((kept for part, kept in model.family.widths.items() if where.startswith(f"{part}.")), "float32")
        if scheme.weights in ("float32", "float16", "bfloat16"):
            width = scheme.weights
        elif weight.ndim < 2:
            width = "float32"
        elif width == "int8" and not narrow.side_group(weight):
            width = "float16"
        scales = 2 * len(weight) * -(-weight[0].numel() // narrow.side_group(weight)) if width == "int8" else 0
        yield name, scales + weight.numel() * {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}[width]


def size(model: Model) -> int:
    """Bytes of all that `kept` lists."""
    return sum(count for _, count in kept(model))
