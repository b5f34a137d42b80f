"""Decode blocks: uint8 [B, bytes of a block] → float32 [B, weights of a block].

Multiplications and additions are in the order of llama.cpp, so that the weights are the same to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mowa.kernels.quant.gguf_blocks.levels import IQ4_LEVELS, MXFP4_LEVELS, exponent_to_scale
from mowa.kernels.quant.gguf_blocks.packing import unpack_bits, unpack_scales_and_minima, unpack_six_bits
from mowa.kernels.quant.gguf_blocks.rounding import read_half


def decode_q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(read_half(blocks, 0))


def decode_q4_0(blocks: Tensor) -> Tensor:
    return _nibbles(blocks, 2).float().sub_(8).mul_(read_half(blocks, 0))


def decode_q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks, 4).float().mul_(read_half(blocks, 0)).add_(read_half(blocks, 2))


def decode_q5_0(blocks: Tensor) -> Tensor:
    return _five_bits(blocks, 2).float().sub_(16).mul_(read_half(blocks, 0))


def decode_q5_1(blocks: Tensor) -> Tensor:
    return _five_bits(blocks, 4).float().mul_(read_half(blocks, 0)).add_(read_half(blocks, 2))


def decode_q2_k(blocks: Tensor) -> Tensor:
    scales, minima = blocks[:, :16] & 15, blocks[:, :16] >> 4
    codes = _quarters(blocks[:, 16:80]).view(-1, 16, 16)
    return _affine(codes, scales, minima, read_half(blocks, 80), read_half(blocks, 82))


def decode_q3_k(blocks: Tensor) -> Tensor:
    third = unpack_bits(blocks[:, :32], 1, 1).flatten(1)
    codes = (_quarters(blocks[:, 32:96]) | third << 2).float().sub_(4)
    scales = unpack_six_bits(blocks[:, 96:108].T).T.float().sub_(32)
    return (codes.view(-1, 16, 16) * (scales * read_half(blocks, 108))[..., None]).flatten(1)


def decode_q4_k(blocks: Tensor) -> Tensor:
    scales, minima = unpack_scales_and_minima(blocks[:, 4:16].T)
    codes = _halves(blocks[:, 16:]).view(-1, 8, 32)
    return _affine(codes, scales.T, minima.T, read_half(blocks, 0), read_half(blocks, 2))


def decode_q5_k(blocks: Tensor) -> Tensor:
    scales, minima = unpack_scales_and_minima(blocks[:, 4:16].T)
    codes = (_halves(blocks[:, 48:]) | unpack_bits(blocks[:, 16:48], 1, 1).flatten(1) << 4).view(-1, 8, 32)
    return _affine(codes, scales.T, minima.T, read_half(blocks, 0), read_half(blocks, 2))


def decode_q6_k(blocks: Tensor) -> Tensor:
    low = unpack_bits(blocks[:, :128].unflatten(1, (2, 64)), 4, 2).flatten(1)
    codes = (low | _quarters(blocks[:, 128:192]) << 4).float().sub_(32)
    scales = blocks[:, 192:208].view(torch.int8).float()
    return (codes.view(-1, 16, 16) * (scales * read_half(blocks, 208))[..., None]).flatten(1)


def decode_iq4_nl(blocks: Tensor) -> Tensor:
    return _look_up(IQ4_LEVELS, _nibbles(blocks, 2)).mul_(read_half(blocks, 0))


def decode_iq4_xs(blocks: Tensor) -> Tensor:
    low = unpack_bits(blocks[:, 4:8], 4, 2).flatten(1)
    scales = (low | unpack_bits(blocks[:, 2:4], 2, 2).flatten(1) << 4).float().sub_(32).mul_(read_half(blocks, 0))
    codes = unpack_bits(blocks[:, 8:].unflatten(1, (8, 16)), 4, 2).flatten(2)
    return (_look_up(IQ4_LEVELS, codes) * scales[..., None]).flatten(1)


def decode_mxfp4(blocks: Tensor) -> Tensor:
    levels = (*MXFP4_LEVELS, *(-one for one in MXFP4_LEVELS))
    return _look_up(levels, _nibbles(blocks, 1)).mul_(exponent_to_scale(blocks[:, :1].int()))


def _nibbles(blocks: Tensor, offset: int) -> Tensor:
    """Read 32 integers of four bits: byte i holds those of weights i and i + 16."""
    return unpack_bits(blocks[:, offset:], 4, 1).flatten(1)


def _five_bits(blocks: Tensor, offset: int) -> Tensor:
    """Read the fifth bits of 32 integers and then their four lower bits."""
    return _nibbles(blocks, offset + 4) | unpack_bits(blocks[:, offset : offset + 4], 1, 2).flatten(1) << 4


def _halves(packed: Tensor) -> Tensor:
    """Read 256 integers of four bits: weights i and i + 32 of each 64 share a byte."""
    return unpack_bits(packed.unflatten(1, (4, 32)), 4, 2).flatten(1)


def _quarters(packed: Tensor) -> Tensor:
    """Read 256 integers of two bits: weights i, i + 32, i + 64 and i + 96 of each 128 share a byte."""
    return unpack_bits(packed.unflatten(1, (2, 32)), 2, 2).flatten(1)


def _affine(codes: Tensor, scales: Tensor, minima: Tensor, factor: Tensor, minimum_factor: Tensor) -> Tensor:
    """Return d s l - e m for integers [B, groups, n] and scales and minima [B, groups]."""
    steps, offsets = scales.float().mul_(factor), minima.float().mul_(minimum_factor)
    return codes.float().mul_(steps[..., None]).sub_(offsets[..., None]).flatten(1)


def _look_up(levels: tuple[int, ...], codes: Tensor) -> Tensor:
    table = torch.tensor(levels, dtype=torch.float32, device=codes.device)
    return table.index_select(0, codes.flatten().int()).view(codes.shape)
