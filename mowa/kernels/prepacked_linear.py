"""A linear layer whose weights were laid out for this processor once, for products that are made again and again.

    y = x Wᵀ + b, or gelu(x Wᵀ + b), or x Wᵀ + b + r

In float32 and bfloat16 by oneDNN, with what follows the product made while it is still in the cache. In int8 (`kind`):

    ŵ[n, k] = round(w[n, k] / s[n]),  s[n] = max_k |w[n, k]| / 127
    x̂[m, k] = ⌊x[m, k] / t + z + ½⌋ in 0 … 255,  t = (max(x, 0) - min(x, 0)) / 255,  z = round(-min(x, 0) / t)
    y[m, n] = s[n] t Σ_k (x̂[m, k] - z) ŵ[n, k] + b[n]

with t and z of each x as it comes, or seen before; the sums are integers and exact. It knows tensors and no modules.

The operators are those that torch's own compiler emits for processors (torch/_inductor/mkldnn_lowerings.py); `works`
says whether this torch has them.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

ComputeDtype = Literal["float32", "bfloat16", "int8"]
PREPACK_ROWS = 512  # rows of x that the layout is chosen for; any number may come
UINT8_MAX = 255


class PrepackedLinear:
    """W [N, K] and b [N] (or None), packed; the originals are not kept.

    Called with x [M, K] of `dtype` (float32 for int8; rows may overlap in memory) → y [M, N] of `out`, which only int8
    may have other than x.
    """

    __slots__ = ("_bias", "_kind", "_out", "_range", "_scales", "_weight", "_zeros")

    def __init__(
        self, weight: Tensor, bias: Tensor | None, compute_dtype: ComputeDtype, out_dtype: torch.dtype | None = None
    ) -> None:
        self._kind = compute_dtype
        if compute_dtype == "int8":
            wide = weight.float()
            scales = (wide.abs().amax(1) / 127).clamp_(min=torch.finfo(torch.float32).tiny)
            self._pack((wide / scales[:, None]).round_().to(torch.int8), scales, bias, out_dtype, None)
            return
        dtype = getattr(torch, compute_dtype)
        self._out = dtype
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous(), PREPACK_ROWS)
        self._bias = None if bias is None else bias.to(dtype)

    @classmethod
    def from_qweight(
        cls,
        qweight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype | None = None,
        input_qparams: tuple[float, int] | None = None,
    ) -> PrepackedLinear:
        """In int8, of ŵ int8 [N, K] and s [N] as they are; t and z are `range_`, where it is given, for every x."""
        made = cls.__new__(cls)
        made._kind = "int8"
        made._pack(qweight, scale.float(), bias, out_dtype, input_qparams)
        return made

    def _pack(
        self,
        codes: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        out: torch.dtype | None,
        range_: tuple[float, int] | None,
    ) -> None:
        self._scales, self._zeros = scales, torch.zeros(len(codes), dtype=torch.int64)
        self._weight = torch.ops.onednn.qlinear_prepack(codes.contiguous(), [PREPACK_ROWS, codes.shape[1]])
        self._out, self._range = out or torch.float32, range_
        self._bias = None if bias is None else bias.float()

    def __call__(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        act = "gelu" if gelu else "none"
        if self._kind == "int8":
            return self._narrow(x, act)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, act, [], "none")
        return out

    def linear_add(self, x: Tensor, residual: Tensor) -> Tensor:
        """x Wᵀ + b + r, with r [M, N] of y's dtype. It is not written to."""
        if self._kind == "int8":
            return self._narrow(x, "none").add_(residual)
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._weight, self._bias, "add")
        return out

    def _narrow(self, x: Tensor, act: str) -> Tensor:
        step, zero = _steps(x) if self._range is None else self._range
        narrow = torch.add(torch.tensor(zero + 0.5), x.float(), alpha=1 / step)
        if self._range is not None:
            narrow.clamp_(0, UINT8_MAX)
            if not math.isfinite(float(narrow.sum())):
                step = math.nan  # as in `_steps`
        narrow = narrow.to(torch.uint8)  # cuts off, so rounds
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            narrow, step, zero, self._weight, self._scales, self._zeros, self._bias, 1.0, 0, self._out, act, [], "none"
        )
        return out


def _steps(x: Tensor) -> tuple[float, int]:
    """t and z. t is a hair wider, so that the largest x is not rounded up out of the range."""
    low, high = (float(value) for value in torch.aminmax(x))
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) * (1 + 1e-5) / UINT8_MAX or 1.0
    if not math.isfinite(step):
        return math.nan, 0  # so that y is not a number either
    return step, round(-low / step)


@lru_cache
def is_supported(compute_dtype: ComputeDtype) -> bool:
    """Whether this torch on this processor multiplies so and right; asked by a small product, once.

    int8 without VNNI may overflow in 16 bits where sums saturate, so what comes out is looked at.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, 96, generator=generator)
    weight, bias = torch.randn(48, 96, generator=generator), torch.randn(48, generator=generator)
    truth = functional.gelu(functional.linear(x.double(), weight.double(), bias.double()))
    try:
        with torch.inference_mode():
            y = PrepackedLinear(weight, bias, compute_dtype)(
                x if compute_dtype == "int8" else x.to(getattr(torch, compute_dtype)), gelu=True
            )
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    allowed = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 3e-2}[compute_dtype]
    return bool((y.double() - truth).norm() / truth.norm() < allowed)
