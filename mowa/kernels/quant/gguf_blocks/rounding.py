"""Rounding as ggml does it, on whole tensors, so that encoded blocks are the same to the byte."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING_OFFSET = 12582912.0  # 1.5 · 2²³: a float32 of this size has no fractional bits
BELOW_HALF = 0.49999997  # the largest float32 below 0.5


def nearest_int(x: Tensor) -> Tensor:
    """Round float32 to the nearest integer, ties to even → int32 of the same shape.

    Beyond ±2²² and for NaN the result is the meaningless number in -2²² … 2²² - 1 that ggml computes there.
    """
    return (x + ROUNDING_OFFSET).view(torch.int32).bitwise_and_(0x7FFFFF).sub_(0x400000)


def round_half_away(x: Tensor) -> Tensor:
    """Round float32 below 127.5 to int8, ties away from zero; NaN and infinity give 0."""
    return torch.copysign(x.new_full((), BELOW_HALF), x).add_(x).nan_to_num_(0, 0, 0).to(torch.int8)


def truncate(x: Tensor) -> Tensor:
    """Truncate float32 in 0 … 255 to uint8; NaN and infinity give 0."""
    return x.nan_to_num(0, 0, 0).to(torch.uint8)


def divide(numerator: Tensor | float, denominator: Tensor | float) -> Tensor:
    """Divide float32, rounded once; torch multiplies by the rounded reciprocal where one side is a Python number."""
    like = numerator if isinstance(numerator, Tensor) else denominator
    assert isinstance(like, Tensor)
    top, bottom = (one if isinstance(one, Tensor) else like.new_full((), one) for one in (numerator, denominator))
    return torch.div(top, bottom)


def square_root(x: Tensor) -> Tensor:
    """Return √x of float32, rounded once; `torch.sqrt` is off by one unit in the last place for a fifth of numbers."""
    return x.double().sqrt_().float()


def reciprocal_or_zero(x: Tensor) -> Tensor:
    """Return 1 / x, and 0 where x is 0."""
    return torch.where(x != 0, divide(1, x), 0)


def half_bytes(x: Tensor) -> Tensor:
    """Round float32 [B] to float16, ties to even → uint8 [B, 2], the lower byte first."""
    return x.half()[:, None].view(torch.uint8)


def half_round(x: Tensor) -> Tensor:
    """Round float32 to the nearest float16, as float32."""
    return x.half().float()


def read_half(blocks: Tensor, offset: int) -> Tensor:
    """Read the float16 at byte `offset` of blocks uint8 [B, n] → float32 [B, 1]."""
    return blocks[:, offset : offset + 2].contiguous().view(torch.float16).float()
