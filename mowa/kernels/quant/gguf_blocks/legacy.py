"""Encode the types with one scale per 32 weights: q8_0, q4_0, q4_1, q5_0, q5_1 (x ≈ d l, or x ≈ d l + m).

Without an importance matrix the scale follows from the extremes of the block; with one it is searched. An encoder
takes weights x, float32 [B, 32], and the weights of their squared errors, [B, 32], or None, and returns the blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mowa.kernels.quant.gguf_blocks.packing import pack_bits
from mowa.kernels.quant.gguf_blocks.reductions import first_peak, lowest
from mowa.kernels.quant.gguf_blocks.rounding import divide, half_bytes, reciprocal_or_zero, round_half_away, truncate
from mowa.kernels.quant.gguf_blocks.search import AffineSearch, search_affine, search_symmetric


def encode_q8_0(x: Tensor, weights: Tensor | None) -> Tensor:
    """Return uint8 [B, 34]: d, then 32 int8. `weights` are not used."""
    scale = divide(x.abs().amax(1), 127)
    codes = round_half_away(x * reciprocal_or_zero(scale)[:, None])
    return torch.cat([half_bytes(scale), codes.view(torch.uint8)], 1)


def encode_q4_0(x: Tensor, weights: Tensor | None) -> Tensor:
    """Return uint8 [B, 18]: d, then 32 integers l + 8 of four bits."""
    scale, codes = _symmetric(x, weights, 8)
    return torch.cat([half_bytes(scale), pack_nibbles(codes)], 1)


def encode_q5_0(x: Tensor, weights: Tensor | None) -> Tensor:
    """Return uint8 [B, 22]: d, the fifth bits of 32 integers l + 16, then their four lower bits."""
    scale, codes = _symmetric(x, weights, 16)
    return torch.cat([half_bytes(scale), _pack_fifth_bits(codes), pack_nibbles(codes & 15)], 1)


def encode_q4_1(x: Tensor, weights: Tensor | None) -> Tensor:
    """Return uint8 [B, 20]: d, m, then 32 integers of four bits."""
    scale, minimum, codes = _affine(x, weights, 15)
    return torch.cat([half_bytes(scale), half_bytes(minimum), pack_nibbles(codes)], 1)


def encode_q5_1(x: Tensor, weights: Tensor | None) -> Tensor:
    """Return uint8 [B, 24]: d, m, the fifth bits of 32 integers, then their four lower bits."""
    scale, minimum, codes = _affine(x, weights, 31)
    return torch.cat([half_bytes(scale), half_bytes(minimum), _pack_fifth_bits(codes), pack_nibbles(codes & 15)], 1)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack uint8 [32, B] in 0 … 15 → [B, 16]: weight i in the low half of byte i, weight i + 16 in the high half."""
    return pack_bits(codes.unflatten(0, (2, 16)), 4, 0).T


def _pack_fifth_bits(codes: Tensor) -> Tensor:
    """Collect bit 4 of uint8 [32, B] → [B, 4], that of weight i in bit i % 8 of byte i // 8."""
    return pack_bits((codes >> 4).unflatten(0, (4, 8)), 1, 1).T


def _symmetric(x: Tensor, weights: Tensor | None, top: int) -> tuple[Tensor, Tensor]:
    """Return scales [B] and integers l + top, uint8 [32, B], of x ≈ d l."""
    rows = x.T.contiguous()
    if weights is not None:
        scale, codes = search_symmetric(rows, weights.T.contiguous(), top)
        return scale, codes.to(torch.uint8)
    scale = divide(first_peak(rows), -top)
    return scale, truncate((rows * reciprocal_or_zero(scale)).add_(top + 0.5)).clamp_(max=2 * top - 1)


def _affine(x: Tensor, weights: Tensor | None, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return scales [B], minima [B] and integers, uint8 [32, B], of x ≈ d l + m."""
    rows = x.T.contiguous()
    if weights is not None:
        scale, minimum, codes = search_affine(rows, weights.T.contiguous(), AffineSearch(top, -0.9, 0.05, 37))
        return scale, minimum, codes.to(torch.uint8)
    minimum = lowest(rows)
    scale = divide((rows.amax(0) - minimum).abs_(), top)  # of two zeros the difference may be -0
    return scale, minimum, truncate(((rows - minimum) * reciprocal_or_zero(scale)).add_(0.5)).clamp_(max=top)
