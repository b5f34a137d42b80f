"""Refine integers one by one: each moves to the value that raises the score (Σ w x l)² / Σ w l² of its group.

llama.cpp (ggml-quants.c, MIT licence) does this for the weights of q3_k, and for the scales of all K-quants that are
made with an importance matrix. Tensors are position-major as in `search`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mowa.kernels.quant.gguf_blocks.reductions import first_peak, first_smallest, ordered_sum
from mowa.kernels.quant.gguf_blocks.rounding import divide
from mowa.kernels.quant.gguf_blocks.search import TINY

ROUNDS = 5


def fit_integers(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Find scales and integers of groups x [n, G] with error weights x².

    Returns:
        Scales [G], of either sign, and integers l + top in 0 … 2 top - 1 as float32 [n, G]; both are 0 in a group
        without a weight above 1e-15.
    """
    peak = first_peak(x)
    empty = peak.abs() < TINY
    codes = (x * divide(-top, peak).masked_fill_(empty, 0)).round_().clamp_(-top, top - 1)
    weights = x * x
    sum_xl, sum_l2 = ordered_sum(weights * x * codes), ordered_sum(weights * codes * codes)
    _refine(x, weights, codes, sum_xl, sum_l2, (-top, top - 1))
    return _scale(sum_xl, sum_l2), codes.add_(top).masked_fill_(empty, 0)


def fit_positive(x: Tensor, weights: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Find x ≈ d l with l in 0 … top for values x ≥ 0 [n, G], the scales or minima of a block's groups.

    Nine step widths are tried, then the integers of the best are refined.

    Args:
        weights: float32 [n, G], of the errors.

    Returns:
        Scales [G] and integers as float32 [n, G].
    """
    peak = x.amax(0).clamp_(min=0)
    empty = peak < TINY
    steps = np.float32(0.1) * np.array([0, *range(-4, 0), *range(1, 5)], dtype=np.float32)
    inverse = (x.new_tensor(steps + np.float32(top))[:, None] / peak).masked_fill_(empty, 0)
    scales, errors = divide(1, inverse), torch.zeros_like(inverse)
    for i in range(len(x)):
        error = x[i] - (inverse * x[i]).round_().clamp_(max=top).mul_(scales)
        errors.add_(weights[i] * error * error)
    codes = (inverse.gather(0, first_smallest(errors)) * x).round_().clamp_(max=top)
    sum_xl, sum_l2 = ordered_sum(weights * x * codes), ordered_sum(weights * codes * codes)
    _refine(x, weights, codes, sum_xl, sum_l2, (0, top))
    return _scale(sum_xl, sum_l2).masked_fill_(empty, 0), codes


def _refine(x: Tensor, weights: Tensor, codes: Tensor, sum_xl: Tensor, sum_l2: Tensor, limits: tuple[int, int]) -> None:
    """Change `codes` [n, G], Σ w x l and Σ w l² [G] in place.

    ggml goes over the positions of a group, up to five rounds, until one makes no change. Here the acceptable changes
    at all positions are found at once, the next one in that order is made, and groups without one are finished: most
    are at the start.
    """
    n = len(x)
    order = torch.arange(n, dtype=torch.float32, device=x.device)[:, None]
    groups = torch.arange(x.shape[1], device=x.device)
    position, rounds = x.new_full((x.shape[1],), -1), x.new_zeros(x.shape[1])
    fixed, state = [x, weights, weights * x], [codes, sum_xl, sum_l2]
    while True:
        accept, *changes = _find_changes(fixed, state, limits)
        some = accept.amax(0).nonzero()[:, 0]
        if not len(some):
            return None
        steps = order + n * (order <= position[some]).float()  # positions that come again only in the next round
        steps = steps.sub_(accept.index_select(1, some).mul_(2 * n)).amin(0).add_(2 * n)
        position, rounds = steps % n, rounds[some] + (steps >= n)
        allowed = rounds < ROUNDS
        some, position, rounds = some[allowed], position[allowed], rounds[allowed]
        groups, row = groups[some], position.long()
        fixed = [one.index_select(1, some) for one in fixed]
        new, xl, l2 = (one[row, some] for one in changes)
        state = [state[0].index_select(1, some), xl, l2]
        state[0][row, torch.arange(len(some), device=x.device)] = new
        codes[row, groups], sum_xl[groups], sum_l2[groups] = new, xl, l2


def _find_changes(fixed: list[Tensor], state: list[Tensor], limits: tuple[int, int]) -> tuple[Tensor, ...]:
    """Find the best integer at each position while all others stay.

    Masks are float32, 1 or 0, and are combined by multiplication, which is faster than with booleans.

    Args:
        fixed: x, w and w x, [n, G].
        state: integers l [n, G], Σ w x l and Σ w l² [G].

    Returns:
        1 where that integer raises the score and 0 elsewhere, the integer, and the sums with it: all float32 [n, G].
    """
    x, weights, weighted_x = fixed
    codes, sum_xl, sum_l2 = state
    xl, l2 = sum_xl - weighted_x * codes, sum_l2 - (weights * codes).mul_(codes)
    new = (x * l2).div_(xl).round_().clamp_(*limits)
    accept, term = torch.empty_like(x), torch.empty_like(x)
    torch.gt(xl, 0, out=accept).mul_(torch.ne(new, codes, out=term))
    xl.add_(torch.mul(weighted_x, new, out=term))
    l2.add_(torch.mul(weights, new, out=term).mul_(new))
    score, least = (xl * xl).mul_(sum_l2), (sum_xl * sum_xl) * l2
    accept.mul_(score.gt_(least)).mul_(torch.gt(l2, 0, out=term))
    return accept, new, xl, l2


def _scale(sum_xl: Tensor, sum_l2: Tensor) -> Tensor:
    return torch.where(sum_l2 <= 0, 0, sum_xl / sum_l2)
