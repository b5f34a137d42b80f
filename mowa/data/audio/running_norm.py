"""Loudness of a stream: normalised by what was heard so far, for nobody knows the rest of a live recording.

    y[i] = (x[i] − m) / √(v + 10⁻⁷)

with m and v the mean and variance of the samples before the block of `BLOCK` that i lies in, older ones counting less
and less, and `Level` itself counting as `WEIGHT_S` of sound at the beginning. `audio.normalize` (over all of a
recording) is what it stands for. It knows samples at one rate, and no models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mowa.data.audio.decoders import Samples

BLOCK_SAMPLES = 320
HALF_LIFE_S = 10.0  # after which a sound counts half
PRIOR_S = 0.3
SPEECH_VARIANCE = 0.0025  # variance of speech at -26 dB of full scale (ITU-T P.56's usual level)


@dataclass(frozen=True, slots=True)
class RunningStats:
    """What was heard so far: `count` samples (older ones less), the sums of them and of their squares."""

    count: float
    total: float
    sum_squares: float

    @classmethod
    def prior(cls, variance: float = SPEECH_VARIANCE, rate_hz: int = 16_000) -> RunningStats:
        count = PRIOR_S * rate_hz
        return cls(count, 0.0, count * variance)


def normalize_running(samples: Samples, stats: RunningStats, rate_hz: int = 16_000) -> tuple[Samples, RunningStats]:
    """Samples float32 [n], n a multiple of BLOCK but at the end of a stream → the same many, and the level after them.

    Cut into calls anywhere between blocks, a stream gives the same numbers.
    """
    keep = 0.5 ** (BLOCK_SAMPLES / (HALF_LIFE_S * rate_hz))
    out = np.empty(len(samples), np.float32)
    count, total, squares = stats.count, stats.total, stats.sum_squares
    for start in range(0, len(samples), BLOCK_SAMPLES):
        block = samples[start : start + BLOCK_SAMPLES].astype(np.float64)
        mean = total / count
        spread = max(0.0, squares / count - mean * mean)
        out[start : start + BLOCK_SAMPLES] = (block - mean) / math.sqrt(spread + 1e-7)
        count, total = count * keep + len(block), total * keep + float(block.sum())
        squares = squares * keep + float(block @ block)
    return out, RunningStats(count, total, squares)
