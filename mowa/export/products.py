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

from mowa.kernels.narrow import NarrowLinear
from mowa.kernels.packing import halves, pairs

MICROSOFT = "com.microsoft"


class Product(nn.Module):
    """A `NarrowLinear` (or a linear) with its tensors laid out as the operators want them."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None
    step: Tensor
    zero: Tensor

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.rows, self.columns = linear.out_features, linear.in_features
        if isinstance(linear, nn.Linear):
            self.kind, self.group = "float", 0
            self.register_buffer("codes", linear.weight.detach().T.contiguous())
            self.register_buffer("bias", linear.bias)
            return
        self.group = linear.group
        self.kind = kind_of(linear)
        codes, scales, zeros = _laid_out(linear, self.kind)
        for name, value in (("codes", codes), ("scales", scales), ("zeros", zeros), ("bias", linear.bias)):
            self.register_buffer(name, value)
        self.register_buffer("step", linear.step)
        self.register_buffer("zero", None if linear.zero is None else linear.zero.to(torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        made = self._product(x)
        return made if self.bias is None else made + self.bias

    def _product(self, x: Tensor) -> Tensor:
        out = (*x.shape[:-1], self.rows)
        sizes = {"K": self.columns, "N": self.rows, "block_size": self.group}
        if self.kind == "float":
            return x @ self.codes
        if self.kind == "int4":
            given = (x, self.codes, self.scales) if self.zeros is None else (x, self.codes, self.scales, self.zeros)
            return _op(f"{MICROSOFT}::MatMulNBits", given, sizes | {"bits": 4}, x.dtype, out)
        if self.kind == "nf4":
            given = (x, self.codes, self.scales)
            return _op(f"{MICROSOFT}::MatMulBnb4", given, sizes | {"quant_type": 1}, x.dtype, out)
        if self.kind == "grouped":
            return x @ (self.codes.to(x.dtype) * self.scales).flatten(1)[:, : self.columns].T
        if self.kind == "dynamic":
            kinds: Any = {
                "dtypes": (torch.uint8, torch.float32, torch.uint8),
                "shapes": (x.shape, (), ()),
                "version": 1,
            }
            narrow, step, middle = torch.onnx.ops.symbolic_multi_out("DynamicQuantizeLinear", (x,), {}, **kinds)
            sums = _op("MatMulInteger", (narrow, self.codes, middle), {}, torch.int32, out)
            return sums.to(x.dtype) * (step * self.scales)
        if self.kind == "static":
            how = (self.step, self.zero)
            x = _op(
                "DequantizeLinear",
                (_op("QuantizeLinear", (x, *how), {}, torch.uint8, x.shape), *how),
                {},
                x.dtype,
                x.shape,
            )
        wide = _op("DequantizeLinear", (self.codes, self.scales), {"axis": 1}, x.dtype, self.codes.shape)
        return x @ wide


def _op(name: str, given: Sequence[Tensor], attributes: dict[str, Any], dtype: torch.dtype, shape: Any) -> Tensor:
    """An ONNX operator by its name. It is traced and never computed: `NarrowLinear` says what it gives."""
    made: Tensor = torch.onnx.ops.symbolic(name, given, attributes, dtype=dtype, shape=shape, version=1)
    return made


def kind_of(linear: NarrowLinear) -> str:
    if linear.form == "nf4":
        return "nf4"
    if linear.bits == 4:
        return "int4"
    return "grouped" if linear.group < linear.in_features else linear.activations


def _laid_out(linear: NarrowLinear, kind: str) -> tuple[Tensor, Tensor, Tensor | None]:
    codes, scales, zeros = linear.codes, linear.scales, linear.zeros
    if kind == "grouped":
        spare = -codes.shape[1] % linear.group
        return nn.functional.pad(codes, (0, spare)).unflatten(1, (-1, linear.group)), scales[..., None], None
    if kind == "nf4":
        return pairs(codes)[:, 0], scales.flatten(), None
    if kind == "int4":
        spare = -codes.shape[1] % linear.group
        wide = nn.functional.pad(codes.to(torch.int16) + 8, (0, spare), value=8).to(torch.uint8)
        blocks = halves(wide).unflatten(1, (-1, linear.group // 2))
        shifted = None if zeros is None else (zeros.to(torch.int16) + 8).to(torch.uint8)
        if shifted is not None:
            shifted = halves(nn.functional.pad(shifted, (0, shifted.shape[1] % 2), value=8)).flatten()
        return blocks, scales.flatten(), shifted
    return codes.T.contiguous(), scales[:, 0].contiguous(), None


def put(net: Any, *, floats: bool = False) -> Any:
    """Products in the place of the narrow linears of `net`, which is changed.

    With `floats` in that of all linears, so that every graph of the net has its weights laid out alike.
    """
    for name, module in list(net.named_modules()):
        if isinstance(module, NarrowLinear) or (floats and type(module) is nn.Linear):
            net.set_submodule(name, Product(module))
    return net
