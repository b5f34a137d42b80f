"""Rotary position embedding (arXiv:2104.09864) in one new buffer for each of q and k.

With x = (x₁, x₂) the two halves of the first R channels of a head, and (c₁, c₂), (s₁, s₂) those of cos and sin:

    y₁ = x₁·c₁ - x₂·s₁        dx₁ = dy₁·c₁ + dy₂·s₂
    y₂ = x₂·c₂ + x₁·s₂        dx₂ = dy₂·c₂ - dy₁·s₁        a rotation by the negative angle, as s₁ = s₂

Channels from R on stay as they are (partial rotary). Which angles belong to a position is not known here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """q [B, H, T, D], k [B, G, T, D] turned by the angles of cos, sin [B, T, R] (R ≤ D even; no gradient is theirs).

    `heads` is the dimension in which q and k count heads: 1 as above, 2 for [B, T, H, D]. In the wider dtype of q and
    cos, as transformers' `apply_rotary_pos_emb` gives; rounded once, where that rounds three times.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rope.apply(q, cos, sin), _Rope.apply(k, cos, sin)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _turn(x, cos, -sin[..., : sin.shape[-1] // 2], sin[..., sin.shape[-1] // 2 :])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        half = sin.shape[-1] // 2
        return _turn(gradient, cos, sin[..., half:], -sin[..., :half]).to(ctx.dtype), None, None


def _turn(x: Tensor, cos: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """(x₁·c₁ + x₂·first, x₂·c₂ + x₁·second, rest of x), in the wider dtype."""
    turned = cos.shape[-1]
    half = turned // 2
    if turned == x.shape[-1]:
        out = x * cos
    else:
        out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, cos.dtype))
        torch.mul(x[..., :turned], cos, out=out[..., :turned])
        out[..., turned:] = x[..., turned:]
    out[..., :half].addcmul_(x[..., half:turned], first)
    out[..., half:turned].addcmul_(x[..., :half], second)
    return out
