"""Plan the batches of a language-model run: which samples share a batch, step by step.

The whole run is planned before it starts, so a resumed run has the same batches. Packing is first-fit: samples are
shuffled, and each goes into the first open batch with enough space. Within a pass nothing is split or padded, and
little space is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from torch import Tensor

from mowa.tasks.causal import TokenizedExample, pad

OPEN_BINS = 64  # batches that may still be filled, so that a sample stays near its place in the shuffled order


def first_fit(lengths: Sequence[int], order: Iterable[int], max_tokens: int) -> list[list[int]]:
    """Pack sample indices, in `order`, into bins of at most `max_tokens`; a longer sample is a bin of its own.

    Of the OPEN_BINS newest bins, the oldest with enough space is taken.
    """
    bins: list[list[int]] = []
    free: list[int] = []
    first = 0
    for index in order:
        length = lengths[index]
        for place in range(first, len(bins)):
            if free[place] >= length:
                break
        else:
            place = len(bins)
            bins.append([])
            free.append(max_tokens)
            first = max(first, place + 1 - OPEN_BINS)
        bins[place].append(int(index))
        free[place] -= length
    return bins


def group_by_length(lengths: Sequence[int], order: Iterable[int], max_tokens: int) -> list[list[int]]:
    """Group sample indices of similar length for padded batches, so that count × longest is at most `max_tokens`."""
    bins: list[list[int]] = []
    for index in sorted(order, key=lambda index: lengths[index]):
        if not bins or lengths[index] * (len(bins[-1]) + 1) > max_tokens:
            bins.append([])
        bins[-1].append(int(index))
    return bins


def padded_batches(samples: Sequence[TokenizedExample], max_tokens: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches of samples of similar length, padded as `tasks.causal.pad` does: at most `max_tokens` tokens each.

    A longer sample is a batch of its own.
    """
    for group in group_by_length([len(one) for one in samples], range(len(samples)), max_tokens):
        yield pad([samples[index] for index in group], 0, pad_to_multiple_of=1)


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
    """Plan the batches of a run, as lists of sample indices; each epoch is shuffled and packed anew.

    Args:
        lengths: tokens of each sample.
        max_tokens: tokens per batch at most, including padding.
        packing: whether batches are packed or padded.
        epochs: passes over the samples, where `num_batches` is 0.
        num_batches: number of batches; 0: as many as `epochs` passes have.
        multiple_of: with `epochs`, the number of batches is a multiple of this (the batches in a step).
        seed: random seed.
    """
    rng = np.random.default_rng(seed)
    group = first_fit if packing else group_by_length
    bins: list[list[int]] = []
    passes = 0
    while not num_batches or len(bins) < num_batches:
        drawn = group(lengths, rng.permutation(len(lengths)).tolist(), max_tokens)
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
            bins += group(lengths, rng.permutation(len(lengths)).tolist(), max_tokens)
    return bins[:num_batches]


def plan_eval_batches(lengths: Sequence[int], max_tokens: int, packing: bool) -> list[list[int]]:
    """Group every sample once, the longest first."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return (first_fit if packing else group_by_length)(lengths, order, max_tokens)
