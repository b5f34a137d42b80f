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

from mowa.kernels.quant.gguf_blocks.reductions import first_peak, lowest, replace_where, row_sums
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
    work = _AffineWork(x, weights, search)
    work.measure_range()
    for division in x.new_tensor(search.divisions()).unbind():
        work.try_division(division)
    return work.best_scale, work.best_minimum, work.round_as_best()


class _AffineWork:
    """Buffers of `search_affine`, and its steps. Few and large operations: between them threads wait for each other."""

    LEFT, RIGHT = (0, 0, 3, 2, 1, 2), (3, 4, 1, 2, 2, 4)  # rows of `sums` whose products make the normal equations

    def __init__(self, x: Tensor, weights: Tensor, search: AffineSearch) -> None:
        self.x, self.weights, self.search = x, weights, search
        groups = x.shape[1]
        self.codes, self.product, self.spare = (torch.empty_like(x) for _ in range(3))
        self.sums = x.new_empty(5, groups)  # Σ w, Σ w x, Σ w l, Σ w l², Σ w l x
        self.found, self.best = x.new_empty(5, groups), x.new_empty(5, groups)
        self.error, self.scale, self.minimum, self.inverse, self.start = self.found
        self.least, self.best_scale, self.best_minimum, *_ = self.best
        self.terms, self.factors, self.width = x.new_empty(6, groups), x.new_empty(6, groups), x.new_empty(groups)
        self.left, self.right = (torch.tensor(rows, device=x.device) for rows in (self.LEFT, self.RIGHT))
        self.better, self.solved = (torch.empty_like(self.width, dtype=torch.int32) for _ in range(2))
        self.add_product, self.add_spare = (row_sums(one, self.sums) for one in (self.product, self.spare))
        self.add_error = row_sums(self.product, self.found)

    def measure_range(self) -> None:
        """Begin with steps of (max - min) / top."""
        torch.mul(self.weights, self.x, out=self.product)
        self.add_product(1)
        row_sums(self.weights, self.sums)(0)
        low, self.high = lowest(self.x), self.x.amax(0)
        low = torch.where(low > 0, 0, low)
        for one in (self.minimum, self.start):
            one.copy_(low)
        self.inverse.copy_(divide(self.search.top, (self.high - low).abs_()))
        self.scale.copy_(divide(1, self.inverse))
        self.round()
        self.measure()
        self.best.copy_(self.found)

    def try_division(self, division: Tensor) -> None:
        """Try steps of (max - minimum) / division, with the best minimum so far, and keep what has a smaller error."""
        self.start.copy_(self.best_minimum)
        torch.sub(self.high, self.start, out=self.width)
        torch.div(division, self.width, out=self.inverse)
        self.round()
        torch.mul(self.codes, self.weights, out=self.product)
        self.add_product(2)
        torch.mul(self.product, self.x, out=self.spare)
        self.add_spare(4)
        self.product.mul_(self.codes)
        self.add_product(3)
        self.solve()
        self.measure()
        torch.lt(self.error, self.least, out=self.better)
        replace_where(self.better.bitwise_and_(self.solved), self.found, self.best)

    def round(self) -> None:
        """Round from `start`. Where the step is 0, or so small that its inverse is not finite, all integers are 0."""
        self.inverse.nan_to_num_(0, 0, 0)
        torch.sub(self.x, self.start, out=self.codes).mul_(self.inverse).round_().clamp_(0, self.search.top)

    def solve(self) -> None:
        """Solve the normal equations for scale and minimum; where the minimum would be positive it is 0."""
        torch.index_select(self.sums, 0, self.left, out=self.terms)
        self.terms.mul_(torch.index_select(self.sums, 0, self.right, out=self.factors))
        solution = self.terms[:3].sub_(self.terms[3:])
        torch.div(solution[1:], solution[0], out=self.found[1:3])
        torch.gt(solution[0], 0, out=self.solved)
        positive = self.minimum > 0
        if positive.any():
            self.scale.copy_(torch.where(positive, self.sums[4] / self.sums[3], self.scale))
            self.minimum.clamp_(max=0)

    def measure(self) -> None:
        """Add up Σ w (d l + m - x)², or Σ w |d l + m - x|."""
        torch.mul(self.codes, self.scale, out=self.product).add_(self.minimum).sub_(self.x)
        size = self.product.abs_() if self.search.absolute else self.product.mul_(self.product)
        size.mul_(self.weights)
        self.add_error(0)

    def round_as_best(self) -> Tensor:
        """Return the integers of the best candidate."""
        self.found.copy_(self.best)
        self.round()
        return self.codes


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
    codes = torch.empty_like(x)
    sum_xl, sum_l2 = torch.empty_like(inverse), torch.empty_like(inverse)
    weighted, product = weights * x, torch.empty_like(x)
    add_xl, add_l2 = row_sums(product, sum_xl), row_sums(product, sum_l2)
    for i, candidate in enumerate(inverse.unbind()):
        torch.mul(x, candidate, out=codes).round_().clamp_(-top, top - 1)
        torch.mul(codes, weighted, out=product)
        add_xl(i)
        torch.mul(codes, weights, out=product).mul_(codes)
        add_l2(i)
    scale, best = choose_candidate(sum_xl, sum_l2)
    torch.mul(x, inverse.gather(0, best), out=codes).round_().clamp_(-top, top - 1)
    codes.add_(top)
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
    gain, best = gains[0].clone(), torch.zeros_like(scales[0], dtype=torch.int64)
    product, better = torch.empty_like(gain), torch.empty_like(gain, dtype=torch.bool)
    for i, (square, sum_l2_of, gain_of) in enumerate(zip(squares, sum_l2, gains, strict=True)):
        torch.gt(square, torch.mul(gain, sum_l2_of, out=product), out=better)
        torch.where(better, gain_of, gain, out=gain)
        best.masked_fill_(better, i)
    return scales.gather(0, best[None])[0], best[None]
