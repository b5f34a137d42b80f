"""Encode the types whose integers index a table of levels: iq4_nl, iq4_xs and mxfp4.

    iq4_nl      x ≈ d v[l]        32 weights, d float16
    iq4_xs      x ≈ d s v[l]      256 weights, d float16, s six bits for each 32
    mxfp4       x ≈ 2^e u[l]      32 weights, e eight bits; u are the values of a four-bit float

An encoder takes weights x, float32 [B, n], and the weights of their squared errors, [B, n], from an importance matrix,
or None, and returns the blocks.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from mowa.kernels.quant.gguf_blocks.legacy import pack_nibbles
from mowa.kernels.quant.gguf_blocks.packing import pack_bits
from mowa.kernels.quant.gguf_blocks.reductions import by_position, first_peak, ordered_sum
from mowa.kernels.quant.gguf_blocks.rounding import divide, half_bytes, nearest_int, reciprocal_or_zero
from mowa.kernels.quant.gguf_blocks.search import TINY, choose_candidate

IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12)  # twice the values of the four-bit float; eight more are their negatives
TABLE_OFFSET = 280  # tables are indexed by ⌊2 x⌋ + offset: all midpoints between levels are multiples of 1/2
TRIES = 7


def encode_iq4_nl(x: Tensor, weights: Tensor | None) -> Tensor:
    """Return uint8 [B, 18]: d, then 32 indices of four bits."""
    rows = x.T.contiguous()
    scale = _search(rows, rows * rows if weights is None else weights.T.contiguous())
    codes = _nearest_level(rows * reciprocal_or_zero(scale))
    return torch.cat([half_bytes(scale), pack_nibbles(codes)], 1)


def encode_iq4_xs(x: Tensor, weights: Tensor | None) -> Tensor:
    """Return uint8 [B, 136]: d, the two higher bits of eight scales, their four lower bits, 256 indices."""
    blocks = len(x)
    rows = by_position(x, 32)
    errors = rows * rows if weights is None else by_position(weights, 32)
    found = _search(rows, errors).view(8, blocks)
    factor = divide(-first_peak(found), 32)
    scales = nearest_int(reciprocal_or_zero(factor) * found).clamp_(-32, 31)
    codes = _nearest_level(rows * reciprocal_or_zero(factor * scales).view(-1))
    stored = scales.add_(32).to(torch.uint8)
    high = pack_bits((stored >> 4).view(2, 4, blocks), 2, 1).T
    low = pack_bits((stored & 15).view(4, 2, blocks), 4, 1).T
    packed = pack_bits(codes.view(2, 16, 8, blocks), 4, 0).permute(2, 1, 0).flatten(1)
    return torch.cat([half_bytes(factor), high, low, packed], 1)


def encode_mxfp4(x: Tensor, weights: Tensor | None) -> Tensor:
    """Return uint8 [B, 17]: e, then 32 indices of four bits. `weights` are not used."""
    size = x.abs()
    peak = size.amax(1)
    exponent = (peak.double().log2().float().floor_() - 2 + 127).int()
    exponent = torch.where(peak > 0, exponent & 255, 0)  # below 2^-125 it wraps, and the weights become zeros
    scale = exponent_to_scale(exponent)[:, None]
    codes = torch.zeros_like(x, dtype=torch.uint8)
    for lower, higher in pairwise(MXFP4_LEVELS):
        codes += size > scale * ((lower + higher) / 2)
    codes |= ((x < 0) & (codes > 0)).to(torch.uint8) << 3
    return torch.cat([exponent.to(torch.uint8)[:, None], pack_nibbles(codes.T)], 1)


def exponent_to_scale(exponent: Tensor) -> Tensor:
    """Return 2^(e - 128), exactly, for e of int32 in 0 … 255: half the scale of the four-bit float."""
    bits = torch.where(exponent < 2, 0x200000 << exponent.clamp(max=1), exponent - 1 << 23)
    return bits.int().view(torch.float32)


def _search(x: Tensor, weights: Tensor) -> Tensor:
    """Find the scales [G] of groups x [32, G] by weighted least squares over sixteen step widths."""
    peak, table = first_peak(x), _level_table(x.device)[0]
    first = divide(1, divide(-peak, IQ4_LEVELS[0]))
    tries = torch.arange(-TRIES, TRIES + 1, device=x.device).float()[:, None]
    empty = peak.abs() < TINY
    inverse = torch.cat([first[None], (tries + IQ4_LEVELS[0]) / peak]).masked_fill_(empty, 0)
    sum_xl, sum_l2 = torch.empty_like(inverse), torch.empty_like(inverse)
    values, product, index = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x, dtype=torch.int32)
    for i, candidate in enumerate(inverse.mul_(2)):
        index.copy_(torch.mul(x, candidate, out=product).floor_().add_(TABLE_OFFSET))
        torch.index_select(table, 0, index.view(-1), out=values.view(-1))
        torch.mul(values, weights, out=product)
        ordered_sum(values.mul_(product), sum_l2[i])
        ordered_sum(product.mul_(x), sum_xl[i])
    return choose_candidate(sum_xl, sum_l2)[0].masked_fill_(empty, 0)


def _nearest_level(x: Tensor) -> Tensor:
    """Return the index of the nearest level, uint8; of two equally near ones the higher, and for NaN the last."""
    index = (x * 2).floor_().nan_to_num_(TABLE_OFFSET, TABLE_OFFSET, -TABLE_OFFSET).clamp_(-TABLE_OFFSET, TABLE_OFFSET)
    return _level_table(x.device)[1][index.add_(TABLE_OFFSET).long()]


def _level_table(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the nearest level, float32, and its index, uint8, of each x = (i - offset) / 2."""
    levels = torch.tensor(IQ4_LEVELS, device=device, dtype=torch.float32)
    x = torch.arange(-TABLE_OFFSET, TABLE_OFFSET + 1, device=device) / 2
    index = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2, right=True)
    return levels[index], index.to(torch.uint8)
