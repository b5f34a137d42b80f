"""A frozen linear with a LoRA update (arXiv:2106.09685) as one operation.

    y  = x Wᵀ + b + s · (x Aᵀ) Bᵀ
    dx = dy W + s · (dy B) A
    dA = s · (dy B)ᵀ x,   dB = s · dyᵀ (x Aᵀ)

The update is added by the matrix product that computes it, in place: one temporary of y's size in the forward pass and
one of x's size in the backward pass, where PEFT's modules need four and three. x is saved in its own dtype (so
linears with one input share it), and x Aᵀ [..., R] is saved too. W gets no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """Return x Wᵀ + b + scale · (x Aᵀ) Bᵀ, [..., O], in the dtype of x Wᵀ.

    Under autocast everything is cast to its dtype. Otherwise x and weight have one dtype; lora_a and lora_b may be in a
    wider one, in which the update is then computed, added and trained, as PEFT does.

    Args:
        x: [..., I].
        weight: [O, I], frozen.
        bias: [O] or None.
        lora_a: [R, I].
        lora_b: [O, R].
        scale: s, alpha / R for LoRA.

    Raises:
        ValueError: weight requires a gradient.
    """
    if weight.requires_grad:
        raise ValueError("lora_linear: weight must be frozen (requires_grad=False); use nn.Linear to train it")
    kind = x.device.type
    casting = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    compute = torch.get_autocast_dtype(kind) if casting else None
    out: Tensor = _LoraLinear.apply(x, weight, bias, lora_a, lora_b, scale, compute)
    return out


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        compute: torch.dtype | None,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(compute or x.dtype)
        low = F.linear(rows.to(compute or a.dtype), a.to(compute or a.dtype))
        out = F.linear(rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype))
        update = b.to(low.dtype).t()
        if out.dtype == low.dtype:
            out.addmm_(low, update, alpha=scale)
        else:
            out = out.to(low.dtype).addmm_(low, update, alpha=scale).to(out.dtype)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scale, ctx.compute = scale, compute
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):  # regardless of backward()'s caller
            dy = gradient.reshape(-1, gradient.shape[-1])
            wide = dy.to(low.dtype)
            dx = dbias = da = db = None
            if ctx.needs_input_grad[4]:
                db = (wide.t() @ low).mul_(ctx.scale).to(b.dtype)
            if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
                d_low = wide @ b.to(low.dtype)
            if ctx.needs_input_grad[3]:
                rows = x.reshape(-1, x.shape[-1]).to(ctx.compute or x.dtype).to(low.dtype)
                da = (d_low.t() @ rows).mul_(ctx.scale).to(a.dtype)
            if ctx.needs_input_grad[0]:
                dx = (
                    _input_gradient(dy, weight.to(dy.dtype), d_low, a.to(low.dtype), ctx.scale)
                    .to(x.dtype)
                    .view(x.shape)
                )
            if ctx.needs_input_grad[2]:
                dbias = dy.sum(0)
        return dx, None, dbias, da, db, None, None


def _input_gradient(dy: Tensor, weight: Tensor, d_low: Tensor, a: Tensor, scale: float) -> Tensor:
    dx = dy @ weight
    if dx.dtype == a.dtype:
        return dx.addmm_(d_low, a, alpha=scale)
    return dx.to(a.dtype).addmm_(d_low, a, alpha=scale)
