"""A linear layer over quantized weights: the reference that every engine and exporter is compared with."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mowa.kernels.quant.weights import QuantizedWeight

Activations = Literal["none", "dynamic", "static"]


def choose_input_qparams(x: Tensor) -> tuple[Tensor, Tensor]:
    """t and z of inputs, scalars, as ONNX's DynamicQuantizeLinear finds them."""
    low, high = torch.aminmax(x)
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = (high - low) / 255
    step = torch.where(step > 0, step, torch.ones_like(step))
    return step, (-low / step).round().clamp(0, 255)


class QuantizedLinear(nn.Module):
    """y = x̂ Ŵᵀ + b. Called with x [..., K] → [..., N] in x.dtype; this is the reference, engines have their own way.

    `activations`: wide (x̂ = x), dynamic (by the range of each x as it comes), static (by `step` and `zero`, seen
    before). `weight` is Ŵ, made anew whenever it is asked for.
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
        self.bits, self.group_size, self.quant_type, self.activations = (
            quantized.bits,
            quantized.group_size,
            quantized.quant_type,
            activations,
        )
        self.out_features, self.in_features = quantized.qweight.shape
        for name in ("qweight", "scale", "zero_point"):
            self.register_buffer(name, getattr(quantized, name))
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.register_buffer("input_scale", None if input_qparams is None else torch.tensor(input_qparams[0]))
        self.register_buffer(
            "input_zero_point", None if input_qparams is None else torch.tensor(float(input_qparams[1]))
        )

    @property
    def quantized_weight(self) -> QuantizedWeight:
        return QuantizedWeight(self.qweight, self.scale, self.zero_point, self.bits, self.group_size, self.quant_type)

    @property
    def weight(self) -> Tensor:
        return self.quantized_weight.dequantize()

    @property
    def input_qparams(self) -> tuple[float, int] | None:
        return (
            None
            if self.input_scale is None or self.input_zero_point is None
            else (float(self.input_scale), int(self.input_zero_point))
        )

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.float()
        if self.activations != "none":
            step, zero = (
                choose_input_qparams(inputs)
                if self.input_scale is None or self.input_zero_point is None
                else (self.input_scale, self.input_zero_point)
            )
            inputs = ((inputs / step).round() + zero).clamp(0, 255).sub(zero) * step
        return functional.linear(inputs, self.weight, self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        group = "row" if self.group_size >= self.in_features else str(self.group_size)
        form = "nf4" if self.quant_type == "nf4" else f"int{self.bits}"
        return f"{self.in_features}, {self.out_features}, {form} by {group}, x {self.activations}"

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        """Scales stay float32 whatever the net is converted to: only the device may change."""
        for name, value in list(self._buffers.items()):
            if value is not None:
                moved = fn(value)
                self._buffers[name] = value.to(moved.device) if moved.dtype != value.dtype else moved
        return self
