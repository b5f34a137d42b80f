"""Prepare a model for export: merge its adapter, fold weight norm, and move it to float32 on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mowa.adapters import merge
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.models.ctc_encoder.anatomy import read_anatomy
from mowa.models.ctc_encoder.positions import precompute_absolute_positions
from mowa.types import CTCModel


def prepare_for_export(model: CTCModel, *, dequantize: bool = False, position_table: bool = True) -> Any:
    """Return the net of `model` for inference, sharing tensors where possible; `model` does not change.

    With `dequantize`, quantized linear layers become `nn.Linear` layers over their dequantized weights. With
    `position_table`, absolute positions are looked up in a table (`precompute_absolute_positions`) instead of computed
    by the positional convolution.
    """
    net = merge.merge_adapter(model).net
    if {(p.dtype, p.device.type) for p in net.parameters()} != {(torch.float32, "cpu")}:
        net = net.to("cpu", torch.float32)
    if dequantize:
        for name, module in list(net.named_modules()):
            if isinstance(module, QuantizedLinear):
                net.set_submodule(name, dequantize_linear(module))
    if position_table:
        precompute_absolute_positions(net, frozen=True)
    for layer in read_anatomy(net).position_layers:
        if hasattr(layer.conv, "parametrizations"):
            layer.module.conv = _fold_weight_norm(layer.conv)
    if net.config._attn_implementation != "eager":
        net.set_attn_implementation("eager")  # sdpa's mask is exported as a selection in every layer
    return net.eval().requires_grad_(False)


def dequantize_linear(linear: QuantizedLinear) -> nn.Linear:
    """Return a linear layer over the dequantized weights."""
    dequantized = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    dequantized.weight = nn.Parameter(linear.weight, requires_grad=False)
    bias = None if linear.bias is None else nn.Parameter(linear.bias, requires_grad=False)
    dequantized.register_parameter("bias", bias)
    return dequantized


def _fold_weight_norm(conv: Any) -> nn.Conv1d:
    """torch's own removal would change the weight of every copy of the net."""
    sizes = conv.in_channels, conv.out_channels, conv.kernel_size
    folded = nn.Conv1d(*sizes, padding=conv.padding, groups=conv.groups, device="meta")
    folded.weight, folded.bias = nn.Parameter(conv.weight.detach()), nn.Parameter(conv.bias.detach())
    return folded
