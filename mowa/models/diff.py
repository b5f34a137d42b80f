"""How far what one model says is from what another says of the same recordings, frame by frame.

    kl = mean over frames of Σ p (log p - log q),  p the reference's probabilities, q the other's

No text is needed: what a scheme did to a net shows before any letter changes. What made the numbers is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mowa.errors import ModelError

LOG_PROB_FLOOR = -20.0  # nats: what both find less likely than this is alike
INVALID_TOKEN = -1  # what is likeliest where there are no numbers


@dataclass(frozen=True, slots=True)
class ModelDiff:
    """`largest` and `mean` difference of a log-probability (nats), `kl` (nats a frame), `agreeing`: the share of frames
    with the same likeliest output, `blank`: how much more of the frames are blank, `frames`: how many there were."""

    max_abs_diff: float
    mean_abs_diff: float
    kl: float
    agreement: float
    blank_ratio_change: float
    num_frames: int


def compare_emissions(reference: Sequence[np.ndarray], candidate: Sequence[np.ndarray], blank_id: int) -> ModelDiff:
    """Log-probabilities float32 [T_i, V] of the same recordings. ModelError where they are not of the same shape."""
    largest, apart, kl, same, more, frames = 0.0, 0.0, 0.0, 0, 0, 0
    for ours, theirs in zip(reference, candidate, strict=True):
        if ours.shape != theirs.shape:
            raise ModelError(f"one says {ours.shape} of a recording, the other {theirs.shape}: not of the same model")
        p, q = np.maximum(ours, LOG_PROB_FLOOR), np.maximum(np.nan_to_num(theirs, nan=LOG_PROB_FLOOR), LOG_PROB_FLOOR)
        difference = np.abs(p - q)
        largest, apart = max(largest, float(difference.max(initial=0.0))), apart + float(difference.mean(-1).sum())
        kl += float((np.exp(p) * (p - q)).sum())
        best, found = ours.argmax(-1), np.where(np.isnan(theirs).any(-1), INVALID_TOKEN, theirs.argmax(-1))
        same += int((best == found).sum())
        more += int((found == blank_id).sum()) - int((best == blank_id).sum())
        frames += len(ours)
    count = max(1, frames)
    return ModelDiff(largest, apart / count, max(0.0, kl / count), same / count, more / count, frames)
