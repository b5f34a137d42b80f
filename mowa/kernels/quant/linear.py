"""A linear layer over quantized weights: the reference with which engines and exporters are compared.

Inputs in 8 bits follow ONNX's DynamicQuantizeLinear, with one scale t and zero point z per tensor:

    x̂ = t (clip(round(x / t) + z, 0, 255) - z),  t = (max(x, 0) - min(x, 0)) / 255,  z = round(-min(x, 0) / t)
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mowa.kernels.quant.weights import QuantizedWeight

Activations = Literal["none", "dynamic", "static"]


def choose_input_qparams(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and zero point, scalar tensors, of inputs x of any shape."""
    low, high = torch.aminmax(x)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, (-low / scale).round().clamp(0, 255)


class QuantizedLinear(nn.Module):
    """Compute y = x̂ Ŵᵀ + b: x [..., K] → [..., N] in x's dtype. Ŵ is dequantized at every call.

    Args:
        quantized: W.
        bias: [N] or None.
        activations: how x is quantized: none (x̂ = x), dynamic (by the range of each x), static (by `input_qparams`).
        input_qparams: scale and zero point of x for static activations.
    """

    qweight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(
        self,
        quantized: QuantizedWeight,
        bias: Tensor | None,
        activations: Activations = "none",
        input_qparams: tuple[float, int] | None = None,
    ) -> None:
        super().__init__()
        self.bits, self.group_size, self.quant_type = quantized.bits, quantized.group_size, quantized.quant_type
        self.activations = activations
        self.out_features, self.in_features = quantized.qweight.shape
        for name in ("qweight", "scale", "zero_point"):
            self.register_buffer(name, getattr(quantized, name))
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        scale, zero_point = (None, None) if input_qparams is None else map(float, input_qparams)
        self.register_buffer("input_scale", None if scale is None else torch.tensor(scale))
        self.register_buffer("input_zero_point", None if zero_point is None else torch.tensor(zero_point))

    @property
    def quantized_weight(self) -> QuantizedWeight:
        return QuantizedWeight(self.qweight, self.scale, self.zero_point, self.bits, self.group_size, self.quant_type)

    @property
    def weight(self) -> Tensor:
        """Ŵ float32 [N, K], a new tensor at every access."""
        return self.quantized_weight.dequantize()

    @property
    def input_qparams(self) -> tuple[float, int] | None:
        """Scale and zero point of the inputs, for static activations."""
        if self.input_scale is None or self.input_zero_point is None:
            return None
        return float(self.input_scale), int(self.input_zero_point)

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.float()
        if self.activations != "none":
            if self.input_scale is None or self.input_zero_point is None:
                scale, zero_point = choose_input_qparams(inputs)
            else:
                scale, zero_point = self.input_scale, self.input_zero_point
            inputs = ((inputs / scale).round() + zero_point).clamp(0, 255).sub(zero_point) * scale
        return functional.linear(inputs, self.weight, self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        group = "row" if self.group_size >= self.in_features else str(self.group_size)
        weights = "nf4" if self.quant_type == "nf4" else f"int{self.bits}"
        return f"{self.in_features}, {self.out_features}, {weights} by {group}, activations={self.activations}"

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        """Move to another device but ignore dtype conversions: scales stay float32 in a bfloat16 net."""
        for name, value in list(self._buffers.items()):
            if value is not None:
                moved = fn(value)
                self._buffers[name] = value.to(moved.device) if moved.dtype != value.dtype else moved
        return self
