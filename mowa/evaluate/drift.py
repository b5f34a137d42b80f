"""How far what one model says is from what another says of the same recordings, frame by frame.

    kl = mean over frames of Σ p (log p - log q),  p the reference's probabilities, q the other's

No text is needed: what a scheme did to a net shows before any letter changes. What made the numbers is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mowa.errors import ModelError

NEVER = -20.0  # nats: what both find less likely than this is alike
NOTHING = -1  # what is likeliest where there are no numbers


@dataclass(frozen=True, slots=True)
class Drift:
    """`largest` and `mean` difference of a log-probability (nats), `kl` (nats a frame), `agreeing`: the share of frames
    with the same likeliest output, `blank`: how much more of the frames are blank, `frames`: how many there were."""

    largest: float
    mean: float
    kl: float
    agreeing: float
    blank: float
    frames: int


def drift(reference: Sequence[np.ndarray], other: Sequence[np.ndarray], blank: int) -> Drift:
    """Log-probabilities float32 [T_i, V] of the same recordings. ModelError where they are not of the same shape."""
    largest, apart, kl, same, more, frames = 0.0, 0.0, 0.0, 0, 0, 0
    for ours, theirs in zip(reference, other, strict=True):
        if ours.shape != theirs.shape:
            raise ModelError(f"one says {ours.shape} of a recording, the other {theirs.shape}: not of the same model")
        p, q = np.maximum(ours, NEVER), np.maximum(np.nan_to_num(theirs, nan=NEVER), NEVER)
        difference = np.abs(p - q)
        largest, apart = max(largest, float(difference.max(initial=0.0))), apart + float(difference.mean(-1).sum())
        kl += float((np.exp(p) * (p - q)).sum())
        best, found = ours.argmax(-1), np.where(np.isnan(theirs).any(-1), NOTHING, theirs.argmax(-1))
        same += int((best == found).sum())
        more += int((found == blank).sum()) - int((best == blank).sum())
        frames += len(ours)
    count = max(1, frames)
    return Drift(largest, apart / count, max(0.0, kl / count), same / count, more / count, frames)
