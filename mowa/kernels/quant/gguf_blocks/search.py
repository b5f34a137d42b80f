"""Search the scale of each group of weights by weighted least squares, for all groups at once.

A group of n weights x is stored as integers l with a scale d, and with a minimum m where the type has one:

    symmetric:  x ≈ d l,        l in -top … top - 1
    affine:     x ≈ d l + m,    l in 0 … top,  m ≤ 0

The weights are rounded with several step widths. For the integers that come of each, the d (and m) that minimise
Σ w (x - x̂)² follow in closed form, and the best are kept. The algorithm and the order of its float32 operations are
those of llama.cpp (ggml-quants.c, MIT licence), so that the results are the same to the bit.

Tensors are position-major: x[i, g] is weight i of group g.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mowa.kernels.quant.gguf_blocks.reductions import first_peak, lowest, ordered_sum, replace_where
from mowa.kernels.quant.gguf_blocks.rounding import divide

TINY = 1e-15  # a group without a larger weight is stored as zeros


@dataclass(frozen=True)
class AffineSearch:
    """Try the step widths (max - min) / (top + first + i · step), i in 0 … count - 1, after (max - min) / top.

    Args:
        absolute: keep the candidate of the smallest Σ w |x - x̂| instead of Σ w (x - x̂)².
    """

    top: int
    first: float
    step: float
    count: int
    absolute: bool = False

    def divisions(self) -> list[float]:
        """Return the number of steps between min and max for each candidate, rounded as float32 arithmetic does."""
        steps = np.float32(self.first) + np.float32(self.step) * np.arange(self.count, dtype=np.float32)
        return (steps + np.float32(self.top)).tolist()


def search_affine(x: Tensor, weights: Tensor, search: AffineSearch) -> tuple[Tensor, Tensor, Tensor]:
    """Find scale and minimum of each group; the minimum of the best candidate is where the next ones start from.

    Args:
        x: float32 [n, G].
        weights: float32 [n, G], of the errors.

    Returns:
        Scales [G], minima [G] (≤ 0) and integers in 0 … top, float32 [n, G].
    """
    low, high = lowest(x), x.amax(0)
    low = torch.where(low > 0, 0, low)
    codes, product, spare = (torch.empty_like(x) for _ in range(3))
    found, sums = x.new_empty(5, x.shape[1]), x.new_empty(3, x.shape[1])
    error, scale, minimum, inverse, start = found  # of the candidate at hand, [G] each
    totals = ordered_sum(weights), ordered_sum(torch.mul(weights, x, out=product))

    def round_from_start() -> None:
        """Where the step is 0, or so small that its inverse is not finite, all integers are 0."""
        inverse.nan_to_num_(0, 0, 0)
        torch.sub(x, start, out=codes).mul_(inverse).round_().clamp_(0, search.top)

    def measure_error() -> None:
        """Σ w (d l + m - x)², or Σ w |d l + m - x|."""
        torch.mul(codes, scale, out=product).add_(minimum).sub_(x)
        size = product.abs_() if search.absolute else product.mul_(product)
        ordered_sum(size.mul_(weights), error)

    for one in (minimum, start):
        one.copy_(low)
    inverse.copy_(divide(search.top, (high - low).abs_()))
    scale.copy_(divide(1, inverse))
    round_from_start()
    measure_error()
    best = found.clone()
    least, best_scale, best_minimum, *_ = best
    for division in search.divisions():
        start.copy_(best_minimum)
        inverse.copy_(divide(division, high - start))
        round_from_start()
        ordered_sum(torch.mul(codes, weights, out=product), sums[0])
        ordered_sum(torch.mul(product, x, out=spare), sums[2])
        ordered_sum(product.mul_(codes), sums[1])
        solved = _solve_affine(sums, totals, scale, minimum)
        measure_error()
        replace_where(((error < least) & solved).int(), found, best)
    found.copy_(best)
    round_from_start()
    return best_scale, best_minimum, codes


def _solve_affine(sums: Tensor, totals: tuple[Tensor, Tensor], scale: Tensor, minimum: Tensor) -> Tensor:
    """Solve the normal equations into `scale` and `minimum`; a positive minimum becomes 0 → where it was possible."""
    (sum_l, sum_l2, sum_xl), (sum_w, sum_x) = sums, totals
    determinant = sum_w * sum_l2 - sum_l * sum_l
    torch.div(sum_w * sum_xl - sum_x * sum_l, determinant, out=scale)
    torch.div(sum_l2 * sum_x - sum_l * sum_xl, determinant, out=minimum)
    positive = torch.gt(minimum, 0, out=torch.empty_like(minimum, dtype=torch.int32))
    replace_where(positive, sum_xl / sum_l2, scale)
    minimum.clamp_(max=0)
    return determinant > 0


def search_symmetric(x: Tensor, weights: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Find the scale of each group, trying 19 step widths around max |x| / top.

    Args:
        x: float32 [n, G].
        weights: float32 [n, G], of the errors.

    Returns:
        Scales [G], of either sign, and integers l + top in 0 … 2 top - 1, float32 [n, G]; both are 0 in a group
        without a weight above 1e-15.
    """
    steps = np.array([0, *range(-9, 0), *range(1, 10)], dtype=np.float32)
    peak = first_peak(x)
    empty = peak.abs() < TINY
    divisions = x.new_tensor(-(np.float32(top) + np.float32(0.1) * steps))
    inverse = (divisions[:, None] / peak).masked_fill_(empty, 0)
    sum_xl, sum_l2 = torch.empty_like(inverse), torch.empty_like(inverse)
    weighted, codes, product = weights * x, torch.empty_like(x), torch.empty_like(x)
    for i, candidate in enumerate(inverse):
        torch.mul(x, candidate, out=codes).round_().clamp_(-top, top - 1)
        ordered_sum(torch.mul(codes, weighted, out=product), sum_xl[i])
        ordered_sum(torch.mul(codes, weights, out=product).mul_(codes), sum_l2[i])
    scale, best = choose_candidate(sum_xl, sum_l2)
    torch.mul(x, inverse.gather(0, best), out=codes).round_().clamp_(-top, top - 1).add_(top)
    return scale, codes.masked_fill_(empty, 0) if empty.any() else codes


def choose_candidate(sum_xl: Tensor, sum_l2: Tensor) -> tuple[Tensor, Tensor]:
    """Go through candidates [C, G] in order and keep a later one where (Σ w x l)² / Σ w l² is larger.

    The comparison is ggml's, in float32 and without the division.

    Returns:
        Scales [G] and indices of the candidates, int64 [1, G].
    """
    scales = sum_xl / sum_l2
    scales[0].masked_fill_(sum_l2[0] == 0, 0)
    gains = scales * sum_xl
    squares = sum_xl * sum_xl
    gain, best = gains[0].clone(), torch.zeros_like(scales[0], dtype=torch.int32)
    product, better = torch.empty_like(gain), torch.empty_like(best)
    for i in range(1, len(gains)):
        torch.gt(squares[i], torch.mul(gain, sum_l2[i], out=product), out=better)
        replace_where(better, gains[i], gain)
        torch.maximum(best, better.mul_(i), out=best)
    index = best.long()[None]
    return scales.gather(0, index)[0], index
