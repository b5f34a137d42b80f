"""Normalize a live stream with running statistics, since the rest of the recording is not available yet.

    y[i] = (x[i] − m) / √(v + 10⁻⁷)

m and v are the exponentially weighted mean and variance of the samples before the block of `BLOCK_SAMPLES` that holds
i; a prior counts as `PRIOR_S` of audio at the start. This approximates `reader.normalize`, which uses the statistics of
a whole recording.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mowa.data.audio.decoders import Samples

BLOCK_SAMPLES = 320
HALF_LIFE_S = 10.0  # after which a sample has half its weight
PRIOR_S = 0.3
SPEECH_VARIANCE = 0.0025  # variance of speech at -26 dBFS, the usual level of ITU-T P.56


@dataclass(frozen=True, slots=True)
class RunningStats:
    """Weighted number of samples, their weighted sum and their weighted sum of squares."""

    count: float
    total: float
    sum_squares: float

    @classmethod
    def prior(cls, variance: float = SPEECH_VARIANCE, rate_hz: int = 16_000) -> RunningStats:
        """Return the statistics at the start of a stream: mean 0 and `variance` over `PRIOR_S` seconds."""
        count = PRIOR_S * rate_hz
        return cls(count, 0.0, count * variance)


def normalize_running(samples: Samples, stats: RunningStats, rate_hz: int = 16_000) -> tuple[Samples, RunningStats]:
    """Normalize float32 [n] and return it with the updated statistics.

    n is a multiple of `BLOCK_SAMPLES`, except at the end of a stream. The result does not depend on where between
    blocks a stream is split into calls.
    """
    keep = 0.5 ** (BLOCK_SAMPLES / (HALF_LIFE_S * rate_hz))
    out = np.empty(len(samples), np.float32)
    count, total, squares = stats.count, stats.total, stats.sum_squares
    for start in range(0, len(samples), BLOCK_SAMPLES):
        block = samples[start : start + BLOCK_SAMPLES].astype(np.float64)
        mean = total / count
        variance = max(0.0, squares / count - mean * mean)
        out[start : start + BLOCK_SAMPLES] = (block - mean) / math.sqrt(variance + 1e-7)
        count, total = count * keep + len(block), total * keep + float(block.sum())
        squares = squares * keep + float(block @ block)
    return out, RunningStats(count, total, squares)
