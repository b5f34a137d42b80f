"""Attention over sequences that lie end to end: every frame sees its own sequence and no other.

    y[t] = Σ_u softmax_u(scale · q[t]·k[u]) v[u],   u over the sequence that t lies in

A block-diagonal mask would say the same, at the price of all the blocks beside the diagonal. Here the blocks are gone
through one by one; on a CUDA device in half precision, in one launch of FlashAttention (arXiv:2205.14135).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from mowa.kernels.dropout import drop


@dataclass(frozen=True)
class Segments:
    """Lengths, in frames, of sequences that lie end to end."""

    lengths: tuple[int, ...]

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The frame at which each begins, and the one after the last."""
        starts = [0]
        for length in self.lengths:
            starts.append(starts[-1] + length)
        return tuple(starts)

    @cached_property
    def _on_device(self) -> dict[torch.device, Tensor]:
        return {}

    def bounds(self, device: torch.device) -> Tensor:
        """`starts` as int32 [count + 1], made once a device."""
        if device not in self._on_device:
            self._on_device[device] = torch.tensor(self.starts, dtype=torch.int32, device=device)
        return self._on_device[device]


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, scale: float, dropout: float = 0.0) -> Tensor:
    """q, k, v [1, H, T, D] of one float dtype, T the sum of the segments' lengths → [1, T, H, D] in it."""
    if in_one_launch(q, dropout):
        return _flash(q, k, v, segments, scale)
    one = _dropping if dropout and q.device.type == "cpu" else F.scaled_dot_product_attention
    parts = [
        one(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], dropout_p=dropout, scale=scale)
        for a, b in zip(segments.starts, segments.starts[1:], strict=False)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)


def _dropping(q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float, scale: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = torch.softmax(q @ k.transpose(-2, -1) * scale, dim=-1, dtype=wide).to(q.dtype)
    return drop(weights, dropout_p) @ v


def in_one_launch(q: Tensor, dropout: float) -> bool:
    """The rule: CUDA, half precision, heads that FlashAttention takes, no dropout (its varlen form has none)."""
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256 and not dropout


def _flash(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = segments.bounds(q.device), max(segments.lengths)
    q, k, v = (part[0].transpose(0, 1).contiguous() for part in (q, k, v))
    out: Tensor = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale)  # type: ignore[assignment]
    return out[None]
