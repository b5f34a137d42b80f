"""The net that exporters write: without PEFT, without weight norm, in float32 on the CPU.

Which format it is written in is not known here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mowa.adapters import merge
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.models.ctc_encoder.positions import precompute_absolute_positions
from mowa.types import Model


def prepare_for_export(model: Model, *, dequantize: bool = False, position_table: bool = True) -> Any:
    """The net of `model` for inference, over the same tensors where it can be; `model` stays as it is.

    With `widen`, narrow linears are `nn.Linear`s of what they stand for. With `by_table`, absolute positions are looked
    up (`patch.positions_by_table`), else the convolution that gives them stays.
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
    along = net.base_model.encoder.pos_conv_embed
    if hasattr(getattr(along, "conv", None), "parametrizations"):
        along.conv = _folded(along.conv)
    if net.config._attn_implementation != "eager":
        net.set_attn_implementation("eager")  # sdpa's mask becomes a selection in every layer
    return net.eval().requires_grad_(False)


def dequantize_linear(linear: QuantizedLinear) -> nn.Linear:
    """A linear over the numbers that the codes stand for."""
    made = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    made.weight = nn.Parameter(linear.weight, requires_grad=False)
    made.register_parameter("bias", None if linear.bias is None else nn.Parameter(linear.bias, requires_grad=False))
    return made


def _folded(conv: Any) -> nn.Conv1d:
    """The convolution with its weight norm multiplied in. torch's own removal would take the weight from every copy."""
    sizes = conv.in_channels, conv.out_channels, conv.kernel_size
    made = nn.Conv1d(*sizes, padding=conv.padding, groups=conv.groups, device="meta")
    made.weight, made.bias = nn.Parameter(conv.weight.detach()), nn.Parameter(conv.bias.detach())
    return made
