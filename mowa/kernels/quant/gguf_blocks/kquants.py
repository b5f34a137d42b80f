"""Encode the K-quants, q2_k … q6_k: blocks of 256 weights in groups of 16 or 32, whose scales are integers too.

    q3_k, q6_k          x ≈ d s l            16 groups of 16
    q2_k                x ≈ d s l - e m      16 groups of 16
    q4_k, q5_k          x ≈ d s l - e m       8 groups of 32

d and e are float16, one of each per block; s and m are integers of four, six or eight bits, one of each per group. The
groups' scales and minima are searched, then rounded, and the weights are rounded again with what was stored.

An encoder takes weights x, float32 [B, 256], and the weights of their squared errors, [B, 256], from an importance
matrix, or None, and returns the blocks. In between, tensors are [n, groups · B], group j of block b in column j B + b.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mowa.kernels.quant.gguf_blocks.packing import pack_bits, pack_scales_and_minima, pack_six_bits
from mowa.kernels.quant.gguf_blocks.reductions import by_position, first_peak, ordered_sum
from mowa.kernels.quant.gguf_blocks.refine import fit_integers, fit_positive
from mowa.kernels.quant.gguf_blocks.rounding import divide, half_bytes, half_round, nearest_int, square_root
from mowa.kernels.quant.gguf_blocks.search import TINY, AffineSearch, search_affine, search_symmetric


def encode_q2_k(x: Tensor, weights: Tensor | None) -> Tensor:
    """Return uint8 [B, 84]: sixteen bytes of a scale and a minimum of four bits, 256 × two bits, d, e."""
    rows = by_position(x, 16)
    if weights is None:
        search, errors = AffineSearch(3, -0.5, 0.1, 16, absolute=True), rows.abs()
    else:
        search, errors = AffineSearch(3, -0.9, 0.05, 37), by_position(weights, 16)
    scales, minima, factors, codes = _affine(rows, errors, search, 15, fit=weights is not None)
    return torch.cat([(scales | minima << 4).T, _pack_quarters(codes), *factors], 1)


def encode_q3_k(x: Tensor, weights: Tensor | None) -> Tensor:
    """Return uint8 [B, 110]: the third bits, 256 × the two lower bits, sixteen scales of six bits, d."""
    rows = by_position(x, 16)
    if weights is None:
        found, codes = fit_integers(rows, 4)
        factor, scales = _round_signed(found.view(16, -1), 32)
    else:
        errors = by_position(weights, 16)
        found, codes = search_symmetric(rows, errors, 4)
        factor, scales = search_symmetric(found.view(16, -1), ordered_sum(errors).view(16, -1), 32)
    codes = _round_again(rows, half_round(factor) * (scales - 32), None, codes, (-4, 3))
    third = pack_bits((codes >> 2).view(8, 32, -1), 1, 0).T
    packed_scales = pack_six_bits(scales.to(torch.uint8)).T
    return torch.cat([third, _pack_quarters(codes & 3), packed_scales, half_bytes(factor)], 1)


def encode_q4_k(x: Tensor, weights: Tensor | None) -> Tensor:
    """Return uint8 [B, 144]: d, e, eight scales and minima of six bits, 256 × four bits."""
    scales, minima, factors, codes = _four_or_five_bits(x, weights, AffineSearch(15, -1.0, 0.1, 21))
    return torch.cat([*factors, pack_scales_and_minima(scales, minima).T, _pack_halves(codes)], 1)


def encode_q5_k(x: Tensor, weights: Tensor | None) -> Tensor:
    """Return uint8 [B, 176]: d, e, eight scales and minima of six bits, the fifth bits, 256 × the four lower bits."""
    scales, minima, factors, codes = _four_or_five_bits(x, weights, AffineSearch(31, -0.5, 0.1, 16))
    fifth = pack_bits((codes >> 4).view(8, 32, -1), 1, 0).T
    return torch.cat([*factors, pack_scales_and_minima(scales, minima).T, fifth, _pack_halves(codes & 15)], 1)


def encode_q6_k(x: Tensor, weights: Tensor | None) -> Tensor:
    """Return uint8 [B, 210]: 256 × the four lower bits, 256 × the two higher bits, sixteen int8 scales, d."""
    rows = by_position(x, 16)
    errors = rows * rows if weights is None else by_position(weights, 16)
    found, codes = search_symmetric(rows, errors, 32)
    found = found.view(16, -1)
    peak = first_peak(found)
    inverse = divide(-128, peak)
    factor = divide(1, inverse)
    scales = nearest_int(inverse * found).clamp_(max=127)
    codes = _round_again(rows, half_round(factor) * scales, None, codes, (-32, 31))
    low = pack_bits((codes & 15).view(2, 2, 2, 32, -1), 4, 1).flatten(0, 2).T
    packed_scales = scales.to(torch.int8).T.contiguous().view(torch.uint8)
    blocks = torch.cat([low, _pack_quarters(codes >> 4), packed_scales, half_bytes(factor)], 1)
    return blocks.masked_fill_((peak.abs() < TINY)[:, None], 0)


def _four_or_five_bits(
    x: Tensor, weights: Tensor | None, search: AffineSearch
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
    """Find what q4_k and q5_k store; the errors of large weights count more, with and without `weights`."""
    rows = by_position(x, 32)
    if weights is not None:
        return _affine(rows, by_position(weights, 32), AffineSearch(search.top, -0.9, 0.05, 37), 63, fit=True)
    errors = rows.abs().add_(square_root(divide(ordered_sum(rows * rows), 32)))
    return _affine(rows, errors, search, 63, fit=False)


def _affine(
    rows: Tensor, errors: Tensor, search: AffineSearch, top: int, *, fit: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
    """Find what the types with minima store.

    Args:
        rows: float32 [n, groups · B].
        errors: weights of the errors, float32 [n, groups · B].
        top: largest integer that a scale or minimum is stored as.
        fit: fit the integers of the scales and minima by least squares rather than scale the largest to `top`.

    Returns:
        Scales and minima, uint8 [groups, B]; bytes of d and e, uint8 [B, 2]; integers, uint8 [256, B].
    """
    groups = 256 // len(rows)
    found_scales, found_minima, codes = search_affine(rows, errors, search)
    found = found_scales.view(groups, -1), found_minima.neg_().view(groups, -1)
    if fit:
        sums = ordered_sum(errors).view(groups, -1)
        (factor, scales), (minimum_factor, minima) = (fit_positive(one, sums, top) for one in found)
    else:
        (factor, scales), (minimum_factor, minima) = (_round_positive(one, top) for one in found)
    steps, offsets = half_round(factor) * scales, half_round(minimum_factor) * minima
    codes = _round_again(rows, steps, offsets, codes, (0, search.top))
    return (
        scales.to(torch.uint8),
        minima.to(torch.uint8),
        (half_bytes(factor), half_bytes(minimum_factor)),
        codes,
    )


def _round_positive(values: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Round values ≥ 0 [groups, B] to factor · integer, the largest of a block to `top` → [B], float32 [groups, B]."""
    peak = values.amax(0)
    empty = ~(peak > 0)
    peak.masked_fill_(empty, 0)
    inverse = divide(top, peak).masked_fill_(empty, 0)
    return divide(peak, top), nearest_int(inverse * values).to(torch.uint8).clamp_(max=top).float()


