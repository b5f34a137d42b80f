"""Matrices of weights in few bits: made, made wide again, and a linear layer over them.

    int, group g of a row:  ŵ = s (q - z),  q in -2^(b-1) … 2^(b-1) - 1;  z = 0 where symmetric
    nf4, block of a row:    ŵ = s L[q],     s = max |w|, L the 16 quantiles of a normal distribution (QLoRA,
                                            arXiv:2305.14314, appendix E)

Inputs in eight bits, by a step t and a zero z, are what ONNX's QuantizeLinear makes of them:

    x̂ = t (clip(round(x / t) + z, 0, 255) - z),  t = (max(x, 0) - min(x, 0)) / 255,  z = round(-min(x, 0) / t)

It knows tensors; it refuses to know models, files and which layers may be narrow.
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
MIN_QUANT_NUMEL = 16_384  # weights: what has fewer stays in float16
FP16_TINY = 2.0**-24
FP32_TINY = torch.finfo(torch.float32).tiny
CLIP_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of the range: what is cut off may be worth the finer steps


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """W [N, K] in few bits: `codes` int8 [N, K], `scales` float32 [N, G], `zeros` int8 [N, G] or None (all 0).

    `group` columns share a scale; the last group of a row may be shorter. nf4: codes are 0 … 15, without zeros.
    """

    qweight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    group_size: int
    quant_type: QuantType = "int"

    def dequantize(self) -> Tensor:
        """Ŵ float32 [N, K]."""
        codes = self.qweight.float()
        if self.quant_type == "nf4":
            codes = torch.tensor(NF4_LEVELS, device=self.qweight.device)[self.qweight.long()]
        if self.zero_point is not None:
            codes = codes - self._spread(self.zero_point.float())
        return codes * self._spread(self.scale)

    def _spread(self, of_groups: Tensor) -> Tensor:
        return of_groups.repeat_interleave(self.group_size, 1)[:, : self.qweight.shape[1]]


def choose_qparams(
    weight: Tensor, bits: int, *, symmetric: bool = True, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales [N, 1] and zeros [N, 1] (None: symmetric) of one group of columns, [N, g].

    Scales are numbers that float16 has, as files keep them. It is the grid, of some, whose squared error, weighted by
    `importance` [g], is least; so weights that lie on a grid, as training with rounded weights leaves them, get that
    very grid. Below eight bits ranges are cut off too.
    """
    best, scales, zeros = weight.new_full((len(weight), 1), torch.inf), weight[:, :1], weight[:, :1]
    for step, zero in _grids(weight, bits, symmetric):
        step = step.half().float().clamp(min=FP16_TINY)
        wrong = (quantize_dequantize(weight, step, None if symmetric else zero, bits)[1] - weight).square()
        wrong = (wrong if importance is None else wrong * importance).sum(1, keepdim=True)
        better = wrong < best
        best, scales, zeros = best.where(~better, wrong), scales.where(~better, step), zeros.where(~better, zero)
    return scales, None if symmetric else zeros


def _grids(weight: Tensor, bits: int, symmetric: bool) -> Iterator[tuple[Tensor, Tensor]]:
    top = 2 ** (bits - 1) - 1
    least, most = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if symmetric:
        farthest = torch.maximum(-least, most)
        for levels in (top, top + 1):
            yield (farthest / levels).clamp(min=FP32_TINY), torch.zeros_like(farthest)
        for share in CLIP_RATIOS[1:] if bits < 8 else ():
            yield (farthest * share / top).clamp(min=FP32_TINY), torch.zeros_like(farthest)
        return
    for share in CLIP_RATIOS if bits < 8 else CLIP_RATIOS[:1]:
        low, high = (least * share).clamp(max=0), (most * share).clamp(min=0)
        step = ((high - low) / (2 * top + 1)).clamp(min=FP32_TINY)
        yield step, (-top - 1 - low / step).round().clamp(-top - 1, top)


def quantize_dequantize(weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and what they stand for, of weights [N, g] on a grid."""
    top = 2 ** (bits - 1) - 1
    shift = 0 if zero_point is None else zero_point
    codes = (weight / scale + shift).round().clamp(-top - 1, top)
    return codes, (codes - shift) * scale


def quantize(
    weight: Tensor,
    bits: int,
    group_size: int = 0,
    *,
    symmetric: bool = True,
    importance: Tensor | None = None,
) -> QuantizedWeight:
    """W [N, K] in integers; `group` columns share a scale, 0: the whole row. `importance` [K]: inputs' mean square."""
    weight, columns = weight.float(), weight.shape[1]
    group_size = group_size or columns
    codes, scales, zeros = [], [], []
    for first in range(0, columns, group_size):
        part = weight[:, first : first + group_size]
        weighs = None if importance is None else importance[first : first + group_size]
        step, zero = choose_qparams(part, bits, symmetric=symmetric, importance=weighs)
        codes.append(quantize_dequantize(part, step, zero, bits)[0])
        scales.append(step)
        zeros.append(zero)
    return QuantizedWeight(
        torch.cat(codes, 1).to(torch.int8),
        torch.cat(scales, 1),
        None if symmetric else join_zero_points(zeros),
        bits,
        group_size,
    )


def non_block_group_size(weight: Tensor) -> int:
    """How many columns share a scale where weights beside the blocks are kept in int8; 0: too few for it.

    What is before the blocks passes its errors through all of them: by row, int8 there was seen to do ten times what
    int8 in all blocks does.
    """
    return 32 if weight[0].numel() >= 32 and weight.numel() >= MIN_QUANT_NUMEL else 0


def join_zero_points(zeros: list[Tensor | None]) -> Tensor:
    return torch.cat([zero for zero in zeros if zero is not None], 1).to(torch.int8)
