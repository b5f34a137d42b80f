"""Error rates and losses with bootstrap confidence intervals, of one model or of two compared on the same samples.

Samples (recordings, texts) are resampled with replacement; two models are compared on the same resamples (paired
bootstrap), so that what both find hard does not count as a difference. Intervals are 95 % percentile intervals. Source:
Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation", ICASSP 2004.

Texts are compared after `normalize_text`. WER counts words between spaces, CER Unicode code points, as jiwer does: a
vowel sign or tone mark that NFC does not compose is a character of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mowa.data.text.normalize import normalize_text
from mowa.errors import DataError, MissingDependency

BOOTSTRAP_RESAMPLES, CONFIDENCE_LEVEL = 2000, 0.95
MAX_INDICES = 1 << 22  # of resampled samples in memory at a time

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class ErrorRates:
    """Error rates (1.0: all wrong) with 95 % confidence intervals, over `num_words` reference words."""

    wer: float
    cer: float
    wer_interval: Interval
    cer_interval: Interval
    num_words: int


@dataclass(frozen=True, slots=True)
class ErrorRateChange:
    """Relative change of error rates from a baseline to a candidate (0.02: 2 % more errors), with 95 % intervals."""

    wer: float
    cer: float
    wer_interval: Interval
    cer_interval: Interval


@dataclass(frozen=True, slots=True)
class Loss:
    """Loss (nats per token) and perplexity exp(loss) with 95 % confidence intervals, over `num_tokens` tokens."""

    loss: float
    perplexity: float
    loss_interval: Interval
    perplexity_interval: Interval
    num_tokens: int


@dataclass(frozen=True, slots=True)
class LossChange:
    """Loss of a candidate minus that of a baseline, nats per token, and the ratio of perplexities; 95 % intervals."""

    loss: float
    perplexity_ratio: float
    loss_interval: Interval
    perplexity_ratio_interval: Interval


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value over samples with its 95 % confidence interval, `low` to `high`."""

    value: float
    low: float
    high: float


def error_rates(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, float]:
    """Return wer and cer over all texts, 1.0 = all wrong.

    Raises:
        MissingDependency: jiwer is not installed.
    """
    counts = {"wer": _count_errors(references, hypotheses), "cer": _count_errors(references, hypotheses, words=False)}
    return {name: float(_ratio(errors.sum(), totals.sum())) for name, (errors, totals) in counts.items()}


def bootstrap_error_rates(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRates:
    """Return error rates with confidence intervals.

    Raises:
        MissingDependency: jiwer is not installed.
        DataError: there are no texts.
    """
    words, characters = (_count_errors(references, hypotheses, words=words) for words in (True, False))
    wer, cer = bootstrap_ratio(*words), bootstrap_ratio(*characters)
    return ErrorRates(wer.value, cer.value, _interval(wer), _interval(cer), int(words[1].sum()))


def paired_bootstrap(references: Sequence[str], baseline: Sequence[str], candidate: Sequence[str]) -> ErrorRateChange:
    """Return the relative change of the error rates from `baseline` to `candidate`, with confidence intervals."""
    found = []
    for words in (True, False):
        (old, _), (new, _) = (_count_errors(references, one, words=words) for one in (baseline, candidate))
        found.append(bootstrap_ratio(new - old, old))
    wer, cer = found
    return ErrorRateChange(wer.value, cer.value, _interval(wer), _interval(cer))


def bootstrap_loss(losses: Sequence[float] | np.ndarray, num_tokens: Sequence[int] | np.ndarray) -> Loss:
    """Return loss and perplexity over all tokens, with intervals over samples.

    Args:
        losses: summed negative log-likelihood of each sample, nats.
        num_tokens: predicted tokens of each sample.

    Raises:
        DataError: there are no samples.
    """
    loss = bootstrap_ratio(losses, num_tokens)
    interval = _interval(loss)
    return Loss(loss.value, _exp(loss.value), interval, _exp_both(interval), int(np.sum(num_tokens)))


def paired_bootstrap_loss(
    baseline: Sequence[float] | np.ndarray,
    candidate: Sequence[float] | np.ndarray,
    num_tokens: Sequence[int] | np.ndarray,
) -> LossChange:
    """Return the loss of `candidate` minus that of `baseline`; arguments are those of `bootstrap_loss`."""
    difference = np.asarray(candidate, np.float64) - np.asarray(baseline, np.float64)
    loss = bootstrap_ratio(difference, num_tokens)
    interval = _interval(loss)
    return LossChange(loss.value, _exp(loss.value), interval, _exp_both(interval))


def bootstrap_ratio(numerators: Sequence[float] | np.ndarray, denominators: Sequence[int] | np.ndarray) -> Estimate:
    """Return a rate over samples of different sizes, such as right tokens / tokens, with its interval.

    It is the sum of `numerators` over that of `denominators`, [N] each. Raises DataError if there are no samples.
    """
    above, below = np.asarray(numerators), np.asarray(denominators)
    if above.shape != below.shape:
        raise ValueError(f"{len(above)} values for {len(below)} samples")
    if not (count := len(above)):
        raise DataError("there are no samples to evaluate")
    rng, block = np.random.default_rng(0), max(1, MAX_INDICES // count)  # all models have the same resamples
    resampled = []
    for start in range(0, BOOTSTRAP_RESAMPLES, block):
        indices = rng.integers(0, count, (min(block, BOOTSTRAP_RESAMPLES - start), count))
        resampled.append(_ratio(above[indices].sum(1), below[indices].sum(1)))
    edges = [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2]
    low, high = np.quantile(np.concatenate(resampled), edges)
    return Estimate(float(_ratio(above.sum(), below.sum())), float(low), float(high))


def bootstrap_mean(values: Sequence[float] | np.ndarray) -> Estimate:
    """Return the mean of a value per sample, such as 1 for a right answer, with its interval."""
    return bootstrap_ratio(values, np.ones(len(values), np.int64))


def align_characters(reference: str, hypothesis: str) -> list[tuple[str, str, bool]]:
    """Align two texts as CER does, without normalizing: (part of the reference, part of the hypothesis, equal)."""
    found = _import_jiwer().process_characters(reference, hypothesis)
    (ref,), (hyp,) = found.references, found.hypotheses
    return [
        (
            "".join(ref[one.ref_start_idx : one.ref_end_idx]),
            "".join(hyp[one.hyp_start_idx : one.hyp_end_idx]),
            one.type == "equal",
        )
        for one in found.alignments[0]
    ]


def _interval(estimate: Estimate) -> Interval:
    return estimate.low, estimate.high


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return above / below as jiwer does: errors over an empty reference are 1 each."""
    return np.asarray(above / np.maximum(1, below))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf  # a larger exponent overflows


def _exp_both(interval: Interval) -> Interval:
    return _exp(interval[0]), _exp(interval[1])


def _count_errors(
    references: Sequence[str], hypotheses: Sequence[str], *, words: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Return errors and reference length of each sample, in words or characters: int [N], int [N]."""
    jiwer = _import_jiwer()
    process = jiwer.process_words if words else jiwer.process_characters
    pairs = zip(references, hypotheses, strict=True)
    found = [process(normalize_text(reference), normalize_text(hypothesis)) for reference, hypothesis in pairs]
    errors = [one.substitutions + one.deletions + one.insertions for one in found]
    return np.array(errors), np.array([one.substitutions + one.deletions + one.hits for one in found])


def _import_jiwer() -> Any:
    try:
        import jiwer
    except ImportError:
        raise MissingDependency("error rates need jiwer: pip install 'mowa[evaluate]'") from None
    return jiwer