def _round_signed(values: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Round values [groups, B] to factor · (integer - top), the one of largest magnitude to 0 → [B], [groups, B]."""
    peak = first_peak(values)
    empty = peak == 0
    inverse = divide(-top, peak)
    integers = nearest_int(inverse * values).to(torch.int8).clamp_(-top, top - 1).float().add_(top)
    return divide(1, inverse).masked_fill_(empty, 0), integers.masked_fill_(empty, 0)


def _round_again(rows: Tensor, steps: Tensor, offsets: Tensor | None, codes: Tensor, limits: tuple[int, int]) -> Tensor:
    """Round weights with the stored scales: (x + offset) / step.

    Args:
        rows: float32 [n, groups · B].
        steps, offsets: float32 [groups, B].
        codes: float32 [n, groups · B]; they are kept where the step is 0.
        limits: of the integers; the lower one is subtracted from them.

    Returns:
        uint8 [256, B], in the order of the block's weights.
    """
    steps = steps.view(-1)
    divided = (rows if offsets is None else rows + offsets.view(-1)) / steps
    again = nearest_int(divided).clamp_(*limits).sub_(limits[0])
    kept = torch.where(steps == 0, codes.int(), again).to(torch.uint8)
    return kept.view(len(rows), 256 // len(rows), -1).transpose(0, 1).reshape(256, -1)


def _pack_halves(codes: Tensor) -> Tensor:
    """Pack four bits of uint8 [256, B] → [B, 128]: weights i and i + 32 of each 64 share a byte."""
    return pack_bits(codes.view(4, 2, 32, -1), 4, 1).flatten(0, 1).T


def _pack_quarters(codes: Tensor) -> Tensor:
    """Pack two bits of uint8 [256, B] → [B, 64]: weights i, i + 32, i + 64 and i + 96 of each 128 share a byte."""
    return pack_bits(codes.view(2, 4, 32, -1), 2, 1).flatten(0, 1).T
