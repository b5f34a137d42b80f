"""ONNX operators for quantized linear layers: modules that replace `QuantizedLinear` while a net is traced.

| weights, activations  | operators                                                                            |
|-----------------------|--------------------------------------------------------------------------------------|
| int8 per row, dynamic | DynamicQuantizeLinear, MatMulInteger, Cast, Mul, which ONNX Runtime fuses            |
| int8 per row, static  | QuantizeLinear and DequantizeLinear around inputs and weights (QDQ)                  |
| int8 per row, none    | DequantizeLinear, MatMul                                                             |
| int8 per group, none  | Cast, Mul, Reshape, MatMul; the first three are constant-folded when the graph loads |
| int4 per group, none  | com.microsoft MatMulNBits                                                            |
| nf4, none             | com.microsoft MatMulBnb4                                                             |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mowa.kernels.quant.int4_layout import pack_nibbles
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.kernels.quant.nf4 import pack_bnb_4bit

MICROSOFT_DOMAIN = "com.microsoft"


class QuantMatMul(nn.Module):
    """A `QuantizedLinear` or `nn.Linear` with its tensors in the layout of the ONNX operators."""

    qweight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None
    input_scale: Tensor
    input_zero_point: Tensor

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.out_features, linear.in_features
        if isinstance(linear, nn.Linear):
            self.op, self.group_size = "float", 0
            self.register_buffer("qweight", linear.weight.detach().T.contiguous())
            self.register_buffer("bias", linear.bias)
            return
        self.group_size = linear.group_size
        self.op = select_op(linear)
        qweight, scale, zero_point = _lay_out(linear, self.op)
        zero = linear.input_zero_point
        self.register_buffer("qweight", qweight)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("bias", linear.bias)
        self.register_buffer("input_scale", linear.input_scale)
        self.register_buffer("input_zero_point", None if zero is None else zero.to(torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        y = self._matmul(x)
        return y if self.bias is None else y + self.bias

    def _matmul(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.out_features)
        sizes = {"K": self.in_features, "N": self.out_features, "block_size": self.group_size}
        if self.op == "float":
            return x @ self.qweight
        if self.op == "int4":
            inputs = (x, self.qweight, self.scale, *(() if self.zero_point is None else (self.zero_point,)))
            return _symbolic(f"{MICROSOFT_DOMAIN}::MatMulNBits", inputs, sizes | {"bits": 4}, x.dtype, shape)
        if self.op == "nf4":
            inputs = (x, self.qweight, self.scale)
            return _symbolic(f"{MICROSOFT_DOMAIN}::MatMulBnb4", inputs, sizes | {"quant_type": 1}, x.dtype, shape)
        if self.op == "grouped":
            return x @ (self.qweight.to(x.dtype) * self.scale).flatten(1)[:, : self.in_features].T
        if self.op == "dynamic":
            outputs: Any = {
                "dtypes": (torch.uint8, torch.float32, torch.uint8),
                "shapes": (x.shape, (), ()),
                "version": 1,
            }
            x_uint8, scale, zero_point = torch.onnx.ops.symbolic_multi_out("DynamicQuantizeLinear", (x,), {}, **outputs)
            sums = _symbolic("MatMulInteger", (x_uint8, self.qweight, zero_point), {}, torch.int32, shape)
            return sums.to(x.dtype) * (scale * self.scale)
        if self.op == "static":
            qparams = (self.input_scale, self.input_zero_point)
            x_uint8 = _symbolic("QuantizeLinear", (x, *qparams), {}, torch.uint8, x.shape)
            x = _symbolic("DequantizeLinear", (x_uint8, *qparams), {}, x.dtype, x.shape)
        weight = _symbolic("DequantizeLinear", (self.qweight, self.scale), {"axis": 1}, x.dtype, self.qweight.shape)
        return x @ weight


def _symbolic(
    name: str, inputs: Sequence[Tensor], attributes: dict[str, Any], dtype: torch.dtype, shape: Any
) -> Tensor:
    """Return an ONNX operator by name. It is only traced; `QuantizedLinear` computes the same result."""
    output: Tensor = torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=shape, version=1)
    return output


def select_op(linear: QuantizedLinear) -> str:
    """Return which of the operators of `QuantMatMul` computes a layer: nf4, int4, grouped, or its activations."""
    if linear.quant_type == "nf4":
        return "nf4"
    if linear.bits == 4:
        return "int4"
    return "grouped" if linear.group_size < linear.in_features else linear.activations


def _lay_out(linear: QuantizedLinear, op: str) -> tuple[Tensor, Tensor, Tensor | None]:
    qweight, scale, zero_point = linear.qweight, linear.scale, linear.zero_point
    if op == "grouped":
        padding = -qweight.shape[1] % linear.group_size
        return nn.functional.pad(qweight, (0, padding)).unflatten(1, (-1, linear.group_size)), scale[..., None], None
    if op == "nf4":
        return pack_bnb_4bit(qweight)[:, 0], scale.flatten(), None
    if op == "int4":
        padding = -qweight.shape[1] % linear.group_size
        unsigned = nn.functional.pad(qweight.to(torch.int16) + 8, (0, padding), value=8).to(torch.uint8)
        blocks = pack_nibbles(unsigned).unflatten(1, (-1, linear.group_size // 2))
        if zero_point is None:
            return blocks, scale.flatten(), None
        zeros = (zero_point.to(torch.int16) + 8).to(torch.uint8)
        zeros = pack_nibbles(nn.functional.pad(zeros, (0, zeros.shape[1] % 2), value=8)).flatten()
        return blocks, scale.flatten(), zeros
    return qweight.T.contiguous(), scale[:, 0].contiguous(), None


def replace_linears(net: Any, *, include_unquantized: bool = False) -> Any:
    """Replace the quantized linear layers of `net` in place by `QuantMatMul`, and return `net`.

    With `include_unquantized` all linear layers are replaced, so that several graphs store the same tensors.
    """
    for name, module in list(net.named_modules()):
        if isinstance(module, QuantizedLinear) or (include_unquantized and type(module) is nn.Linear):
            net.set_submodule(name, QuantMatMul(module))
    return net
