"""Root-mean-square norm whose backward pass saves no float32 copy of its input.

    y = x · r · w,   r = (mean_d x² + eps)^-½          w = weight, or 1 + weight
    dx = r · (t - x · r² · mean_d (t · x)),  t = dy · w
    dw = Σ_n dy · x · r

Source: arXiv:1910.07467. With autograd the same takes a dozen passes over memory and keeps x in float32 as well.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    plus_one: bool = False,
    rounding: Literal["before", "after"] = "before",
) -> Tensor:
    """Scale each row of x to unit root-mean-square, then by `weight` (or 1 + `weight`).

    Bit for bit what transformers computes: LlamaRMSNorm by default, GemmaRMSNorm with plus_one and rounding="after".

    Args:
        x: [..., D], any float dtype. Sums are in float32, or float64 where x is.
        weight: [D], any float dtype.
        eps: added to the mean square.
        plus_one: scale by 1 + weight.
        rounding: to x's dtype before the weight is applied (result in the wider dtype of x and weight), or after.

    Returns:
        [..., D].
    """
    out: Tensor = _RmsNorm.apply(x, weight, eps, plus_one, rounding == "before")
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, plus_one: bool, before: bool) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        out = wide.square()
        r = out.mean(-1, keepdim=True).add_(eps).rsqrt_()
        torch.mul(wide, r, out=out)
        ctx.save_for_backward(x, weight, r)
        ctx.plus_one = plus_one
        if not before:
            return out.mul_(_scale(weight, plus_one, out.dtype)).to(x.dtype)
        out = out.to(x.dtype)
        scale = _scale(weight, plus_one, weight.dtype)
        return out.mul_(scale) if torch.promote_types(x.dtype, weight.dtype) == x.dtype else out * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        wide = x.to(r.dtype)
        dx = dweight = None
        if ctx.needs_input_grad[1]:
            by_row = torch.mul(gradient, wide).mul_(r)
            dweight = by_row.flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            t = gradient * _scale(weight, ctx.plus_one, r.dtype)
            share = (t * wide).mean(-1, keepdim=True).mul_(r).mul_(r)
            dx = t.addcmul_(wide, share, value=-1).mul_(r).to(x.dtype)
        return dx, dweight, None, None, None


def _scale(weight: Tensor, plus_one: bool, dtype: torch.dtype) -> Tensor:
    weight = weight.to(dtype)
    return weight + 1 if plus_one else weight
