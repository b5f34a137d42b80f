"""Tiny shrunk models, made by hand: what they need of a scheme, without whatever chooses and calibrates."""

import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import mowa
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.kernels.quant.nf4 import quantize_nf4
from mowa.kernels.quant.weights import quantize
from mowa.types import Model, Scheme
from tests.checkpoints import tiny

WIDE = {"hidden_size": 64, "intermediate_size": 128}  # so that groups of 32 and 64 fill the rows
QUICK = {"conv_dim": (16,) * 3, "conv_kernel": (10, 8, 8), "conv_stride": (5, 8, 8)}
RANGE = (0.04, 117)
SCHEMES = {
    "int8-dynamic": Scheme("int8-dynamic", "int8", "dynamic"),
    "int8-static": Scheme("int8-static", "int8", "static"),
    "int8-weight": Scheme("int8-weight", "int8"),
    "int4-weight": Scheme("int4-weight", "int4", group_size=32),
    "int4-weight+asym": Scheme("int4-weight", "int4", group_size=32, symmetric=False),
    "nf4": Scheme("nf4", "nf4", group_size=64),
    "mixed": Scheme("mixed", "mixed", "dynamic", group_size=32, size_budget=0.5),
}


def shrunk(folder: Path, scheme: str, family: str = "wav2vec2", norm: str = "layer", **changes: object) -> Model:
    """A random net of the family as `scheme` has it. mixed: feed-forward in int4, but for what it gives: float16."""
    model = mowa.load(str(tiny(folder, family, norm, **WIDE | QUICK | changes)))
    net, made = model.net, SCHEMES[scheme]
    names = [name for group in model.family.linears.values() for name in group]
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1 and name.rpartition(".")[0].rpartition(".")[2] not in names:
            parameter.data = parameter.data.half().float()
    for name, linear in list(net.named_modules()):
        leaf = name.rpartition(".")[2]
        if not isinstance(linear, nn.Linear) or leaf not in names:
            continue
        if scheme == "mixed" and leaf == "output_dense":
            linear.weight.data = linear.weight.data.half().float()
        elif scheme == "mixed" and leaf == "intermediate_dense":
            net.set_submodule(name, narrow(linear, SCHEMES["int4-weight"]))
        else:
            net.set_submodule(name, narrow(linear, SCHEMES["int8-dynamic"] if scheme == "mixed" else made))
    projection = net.base_model.feature_projection.projection
    net.base_model.feature_projection.projection = QuantizedLinear(
        quantize(projection.weight.data, 8, 16), projection.bias
    )
    return replace(model, scheme=made)


def narrow(linear: nn.Linear, scheme: Scheme) -> QuantizedLinear:
    weight = linear.weight.detach()
    if scheme.weights == "nf4":
        made = quantize_nf4(weight, scheme.group_size)
    else:
        made = quantize(weight, int(scheme.weights[3:]), scheme.group_size, symmetric=scheme.symmetric)
    return QuantizedLinear(made, linear.bias, scheme.activations, RANGE if scheme.activations == "static" else None)


def widened(net: nn.Module) -> nn.Module:
    """A net of its own with plain linears of what the narrow ones stand for."""
    net = copy.deepcopy(net)
    for name, linear in narrows(net).items():
        made = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
        made.weight.data = linear.weight
        if linear.bias is not None:
            made.bias.data = linear.bias
        net.set_submodule(name, made)
    return net.eval().requires_grad_(False)


def narrows(net: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in net.named_modules() if isinstance(module, QuantizedLinear)}


def same(one: QuantizedLinear, other: nn.Module) -> bool:
    """Codes, scales, zeros, bias, range and how they are read, to the last bit."""
    if not isinstance(other, QuantizedLinear):
        return False
    ours, theirs = one.state_dict(), other.state_dict()
    how = [(m.bits, m.group_size, m.quant_type, m.activations) for m in (one, other)]
    return how[0] == how[1] and ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
