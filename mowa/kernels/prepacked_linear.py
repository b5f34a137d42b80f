"""A linear layer for CPUs with weights prepacked for oneDNN, for inference.

    y = x Wᵀ + b, or gelu(x Wᵀ + b), or x Wᵀ + b + r

In float32 and bfloat16 oneDNN fuses what follows the product. In int8:

    ŵ[n, k] = round(w[n, k] / s[n]),  s[n] = max_k |w[n, k]| / 127
    x̂[m, k] = ⌊x[m, k] / t + z + ½⌋ in 0 … 255,  t = (max(x, 0) - min(x, 0)) / 255,  z = round(-min(x, 0) / t)
    y[m, n] = s[n] t Σ_k (x̂[m, k] - z) ŵ[n, k] + b[n]

with t and z of each x, or given; the sums are exact integers.

The operators are those that torch's compiler emits for CPUs (torch/_inductor/mkldnn_lowerings.py); `is_supported` tells
whether this torch has them.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

ComputeDtype = Literal["float32", "bfloat16", "int8"]
PREPACK_ROWS = 512  # rows of x that the layout is optimized for; any number works
UINT8_MAX = 255


class PrepackedLinear:
    """W [N, K] and b [N] (or None), packed; the originals are not kept.

    Called with x [M, K] in `compute_dtype` (float32 for int8; rows may overlap in memory) → y [M, N].

    Args:
        weight: [N, K], any float dtype.
        bias: [N] or None.
        compute_dtype: float32, bfloat16 or int8.
        out_dtype: of y, for int8 only (float32 by default); otherwise y has x's dtype.
    """

    __slots__ = ("_bias", "_compute_dtype", "_input_qparams", "_out_dtype", "_scale", "_weight", "_zero_points")

    def __init__(
        self, weight: Tensor, bias: Tensor | None, compute_dtype: ComputeDtype, out_dtype: torch.dtype | None = None
    ) -> None:
        self._compute_dtype = compute_dtype
        if compute_dtype == "int8":
            weight = weight.float()
            scale = (weight.abs().amax(1) / 127).clamp_(min=torch.finfo(torch.float32).tiny)
            self._pack((weight / scale[:, None]).round_().to(torch.int8), scale, bias, out_dtype, None)
            return
        dtype = getattr(torch, compute_dtype)
        self._out_dtype = dtype
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
        """Pack an already quantized W for int8: qweight int8 [N, K] and scale [N].

        input_qparams: t and z for every x; None: computed from each x.
        """
        linear = cls.__new__(cls)
        linear._compute_dtype = "int8"
        linear._pack(qweight, scale.float(), bias, out_dtype, input_qparams)
        return linear

    def _pack(
        self,
        qweight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype | None,
        input_qparams: tuple[float, int] | None,
    ) -> None:
        self._scale, self._zero_points = scale, torch.zeros(len(qweight), dtype=torch.int64)
        self._weight = torch.ops.onednn.qlinear_prepack(qweight.contiguous(), [PREPACK_ROWS, qweight.shape[1]])
        self._out_dtype, self._input_qparams = out_dtype or torch.float32, input_qparams
        self._bias = None if bias is None else bias.float()

    def __call__(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        act = "gelu" if gelu else "none"
        if self._compute_dtype == "int8":
            return self._forward_int8(x, act)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, act, [], "none")
        return out

    def linear_add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return x Wᵀ + b + residual, with residual [M, N] of y's dtype, which is not modified."""
        if self._compute_dtype == "int8":
            return self._forward_int8(x, "none").add_(residual)
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._weight, self._bias, "add")
        return out

    def _forward_int8(self, x: Tensor, act: str) -> Tensor:
        scale, zero_point = _choose_qparams(x) if self._input_qparams is None else self._input_qparams
        shifted = torch.add(torch.tensor(zero_point + 0.5), x.float(), alpha=1 / scale)
        if self._input_qparams is not None:
            shifted.clamp_(0, UINT8_MAX)
            if not math.isfinite(float(shifted.sum())):
                scale = math.nan  # as in `_choose_qparams`
        x_uint8 = shifted.to(torch.uint8)  # truncates, which with the ½ added is rounding
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            *(x_uint8, scale, zero_point, self._weight, self._scale, self._zero_points, self._bias),
            *(1.0, 0, self._out_dtype, act, [], "none"),
        )
        return out


def _choose_qparams(x: Tensor) -> tuple[float, int]:
    """Return t and z, t slightly larger so that the largest x is not rounded up beyond 255; NaN for x not finite."""
    low, high = (float(value) for value in torch.aminmax(x))
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) * (1 + 1e-5) / UINT8_MAX or 1.0
    if not math.isfinite(scale):
        return math.nan, 0  # makes y NaN as well
    return scale, round(-low / scale)


@lru_cache
def is_supported(compute_dtype: ComputeDtype) -> bool:
    """Whether this torch on this CPU computes such products correctly; tried on a small product once per process.

    int8 without VNNI instructions may saturate 16-bit sums, so the result is checked.
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
