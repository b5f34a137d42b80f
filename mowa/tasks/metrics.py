"""Word and character error rates with bootstrap confidence intervals, of one model or of two compared.

Recordings are resampled with replacement; two models are compared on the same resamples (paired bootstrap), so that
what both find hard does not count as a difference. Source: Bisani and Ney, "Bootstrap estimates for confidence
intervals in ASR performance evaluation", ICASSP 2004.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mowa.data.text.normalize import normalize_text
from mowa.errors import MissingDependency

BOOTSTRAP_RESAMPLES, CONFIDENCE_LEVEL = 2000, 0.95


@dataclass(frozen=True, slots=True)
class ErrorRates:
    """Error rates (1.0: all wrong) with 95 % confidence intervals, over `num_words` reference words."""

    wer: float
    cer: float
    wer_interval: tuple[float, float]
    cer_interval: tuple[float, float]
    num_words: int


@dataclass(frozen=True, slots=True)
class ErrorRateChange:
    """Relative change of error rates from a baseline to a candidate (0.02: 2 % more errors), with 95 % intervals."""

    wer: float
    cer: float
    wer_interval: tuple[float, float]
    cer_interval: tuple[float, float]


def error_rates(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, float]:
    """Return wer and cer by jiwer, 1.0 = all wrong; texts are lower-cased and stripped of punctuation.

    Raises:
        MissingDependency: jiwer is not installed.
    """
    jiwer = _import_jiwer()
    texts = [normalize_text(text) for text in references], [normalize_text(text) for text in hypotheses]
    return {"wer": jiwer.wer(*texts), "cer": jiwer.cer(*texts)}


def bootstrap_error_rates(
    references: Sequence[str], hypotheses: Sequence[str], *, n_resamples: int = BOOTSTRAP_RESAMPLES
) -> ErrorRates:
    """Return error rates with confidence intervals; texts are lower-cased and stripped of punctuation.

    Raises:
        MissingDependency: jiwer is not installed.
    """
    words, characters = (_count_errors(references, hypotheses, words=words) for words in (True, False))
    resamples = _draw_resamples(len(references), n_resamples)
    (wer, wer_interval), (cer, cer_interval) = (_rate(*counts, resamples) for counts in (words, characters))
    return ErrorRates(wer, cer, wer_interval, cer_interval, int(words[1].sum()))


def paired_bootstrap(references: Sequence[str], baseline: Sequence[str], candidate: Sequence[str]) -> ErrorRateChange:
    """Return the relative change of the error rates from `baseline` to `candidate`, with confidence intervals."""
    resamples = _draw_resamples(len(references), BOOTSTRAP_RESAMPLES)
    changes = []
    for words in (True, False):
        (old, _), (new, _) = (_count_errors(references, one, words=words) for one in (baseline, candidate))
        change = (new.sum() - old.sum()) / max(1, int(old.sum()))
        resampled = (new[resamples].sum(1) - old[resamples].sum(1)) / np.maximum(1, old[resamples].sum(1))
        changes.append((float(change), _interval(resampled)))
    (wer, wer_interval), (cer, cer_interval) = changes
    return ErrorRateChange(wer, cer, wer_interval, cer_interval)


def _rate(errors: np.ndarray, totals: np.ndarray, resamples: np.ndarray) -> tuple[float, tuple[float, float]]:
    resampled = errors[resamples].sum(1) / np.maximum(1, totals[resamples].sum(1))
    return float(errors.sum() / max(1, totals.sum())), _interval(resampled)


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2])
    return float(low), float(high)


def _draw_resamples(count: int, n_resamples: int) -> np.ndarray:
    """Return indices of recordings, int64 [n_resamples, count]; the same for all models."""
    return np.random.default_rng(0).integers(0, count, (n_resamples, count))


def _count_errors(
    references: Sequence[str], hypotheses: Sequence[str], *, words: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return errors and reference length of each recording, in words or characters: int [N], int [N]."""
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
