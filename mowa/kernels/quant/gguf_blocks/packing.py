"""Pack the integers of blocks into bytes, and unpack them: two, four or eight to a byte, and six-bit scales."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Put the 8 / bits integers, uint8, that lie along `dim` into one byte and drop `dim`; the first is lowest."""
    first, *others = codes.unbind(dim)
    packed = first.clone()
    for i, part in enumerate(others, 1):
        packed |= part << bits * i
    return packed


def unpack_bits(packed: Tensor, bits: int, dim: int) -> Tensor:
    """Undo `pack_bits`: insert `dim` with the 8 / bits integers of each byte, uint8."""
    return torch.stack([packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], dim)


def pack_scales_and_minima(scales: Tensor, minima: Tensor) -> Tensor:
    """Pack eight scales and eight minima of six bits, uint8 [8, B] each, as q4_k and q5_k do → uint8 [12, B]."""
    low = scales[4:] & 15 | (minima[4:] & 15) << 4
    return torch.cat([scales[:4] | scales[4:] >> 4 << 6, minima[:4] | minima[4:] >> 4 << 6, low])


def unpack_scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `pack_scales_and_minima`: uint8 [12, B] → scales and minima, uint8 [8, B]."""
    first, second, low = packed[:4], packed[4:8], packed[8:]
    scales = torch.cat([first & 63, low & 15 | first >> 6 << 4])
    return scales, torch.cat([second & 63, low >> 4 | second >> 6 << 4])


def pack_six_bits(scales: Tensor) -> Tensor:
    """Pack sixteen scales of six bits, uint8 [16, B], as q3_k does → uint8 [12, B]."""
    low = scales[:8] & 15 | (scales[8:] & 15) << 4
    return torch.cat([low, pack_bits((scales >> 4).unflatten(0, (4, 4)), 2, 0)])


def unpack_six_bits(packed: Tensor) -> Tensor:
    """Undo `pack_six_bits`: uint8 [12, B] → uint8 [16, B]."""
    low = torch.cat([packed[:8] & 15, packed[:8] >> 4])
    return low | unpack_bits(packed[8:], 2, 0).flatten(0, 1) << 4
