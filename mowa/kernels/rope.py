"""Rotary position embedding (arXiv:2104.09864) with one new buffer each for q and k.

With x = (x₁, x₂) the halves of the first R channels of a head, and (c₁, c₂), (s₁, s₂) those of cos and sin:

    y₁ = x₁·c₁ - x₂·s₁        dx₁ = dy₁·c₁ + dy₂·s₂
    y₂ = x₂·c₂ + x₁·s₂        dx₂ = dy₂·c₂ - dy₁·s₁        the rotation by the negative angle, as s₁ = s₂

Channels from R on are left as they are (partial rotary). No model uses it yet: transformers calls a module-level
function for rotary embeddings, which cannot be replaced on one net alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Rotate q and k by the angles of cos and sin.

    Args:
        q: [B, H, T, D], any float dtype.
        k: [B, G, T, D].
        cos: [B, T, R], R ≤ D and even; gets no gradient.
        sin: [B, T, R].
        unsqueeze_dim: dimension of the heads in q and k; 2 for [B, T, H, D].

    Returns:
        Rotated q and k in the wider dtype of q and cos, as transformers' `apply_rotary_pos_emb`, but rounded once
        instead of three times.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rope.apply(q, cos, sin), _Rope.apply(k, cos, sin)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _rotate(x, cos, -sin[..., : sin.shape[-1] // 2], sin[..., sin.shape[-1] // 2 :])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        half = sin.shape[-1] // 2
        return _rotate(gradient, cos, sin[..., half:], -sin[..., :half]).to(ctx.dtype), None, None


def _rotate(x: Tensor, cos: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return (x₁·c₁ + x₂·first, x₂·c₂ + x₁·second, rest of x) in the wider dtype."""
    rotary_dim = cos.shape[-1]
    half = rotary_dim // 2
    if rotary_dim == x.shape[-1]:
        out = x * cos
    else:
        out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, cos.dtype))
        torch.mul(x[..., :rotary_dim], cos, out=out[..., :rotary_dim])
        out[..., rotary_dim:] = x[..., rotary_dim:]
    out[..., :half].addcmul_(x[..., half:rotary_dim], first)
    out[..., half:rotary_dim].addcmul_(x[..., :half], second)
    return out
