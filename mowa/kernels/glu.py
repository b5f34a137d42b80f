"""Gated activations with less saved for the backward pass.

    swiglu: y = silu(gate) · up        geglu: y = gelu(gate) · up        (arXiv:2002.05202)

The activation of the gate is recomputed in the backward pass, so two tensors of the intermediate size are saved where
autograd saves three.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

aten = torch.ops.aten


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) · up. All three [...] have one shape and float dtype; inputs may be non-contiguous."""
    out: Tensor = _Swiglu.apply(gate, up)
    return out


def geglu(gate: Tensor, up: Tensor, approximate: str = "tanh") -> Tensor:
    """Return gelu(gate) · up, approximate: tanh (as Gemma) or none (exact). Shapes as in `swiglu`."""
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
