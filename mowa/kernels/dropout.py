"""Dropout for processors, where the random numbers of torch's own cost more than the matrix products around them.

    y = x · m / (1 - p),   m = 0 with probability p, else 1

torch draws a double for every element, in one thread; here 16 bits of a counter-free generator (SFC64) decide, so p is
met to 1/65536. Its seed is drawn from torch's generator: what replays that (checkpointing, resuming) replays the masks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

LEVELS = 1 << 16


def sample_keep_mask(shape: torch.Size, p: float) -> Tensor:
    """A mask bool [shape]: false with probability p."""
    seed = int(torch.randint(torch.iinfo(torch.int64).max, ()))
    count = shape.numel()
    bits = torch.from_numpy(np.random.SFC64(seed).random_raw(-(-count // 4)).view(np.int16))
    return (bits[:count] >= round(p * LEVELS) - LEVELS // 2).view(shape)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        ctx.scale = 1 / (1 - p)
        mask = sample_keep_mask(x.shape, p)
        ctx.save_for_backward(mask)
        return torch.where(mask, x * ctx.scale, 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return torch.where(mask, gradient * ctx.scale, 0), None


def cpu_dropout(x: Tensor, p: float) -> Tensor:
    """x on a processor, of any float dtype and shape → the same with a share p of its elements zero; 0 ≤ p < 1."""
    out: Tensor = _Drop.apply(x, p) if p else x
    return out
