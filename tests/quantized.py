"""Tiny quantized models, built without calibration or mixed-precision search."""

import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import mowa
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.kernels.quant.nf4 import quantize_nf4
from mowa.kernels.quant.weights import quantize
from mowa.types import CTCModel, Scheme
from tests.checkpoints import tiny

DIVISIBLE = {"hidden_size": 64, "intermediate_size": 128}  # rows are multiples of group sizes 32 and 64
SHORT_FRONT_END = {"conv_dim": (16,) * 3, "conv_kernel": (10, 8, 8), "conv_stride": (5, 8, 8)}
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


def tiny_quantized(
    folder: Path, scheme: str, family: str = "wav2vec2", norm: str = "layer", **changes: object
) -> CTCModel:
    """Return a random model in `scheme`. mixed: first feed-forward linears in int4, second ones in float16."""
    model = mowa.load(str(tiny(folder, family, norm, **DIVISIBLE | SHORT_FRONT_END | changes)))
    net, parsed = model.net, SCHEMES[scheme]
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
            net.set_submodule(name, quantized_layer(linear, SCHEMES["int4-weight"]))
        else:
            net.set_submodule(name, quantized_layer(linear, SCHEMES["int8-dynamic"] if scheme == "mixed" else parsed))
    projection = net.base_model.feature_projection.projection
    net.base_model.feature_projection.projection = QuantizedLinear(
        quantize(projection.weight.data, 8, 16), projection.bias
    )
    return replace(model, scheme=parsed)


def quantized_layer(linear: nn.Linear, scheme: Scheme) -> QuantizedLinear:
    weight = linear.weight.detach()
    if scheme.weights == "nf4":
        quantized = quantize_nf4(weight, scheme.group_size)
    else:
        quantized = quantize(weight, int(scheme.weights[3:]), scheme.group_size, symmetric=scheme.symmetric)
    return QuantizedLinear(
        quantized, linear.bias, scheme.activations, RANGE if scheme.activations == "static" else None
    )


def dequantized_copy(net: nn.Module) -> nn.Module:
    """Return a copy of the net in which quantized linears are dequantized to plain ones."""
    net = copy.deepcopy(net)
    for name, linear in quantized_linears(net).items():
        plain = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
        plain.weight.data = linear.weight
        if linear.bias is not None:
            plain.bias.data = linear.bias
        net.set_submodule(name, plain)
    return net.eval().requires_grad_(False)


def quantized_linears(net: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in net.named_modules() if isinstance(module, QuantizedLinear)}


def equal_linears(one: QuantizedLinear, other: nn.Module) -> bool:
    """Whether both have the same settings and bit-identical tensors."""
    if not isinstance(other, QuantizedLinear):
        return False
    ours, theirs = one.state_dict(), other.state_dict()
    settings = [(m.bits, m.group_size, m.quant_type, m.activations) for m in (one, other)]
    return (
        settings[0] == settings[1]
        and ours.keys() == theirs.keys()
        and all(torch.equal(ours[k], theirs[k]) for k in ours)
    )
