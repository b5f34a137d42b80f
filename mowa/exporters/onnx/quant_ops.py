"""Products with narrow weights as ONNX has them: what takes a `NarrowLinear`'s place while a net is traced.

| weights, inputs        | operators                                                                              |
|------------------------|----------------------------------------------------------------------------------------|
| int8 by row, dynamic   | DynamicQuantizeLinear, MatMulInteger, Cast, Mul: ONNX Runtime makes one product of them |
| int8 by row, static    | QuantizeLinear and DequantizeLinear around inputs and weights (QDQ)                     |
| int8 by row, wide      | DequantizeLinear, MatMul                                                                |
| int8 in groups, wide   | Cast, Mul, Reshape, MatMul; the first three are done once, when the graph is loaded     |
| int4 in groups, wide   | com.microsoft MatMulNBits                                                               |
| nf4, wide              | com.microsoft MatMulBnb4                                                                |

Files and which linears are narrow are not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mowa.kernels.quant.int4_layout import pack_bnb_4bit, pack_nibbles
from mowa.kernels.quant.linear import QuantizedLinear

MICROSOFT_DOMAIN = "com.microsoft"


class QuantMatMul(nn.Module):
    """A `NarrowLinear` (or a linear) with its tensors laid out as the operators want them."""

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
            self.register_buffer("codes", linear.weight.detach().T.contiguous())
            self.register_buffer("bias", linear.bias)
            return
        self.group_size = linear.group
        self.op = select_op(linear)
        codes, scales, zeros = _laid_out(linear, self.op)
        for name, value in (("codes", codes), ("scales", scales), ("zeros", zeros), ("bias", linear.bias)):
            self.register_buffer(name, value)
        self.register_buffer("step", linear.step)
        self.register_buffer("zero", None if linear.zero is None else linear.zero.to(torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        made = self._product(x)
        return made if self.bias is None else made + self.bias

    def _product(self, x: Tensor) -> Tensor:
        out = (*x.shape[:-1], self.out_features)
        sizes = {"K": self.in_features, "N": self.out_features, "block_size": self.group_size}
        if self.op == "float":
            return x @ self.qweight
        if self.op == "int4":
            given = (
                (x, self.qweight, self.scale)
                if self.zero_point is None
                else (x, self.qweight, self.scale, self.zero_point)
            )
            return _op(f"{MICROSOFT_DOMAIN}::MatMulNBits", given, sizes | {"bits": 4}, x.dtype, out)
        if self.op == "nf4":
            given = (x, self.qweight, self.scale)
            return _op(f"{MICROSOFT_DOMAIN}::MatMulBnb4", given, sizes | {"quant_type": 1}, x.dtype, out)
        if self.op == "grouped":
            return x @ (self.qweight.to(x.dtype) * self.scale).flatten(1)[:, : self.in_features].T
        if self.op == "dynamic":
            kinds: Any = {
                "dtypes": (torch.uint8, torch.float32, torch.uint8),
                "shapes": (x.shape, (), ()),
                "version": 1,
            }
            narrow, step, middle = torch.onnx.ops.symbolic_multi_out("DynamicQuantizeLinear", (x,), {}, **kinds)
            sums = _op("MatMulInteger", (narrow, self.qweight, middle), {}, torch.int32, out)
            return sums.to(x.dtype) * (step * self.scale)
        if self.op == "static":
            how = (self.input_scale, self.input_zero_point)
            x = _op(
                "DequantizeLinear",
                (_op("QuantizeLinear", (x, *how), {}, torch.uint8, x.shape), *how),
                {},
                x.dtype,
                x.shape,
            )
        wide = _op("DequantizeLinear", (self.qweight, self.scale), {"axis": 1}, x.dtype, self.qweight.shape)
        return x @ wide


def _op(name: str, given: Sequence[Tensor], attributes: dict[str, Any], dtype: torch.dtype, shape: Any) -> Tensor:
    """An ONNX operator by its name. It is traced and never computed: `NarrowLinear` says what it gives."""
    made: Tensor = torch.onnx.ops.symbolic(name, given, attributes, dtype=dtype, shape=shape, version=1)
    return made


def select_op(linear: QuantizedLinear) -> str:
    if linear.quant_type == "nf4":
        return "nf4"
    if linear.bits == 4:
        return "int4"
    return "grouped" if linear.group_size < linear.in_features else linear.activations


def _laid_out(linear: QuantizedLinear, kind: str) -> tuple[Tensor, Tensor, Tensor | None]:
    codes, scales, zeros = linear.qweight, linear.scale, linear.zero_point
    if kind == "grouped":
        spare = -codes.shape[1] % linear.group_size
        return nn.functional.pad(codes, (0, spare)).unflatten(1, (-1, linear.group_size)), scales[..., None], None
    if kind == "nf4":
        return pack_bnb_4bit(codes)[:, 0], scales.flatten(), None
    if kind == "int4":
        spare = -codes.shape[1] % linear.group_size
        wide = nn.functional.pad(codes.to(torch.int16) + 8, (0, spare), value=8).to(torch.uint8)
        blocks = pack_nibbles(wide).unflatten(1, (-1, linear.group_size // 2))
        shifted = None if zeros is None else (zeros.to(torch.int16) + 8).to(torch.uint8)
        if shifted is not None:
            shifted = pack_nibbles(nn.functional.pad(shifted, (0, shifted.shape[1] % 2), value=8)).flatten()
        return blocks, scales.flatten(), shifted
    return codes.T.contiguous(), scales[:, 0].contiguous(), None


def replace_linears(net: Any, *, include_unquantized: bool = False) -> Any:
    """Products in the place of the narrow linears of `net`, which is changed.

    With `floats` in that of all linears, so that every graph of the net has its weights laid out alike.
    """
    for name, module in list(net.named_modules()):
        if isinstance(module, QuantizedLinear) or (include_unquantized and type(module) is nn.Linear):
            net.set_submodule(name, QuantMatMul(module))
    return net
