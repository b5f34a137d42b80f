"""Quantize weight matrices to integers and dequantize them.

int, group g of a row:  ŵ = s (q - z),  q in -2^(b-1) … 2^(b-1) - 1;  z = 0 where symmetric
nf4, block of a row:    ŵ = s L[q],     s = max |w|, L the 16 quantiles of a normal distribution (QLoRA,
                                        arXiv:2305.14314, appendix E)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

QuantType = Literal["int", "nf4"]

NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
FP16_TINY = 2.0**-24
FP32_TINY = torch.finfo(torch.float32).tiny
CLIP_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # fractions of the weight range to try; clipping makes steps finer


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A quantized weight matrix [N, K].

    Attributes:
        qweight: int8 [N, K]; for nf4, indices 0 … 15 into `NF4_LEVELS`.
        scale: float32 [N, G], G = ⌈K / group_size⌉.
        zero_point: int8 [N, G], or None where all are 0.
        bits: 4 or 8.
        group_size: columns that share a scale; the last group of a row may be shorter.
        quant_type: int or nf4.
    """

    qweight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    group_size: int
    quant_type: QuantType = "int"

    def dequantize(self) -> Tensor:
        """Return Ŵ, float32 [N, K]."""
        values = self.qweight.float()
        if self.quant_type == "nf4":
            values = torch.tensor(NF4_LEVELS, device=self.qweight.device)[self.qweight.long()]
        if self.zero_point is not None:
            values = values - self._expand_groups(self.zero_point.float())
        return values * self._expand_groups(self.scale)

    def _expand_groups(self, values: Tensor) -> Tensor:
        """[N, G] → [N, K]."""
        return values.repeat_interleave(self.group_size, 1)[:, : self.qweight.shape[1]]


def choose_qparams(
    weight: Tensor, bits: int, *, symmetric: bool = True, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Choose the scale and zero point of one group of columns per row.

    Several candidate grids are tried, below 8 bits also grids over a clipped range, and the one with the smallest
    weighted squared error wins. Weights that already lie on a grid, as quantization-aware training leaves them, get
    that same grid back. Scales are rounded to float16, the precision files store them in.

    Args:
        weight: float32 [N, g].
        bits: 4 or 8.
        symmetric: no zero points.
        importance: float32 [g], weight of each column's error, such as the mean square of its inputs.

    Returns:
        scale, float32 [N, 1], and zero point, float32 [N, 1] or None where symmetric.
    """
    best, scale, zero_point = weight.new_full((len(weight), 1), torch.inf), weight[:, :1], weight[:, :1]
    for s, z in _candidate_grids(weight, bits, symmetric):
        s = s.half().float().clamp(min=FP16_TINY)
        error = (quantize_dequantize(weight, s, None if symmetric else z, bits)[1] - weight).square()
        error = (error if importance is None else error * importance).sum(1, keepdim=True)
        better = error < best
        best, scale = best.where(~better, error), scale.where(~better, s)
        zero_point = zero_point.where(~better, z)
    return scale, None if symmetric else zero_point


def _candidate_grids(weight: Tensor, bits: int, symmetric: bool) -> Iterator[tuple[Tensor, Tensor]]:
    qmax = 2 ** (bits - 1) - 1
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if symmetric:
        absmax = torch.maximum(-low, high)
        for levels in (qmax, qmax + 1):
            yield (absmax / levels).clamp(min=FP32_TINY), torch.zeros_like(absmax)
        for ratio in CLIP_RATIOS[1:] if bits < 8 else ():
            yield (absmax * ratio / qmax).clamp(min=FP32_TINY), torch.zeros_like(absmax)
        return
    for ratio in CLIP_RATIOS if bits < 8 else CLIP_RATIOS[:1]:
        bottom, top = (low * ratio).clamp(max=0), (high * ratio).clamp(min=0)
        scale = ((top - bottom) / (2 * qmax + 1)).clamp(min=FP32_TINY)
        yield scale, (-qmax - 1 - bottom / scale).round().clamp(-qmax - 1, qmax)


def quantize_dequantize(weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """Round `weight`, float32 [N, g], to a grid. Return the integers and the dequantized weights, both float32 [N, g].

    scale and zero_point broadcast to [N, g]; zero_point None is 0.
    """
    qmax = 2 ** (bits - 1) - 1
    shift = 0 if zero_point is None else zero_point
    q = (weight / scale + shift).round().clamp(-qmax - 1, qmax)
    return q, (q - shift) * scale


def quantize(
    weight: Tensor,
    bits: int,
    group_size: int = 0,
    *,
    symmetric: bool = True,
    importance: Tensor | None = None,
) -> QuantizedWeight:
    """Quantize W [N, K], any float dtype, to the nearest integers on the grids that `choose_qparams` chooses.

    Args:
        weight: [N, K].
        bits: 4 or 8.
        group_size: columns that share a scale; 0: the whole row.
        symmetric: no zero points.
        importance: float32 [K], weight of each column's error.
    """
    weight, columns = weight.float(), weight.shape[1]
    group_size = group_size or columns
    qweights, scales, zero_points = [], [], []
    for first in range(0, columns, group_size):
        group = weight[:, first : first + group_size]
        group_importance = None if importance is None else importance[first : first + group_size]
        scale, zero_point = choose_qparams(group, bits, symmetric=symmetric, importance=group_importance)
        qweights.append(quantize_dequantize(group, scale, zero_point, bits)[0])
        scales.append(scale)
        zero_points.append(zero_point)
    return QuantizedWeight(
        torch.cat(qweights, 1).to(torch.int8),
        torch.cat(scales, 1),
        None if symmetric else join_zero_points(zero_points),
        bits,
        group_size,
    )


def join_zero_points(zero_points: list[Tensor | None]) -> Tensor:
    """Concatenate the zero points of the groups, [N, 1] each, to int8 [N, G]."""
    return torch.cat([zero_point for zero_point in zero_points if zero_point is not None], 1).to(torch.int8)
