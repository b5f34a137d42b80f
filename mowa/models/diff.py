"""Measure the difference between two models' outputs, frame by frame (or token by token), without labels.

    kl = mean over frames of Σ p (log p - log q),  p the reference's probabilities, q the candidate's

Computed in float64 from logits or log-probabilities. A frame with NaN or +inf agrees with nothing and makes the
other differences infinite. Needs numpy only: TensorRT exports carry this file, to compare engines without mowa.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MIN_LOG_PROB = -50.0  # nats: log-probabilities are clamped to this, below which float32 is too coarse
MIN_LOG_PROB_RMS = -10.0  # nats: the same for `rms_diff`, which improbable tokens would dominate
BLOCK_VALUES = 1 << 22  # values of a model in memory at a time


@dataclass(frozen=True, slots=True)
class ModelDiff:
    """Difference of two models' next-token or frame distributions.

    Attributes:
        max_abs_diff: largest difference of a log-probability, nats.
        mean_abs_diff: mean difference of a log-probability, nats.
        rms_diff: root mean square difference of the log-probabilities above `MIN_LOG_PROB_RMS`, nats.
        kl: mean KL divergence, nats per frame.
        max_kl: largest KL divergence of a frame, nats.
        agreement: fraction of frames with the same top token.
        num_frames: frames, or token positions, compared.
        blank_ratio_change: fraction of frames whose top token is blank, candidate minus reference; 0 without a blank.
    """

    max_abs_diff: float
    mean_abs_diff: float
    rms_diff: float
    kl: float
    max_kl: float
    agreement: float
    num_frames: int
    blank_ratio_change: float = 0.0

    def __str__(self) -> str:
        return (
            f"same top token at {self.agreement:.2%} of {self.num_frames:,} positions, KL divergence {self.kl:.2g}"
            f" nats (maximum {self.max_kl:.2g})"
        )


def have_same_shapes(reference: Sequence[Any], candidate: Sequence[Any]) -> bool:
    """Return whether two models' outputs can be compared: as many arrays or tensors, each of the same shape."""
    return [tuple(one.shape) for one in reference] == [tuple(one.shape) for one in candidate]


def compare(reference: Sequence[Any], candidate: Sequence[Any], blank_id: int | None = None) -> ModelDiff:
    """Compare the outputs of two models on the same inputs.

    Args:
        reference: logits or log-probabilities [T_i, V], numpy arrays or torch tensors of any float dtype.
        candidate: the same of the other model.
        blank_id: token id of the CTC blank, if there is one.

    Raises:
        ValueError: the shapes differ.
    """
    return compare_pairs(zip(reference, candidate, strict=True), blank_id)


def compare_pairs(pairs: Iterable[tuple[Any, Any]], blank_id: int | None = None) -> ModelDiff:
    """Compare as `compare` does, over (reference, candidate) pairs that need not be in memory together."""
    frames = values = same = more_blank = 0
    max_abs = total_abs = total_square = total_kl = max_kl = 0.0
    for ours, theirs in pairs:
        if tuple(ours.shape) != tuple(theirs.shape):
            raise ValueError(f"outputs have shapes {tuple(ours.shape)} and {tuple(theirs.shape)}: they do not match")
        step = max(1, BLOCK_VALUES // max(1, ours.shape[-1]))
        for start in range(0, len(ours), step):
            p, q = (_log_softmax(one[start : start + step]) for one in (ours, theirs))
            valid = ~(np.isnan(p) | np.isnan(q)).any(-1)
            expected, found = (np.where(np.isnan(one).any(-1), -1, one.argmax(-1)) for one in (p, q))
            same += int((valid & (expected == found)).sum())
            more_blank += int((found == blank_id).sum()) - int((expected == blank_id).sum())
            frames, values = frames + len(p), values + p.size
            if not valid.all():
                max_abs = total_abs = total_square = total_kl = max_kl = np.inf
                continue
            p, q = np.maximum(p, MIN_LOG_PROB), np.maximum(q, MIN_LOG_PROB)
            difference = np.abs(p - q)
            max_abs, total_abs = max(max_abs, float(difference.max())), total_abs + float(difference.sum())
            kl = np.maximum((np.exp(p) * (p - q)).sum(-1), 0)
            total_kl, max_kl = total_kl + float(kl.sum()), max(max_kl, float(kl.max()))
            difference = np.maximum(p, MIN_LOG_PROB_RMS) - np.maximum(q, MIN_LOG_PROB_RMS)
            total_square += float(np.square(difference).sum())
    frames_or_1, values_or_1 = max(1, frames), max(1, values)
    return ModelDiff(
        max_abs_diff=max_abs,
        mean_abs_diff=total_abs / values_or_1,
        rms_diff=float(np.sqrt(total_square / values_or_1)),
        kl=total_kl / frames_or_1,
        max_kl=max_kl,
        agreement=same / frames_or_1,
        num_frames=frames,
        blank_ratio_change=more_blank / frames_or_1,
    )


def _log_softmax(logits: Any) -> np.ndarray[Any, Any]:
    """Return log-probabilities, float64 [T, V], of an array or tensor; a frame with NaN or +inf is NaN."""
    tensor = logits.detach().double().cpu().numpy() if hasattr(logits, "detach") else logits
    with np.errstate(invalid="ignore", divide="ignore"):
        scores = np.asarray(tensor, np.float64)
        scores = scores - scores.max(-1, keepdims=True)
        log_probs: np.ndarray[Any, Any] = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    return log_probs
