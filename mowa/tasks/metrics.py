"""Two hearings of the same recordings: how many more words one of them gets wrong, and whether that is chance.

Recordings are drawn anew many times, the same for both (paired bootstrap, Bisani and Ney 2004): what both find hard
does not count as a difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mowa.data.text.normalize import normalize_text
from mowa.errors import MissingDependency

BOOTSTRAP_RESAMPLES, CONFIDENCE_LEVEL = 2000, 0.95


@dataclass(frozen=True, slots=True)
class ErrorRates:
    """Error rates (1.0: all wrong) with their intervals; `words` there were to hear."""

    wer: float
    cer: float
    wer_interval: tuple[float, float]
    cer_interval: tuple[float, float]
    num_words: int


@dataclass(frozen=True, slots=True)
class ErrorRateChange:
    """How much higher the second's error rates are, relative to the first's (0.02: by two in a hundred)."""

    wer: float
    cer: float
    wer_interval: tuple[float, float]
    cer_interval: tuple[float, float]


def bootstrap_error_rates(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRates:
    """Lower-cased, without punctuation. MissingPart without jiwer."""
    words, letters = _counts(references, hypotheses, words=True), _counts(references, hypotheses, words=False)
    drawn = _drawn(len(references))
    (wer, wer_interval), (cer, cer_interval) = (_rate(*one, drawn) for one in (words, letters))
    return ErrorRates(wer, cer, wer_interval, cer_interval, int(words[1].sum()))


def paired_bootstrap(references: Sequence[str], baseline: Sequence[str], candidate: Sequence[str]) -> ErrorRateChange:
    drawn = _drawn(len(references))
    found = []
    for words in (True, False):
        (ours, _), (theirs, _) = (_counts(references, one, words=words) for one in (baseline, candidate))
        whole = max(1, int(ours.sum()))
        share = (theirs.sum() - ours.sum()) / whole
        again = (theirs[drawn].sum(1) - ours[drawn].sum(1)) / np.maximum(1, ours[drawn].sum(1))
        low, high = np.quantile(again, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2])
        found.append((float(share), (float(low), float(high))))
    (wer, wer_interval), (cer, cer_interval) = found
    return ErrorRateChange(wer, cer, wer_interval, cer_interval)


def _rate(wrong: np.ndarray, total: np.ndarray, drawn: np.ndarray) -> tuple[float, tuple[float, float]]:
    again = wrong[drawn].sum(1) / np.maximum(1, total[drawn].sum(1))
    low, high = np.quantile(again, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2])
    return float(wrong.sum() / max(1, total.sum())), (float(low), float(high))


def _drawn(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, count, (BOOTSTRAP_RESAMPLES, count))


def _counts(said: Sequence[str], heard: Sequence[str], *, words: bool) -> tuple[np.ndarray, np.ndarray]:
    """Of each recording, what is wrong and what there was to hear."""
    try:
        import jiwer
    except ImportError:
        raise MissingDependency("jiwer is needed to measure error rates: pip install 'mowa[evaluate]'") from None
    process = jiwer.process_words if words else jiwer.process_characters
    seen = [process(normalize_text(a), normalize_text(b)) for a, b in zip(said, heard, strict=True)]
    wrong = [one.substitutions + one.deletions + one.insertions for one in seen]
    return np.array(wrong), np.array([one.substitutions + one.deletions + one.hits for one in seen])


def error_rates(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, float]:
    """Word and character error rate (jiwer), lower-cased, punctuation stripped: {"wer", "cer"}, 1.0 = all wrong."""
    try:
        import jiwer
    except ImportError:
        raise MissingDependency("jiwer is needed to measure error rates: pip install 'mowa[evaluate]'") from None
    said, heard = [normalize_text(text) for text in references], [normalize_text(text) for text in hypotheses]
    return {"wer": jiwer.wer(said, heard), "cer": jiwer.cer(said, heard)}


def bootstrap_intervals(
    references: Sequence[str],
    hypotheses: Sequence[str],
    *,
    n_resamples: int = 1000,
    confidence_level: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Of both error rates, where they lie in `level` of `draws` resamplings of the recordings (bootstrap)."""
    import jiwer

    said, heard = [normalize_text(text) for text in references], [normalize_text(text) for text in hypotheses]
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(said), (n_resamples, len(said)))
    out = {}
    for name, measure in (("wer", jiwer.process_words), ("cer", jiwer.process_characters)):
        seen = [measure(a, b) for a, b in zip(said, heard, strict=True)]
        wrong = np.array([one.substitutions + one.deletions + one.insertions for one in seen])
        total = np.array([one.substitutions + one.deletions + one.hits for one in seen])
        rates = wrong[drawn].sum(1) / np.maximum(1, total[drawn].sum(1))
        low, high = np.quantile(rates, [(1 - confidence_level) / 2, (1 + confidence_level) / 2])
        out[name] = (float(low), float(high))
    return out
