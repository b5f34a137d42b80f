"""Measure the difference of two models' emissions on the same recordings, frame by frame, without transcripts.

kl = mean over frames of Σ p (log p - log q),  p the reference's probabilities, q the candidate's
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mowa.errors import ModelError

LOG_PROB_FLOOR = -20.0  # nats; differences below this probability do not count
INVALID_TOKEN = -1  # the top token of a frame that has NaN


@dataclass(frozen=True, slots=True)
class ModelDiff:
    """Difference of two models' emissions.

    Attributes:
        max_abs_diff: largest difference of a log-probability, nats.
        mean_abs_diff: mean difference of a log-probability, nats.
        kl: nats per frame.
        agreement: fraction of frames with the same top token.
        blank_ratio_change: fraction of frames whose top token is blank, candidate minus reference.
        num_frames: frames compared.
    """

    max_abs_diff: float
    mean_abs_diff: float
    kl: float
    agreement: float
    blank_ratio_change: float
    num_frames: int


def compare_emissions(reference: Sequence[np.ndarray], candidate: Sequence[np.ndarray], blank_id: int) -> ModelDiff:
    """Compare log-probabilities, float32 [T_i, V], of two models on the same recordings.

    Args:
        reference: one array per recording.
        candidate: the same recordings.
        blank_id: token id of the CTC blank.

    Raises:
        ModelError: the shapes differ.
    """
    largest, total, kl, same, more_blank, frames = 0.0, 0.0, 0.0, 0, 0, 0
    for ours, theirs in zip(reference, candidate, strict=True):
        if ours.shape != theirs.shape:
            raise ModelError(f"emissions have shapes {ours.shape} and {theirs.shape}: the models do not match")
        p, q = np.maximum(ours, LOG_PROB_FLOOR), np.maximum(np.nan_to_num(theirs, nan=LOG_PROB_FLOOR), LOG_PROB_FLOOR)
        difference = np.abs(p - q)
        largest, total = max(largest, float(difference.max(initial=0.0))), total + float(difference.mean(-1).sum())
        kl += float((np.exp(p) * (p - q)).sum())
        expected, found = ours.argmax(-1), np.where(np.isnan(theirs).any(-1), INVALID_TOKEN, theirs.argmax(-1))
        same += int((expected == found).sum())
        more_blank += int((found == blank_id).sum()) - int((expected == blank_id).sum())
        frames += len(ours)
    count = max(1, frames)
    return ModelDiff(largest, total / count, max(0.0, kl / count), same / count, more_blank / count, frames)
