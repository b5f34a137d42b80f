"""Dropout on CPUs, where torch's own random numbers cost more than the matrix products around them.

    y = x · m / (1 - p),   m = 0 with probability p, else 1

torch draws a double per element, in one thread. This draws 16 bits per element from a SFC64 generator, so p is exact to
1/65536. The generator is seeded from torch's, so code that restores torch's state (checkpointing, resuming) gets the
same masks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

LEVELS = 1 << 16


def sample_keep_mask(shape: torch.Size, p: float) -> Tensor:
    """Return a random bool mask of `shape`, False with probability p."""
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
    """Return x, a CPU tensor of any float dtype and shape, with a fraction p of its elements zeroed; 0 ≤ p < 1."""
    out: Tensor = _Drop.apply(x, p) if p else x
    return out
