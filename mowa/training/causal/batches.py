"""Which rows of text share a batch, step by step. The whole run is planned before it starts, so it can be resumed.

First-fit: rows are shuffled, and each goes into the first open batch that has room for it. Among the rows of one pass
over the data nothing is split, nothing padded, and little room is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

OPEN_BINS = 64  # batches that may still be filled: a row is put into one of the next ones, never far from its place


def first_fit(lengths: Sequence[int], order: Iterable[int], max_tokens: int) -> list[list[int]]:
    """Indices in `order`, put into bins whose lengths sum to at most `room`. A longer row is a bin of its own.

    Of the bins begun last, OPEN are tried, the oldest first.
    """
    bins: list[list[int]] = []
    left: list[int] = []
    first = 0
    for index in order:
        length = lengths[index]
        for place in range(first, len(bins)):
            if left[place] >= length:
                break
        else:
            place = len(bins)
            bins.append([])
            left.append(max_tokens)
            first = max(first, place + 1 - OPEN_BINS)
        bins[place].append(int(index))
        left[place] -= length
    return bins


def group_by_length(lengths: Sequence[int], order: Iterable[int], max_tokens: int) -> list[list[int]]:
    """Indices for padded batches: neighbours in length share one, and count × longest stays within `room`."""
    bins: list[list[int]] = []
    for index in sorted(order, key=lambda index: lengths[index]):
        if not bins or lengths[index] * (len(bins[-1]) + 1) > max_tokens:
            bins.append([])
        bins[-1].append(int(index))
    return bins


def plan_batches(
    lengths: Sequence[int],
    *,
    max_tokens: int,
    packing: bool,
    epochs: float,
    num_batches: int,
    multiple_of: int,
    seed: int,
) -> list[list[int]]:
    """Batches of row indices for a whole run: `count` of them, or as many as `epochs` passes have, in whole multiples.

    Each pass is shuffled and packed anew; its bins are shuffled too.
    """
    rng = np.random.default_rng(seed)
    fill = first_fit if packing else group_by_length
    bins: list[list[int]] = []
    passes = 0
    while not num_batches or len(bins) < num_batches:
        drawn = fill(lengths, rng.permutation(len(lengths)).tolist(), max_tokens)
        drawn = [drawn[place] for place in rng.permutation(len(drawn))]
        left = epochs - passes
        if not num_batches and left < 1:
            drawn = drawn[: math.ceil(left * len(drawn))]
        bins += drawn
        passes += 1
        if not num_batches and passes >= epochs:
            break
    if not num_batches:
        num_batches = max(multiple_of, round(len(bins) / multiple_of) * multiple_of)
        while len(bins) < num_batches:
            bins += fill(lengths, rng.permutation(len(lengths)).tolist(), max_tokens)
    return bins[:num_batches]


def plan_eval_batches(lengths: Sequence[int], max_tokens: int, packing: bool) -> list[list[int]]:
    """Every row once, the longest first, to be measured on."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return (first_fit if packing else group_by_length)(lengths, order, max_tokens)
