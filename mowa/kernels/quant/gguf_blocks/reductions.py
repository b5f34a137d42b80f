"""Reductions over the rows of [n, G], in ggml's order: the same to the bit as its loops over the weights of a group."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def by_position(x: Tensor, n: int) -> Tensor:
    """Reorder blocks [B, groups · n] → [n, groups · B], contiguous, with group j of block b in column j B + b."""
    return x.view(len(x), -1, n).permute(2, 1, 0).reshape(n, -1).contiguous()


def ordered_sum(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Add the rows of float32 [n, G] one after the other, from the first to the last → [G], in `out` if given.

    On the CPU numpy does it in one call: along any axis but the one that is contiguous in memory its `add.reduce` adds
    in order. `torch.sum` promises no order.
    """
    if x.device.type == "cpu" and x.shape[1] > 1 and x.stride(1) == 1:
        out = torch.empty_like(x[0]) if out is None else out
        np.add.reduce(x.numpy(), axis=0, out=out.numpy())
        return out
    total = x[0].clone() if out is None else out.copy_(x[0])
    for row in x[1:].unbind():
        total.add_(row)
    return total


def row_sums(x: Tensor, out: Tensor) -> Callable[[int], object]:
    """Return a function that adds up the rows of x, float32 [n, G], into row i of out [k, G], as `ordered_sum` does."""
    if x.device.type == "cpu" and x.shape[1] > 1 and x.stride(1) == 1:
        source, target = x.numpy(), out.numpy()
        return lambda i: np.add.reduce(source, 0, None, target[i])
    return lambda i: ordered_sum(x, out[i])


def replace_where(better: Tensor, new: Tensor, old: Tensor) -> None:
    """Replace float32 `old` by `new` where `better`, int32 of the same shape, is 1 rather than 0.

    Several times faster than `torch.where` on the CPU, which branches on each element.
    """
    bits = old.view(torch.int32)
    bits.bitwise_xor_(new.view(torch.int32).bitwise_xor(bits).bitwise_and_(better.neg()))


def lowest(x: Tensor) -> Tensor:
    """Return the smallest of each column of [n, G]; of zeros of both signs the first."""
    low = x.amin(0)
    if (low == 0).any():
        first_zero = (x == 0).int().argmax(0, keepdim=True)
        low = torch.where(low == 0, x.gather(0, first_zero)[0], low)
    return low


def first_peak(x: Tensor) -> Tensor:
    """Return the value of largest magnitude of each column of [n, G]; of equals the first, of zeros +0; NaN of NaN.

    ggml passes over NaN, and stores zeros where the squares of large weights overflow.
    """
    high, low = x.amax(0), x.amin(0).neg_()
    peak = torch.where(high > low, high, -low)
    ties = (high == low).nonzero()[:, 0]
    if len(ties):
        columns = x.index_select(1, ties)
        found = columns.gather(0, columns.abs().argmax(0, keepdim=True))[0]
        peak[ties] = found.masked_fill_(found == 0, 0)
    return peak


def first_smallest(errors: Tensor) -> Tensor:
    """Return the index of the smallest of each column of [n, G], int64 [1, G]; of equals the first.

    A NaN is never smaller than row 0, and nothing is smaller than a NaN in row 0. Changes `errors`.
    """
    errors[0].nan_to_num_(-torch.inf, torch.inf)
    errors[1:].nan_to_num_(torch.inf, torch.inf)
    return errors.argmin(0, keepdim=True)
