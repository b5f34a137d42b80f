"""Gated activations: one half of a layer's inner values opens and shuts the other.

    swiglu: y = silu(gate) · up        geglu: y = gelu(gate) · up        (arXiv:2002.05202)

What was activated is not kept for the backward pass, it is made again: of the three tensors as wide as the inner layer
that autograd would keep, two remain, and no pass makes a tensor that is not a result.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

aten = torch.ops.aten


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up. Both [...] of one shape and float dtype → the same; views with gaps (halves of one) will do."""
    out: Tensor = _Swiglu.apply(gate, up)
    return out


def geglu(gate: Tensor, up: Tensor, approximate: str = "tanh") -> Tensor:
    """gelu(gate) · up, by `tanh` (as Gemma) or exactly (`none`). Both [...] of one shape and float dtype → the same."""
    out: Tensor = _Geglu.apply(gate, up, approximate)
    return out


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate, up = ctx.saved_tensors
        d_gate = d_up = None
        if ctx.needs_input_grad[1]:
            d_up = F.silu(gate).mul_(gradient)
        if ctx.needs_input_grad[0]:
            d_gate = gradient * up
            aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        return d_gate, d_up


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, approximate: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.approximate = approximate
        return F.gelu(gate, approximate=approximate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        gate, up = ctx.saved_tensors
        d_gate = d_up = None
        if ctx.needs_input_grad[1]:
            d_up = F.gelu(gate, approximate=ctx.approximate).mul_(gradient)
        if ctx.needs_input_grad[0]:
            d_gate = gradient * up
            aten.gelu_backward.grad_input(d_gate, gate, approximate=ctx.approximate, grad_input=d_gate)
        return d_gate, d_up, None
