"""Error rates against jiwer, losses and intervals against a bootstrap written out."""

import re
from pathlib import Path

import jiwer
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mowa
from mowa.errors import DataError
from mowa.tasks import metrics

RNG = np.random.default_rng(3)
TOKENS = RNG.integers(1, 60, 40)
LOSSES = RNG.gamma(4, 0.5, 40) * TOKENS
BETTER = LOSSES * RNG.normal(0.95, 0.05, 40)


def plain_interval(above, below):
    """A percentile bootstrap, one resample at a time."""
    draws = np.random.default_rng(0).integers(0, len(above), (2000, len(above)))
    ratios = [sum(above[i] for i in drawn) / sum(below[i] for i in drawn) for drawn in draws]
    return tuple(np.percentile(ratios, [2.5, 97.5]))


@given(st.lists(st.tuples(*[st.text("aboéż -.", max_size=12)] * 2), min_size=1, max_size=6))
def test_error_rates_equal_jiwer(pairs):
    references, hypotheses = (list(one) for one in zip(*pairs, strict=True))
    plain = [[metrics.normalize_text(text) for text in texts] for texts in (references, hypotheses)]
    rates = metrics.error_rates(references, hypotheses)
    assert rates["wer"] == pytest.approx(jiwer.wer(*plain))
    assert rates["cer"] == pytest.approx(jiwer.cer(*plain))
    whole = metrics.bootstrap_error_rates(references, hypotheses)
    assert (whole.wer, whole.cer) == (rates["wer"], rates["cer"])


def test_bootstrap_intervals_equal_a_loop_over_resamples():
    rng = np.random.default_rng(1)
    references = [" ".join(rng.choice(list("abcdef"), 6)) for _ in range(12)]
    hypotheses = [" ".join(rng.choice(list("abcdef"), 6)) for _ in range(12)]
    rates = metrics.bootstrap_error_rates(references, hypotheses)
    resamples = np.random.default_rng(0).integers(0, 12, (metrics.BOOTSTRAP_RESAMPLES, 12))
    wers = [jiwer.wer([references[i] for i in drawn], [hypotheses[i] for i in drawn]) for drawn in resamples]
    assert rates.wer_interval == pytest.approx(tuple(np.quantile(wers, [0.025, 0.975])))
    assert rates.wer == metrics.error_rates(references, hypotheses)["wer"]
    assert rates.num_words == 72


def test_intervals_of_losses_equal_a_plain_bootstrap():
    found = metrics.bootstrap_loss(LOSSES, TOKENS)
    assert found.loss == pytest.approx(LOSSES.sum() / TOKENS.sum())
    assert found.loss_interval == pytest.approx(plain_interval(LOSSES, TOKENS))
    assert found.perplexity == pytest.approx(np.exp(found.loss))
    assert found.perplexity_interval == pytest.approx(tuple(np.exp(found.loss_interval)))
    assert found.num_tokens == TOKENS.sum()


def test_paired_losses_equal_a_plain_bootstrap_and_vary_less_than_two_models():
    found = metrics.paired_bootstrap_loss(LOSSES, BETTER, TOKENS)
    assert found.loss == pytest.approx((BETTER - LOSSES).sum() / TOKENS.sum())
    assert found.loss_interval == pytest.approx(plain_interval(BETTER - LOSSES, TOKENS))
    assert found.perplexity_ratio == pytest.approx(np.exp(found.loss))
    one, other = (metrics.bootstrap_loss(losses, TOKENS) for losses in (LOSSES, BETTER))
    assert np.ptp(found.loss_interval) < np.ptp(one.loss_interval) / 2
    assert found.loss_interval[1] < 0 < one.loss_interval[1] - other.loss_interval[0]
    same = metrics.paired_bootstrap_loss(LOSSES, LOSSES, TOKENS)
    assert (same.loss, same.loss_interval, same.perplexity_ratio_interval) == (0, (0, 0), (1, 1))


def test_the_loss_is_that_of_cross_entropy():
    logits, targets = torch.randn(50, 11, dtype=torch.float64), torch.randint(11, (50,))
    per_token = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    lengths = [7, 1, 42]
    found = metrics.bootstrap_loss([float(part.sum()) for part in per_token.split(lengths)], lengths)
    assert found.loss == pytest.approx(float(per_token.mean()))


def test_means_equal_a_plain_bootstrap():
    right = RNG.random(60) < 0.7
    found = metrics.bootstrap_mean(right)
    assert found.value == right.mean()
    assert (found.low, found.high) == pytest.approx(plain_interval(right.astype(float), np.ones(60)))


@settings(max_examples=20)
@given(st.integers(1, 50), st.integers(1, 400))
def test_intervals_do_not_depend_on_the_block(samples, block):
    values, tokens = LOSSES[:samples], TOKENS[:samples]
    expected = metrics.bootstrap_loss(values, tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "MAX_INDICES", block * len(values))
        assert metrics.bootstrap_loss(values, tokens) == expected
    assert expected.loss_interval[0] <= expected.loss_interval[1]


def test_edges():
    with pytest.raises(DataError, match="no samples"):
        metrics.bootstrap_loss([], [])
    with pytest.raises(ValueError, match="2 values for 1 samples"):
        metrics.bootstrap_loss([1.0, 2.0], [1])
    nothing = metrics.bootstrap_loss([0.0, 0.0], [0, 0])  # samples without a predicted token
    assert (nothing.loss, nothing.perplexity, nothing.num_tokens) == (0, 1, 0)
    assert metrics.bootstrap_loss([2000.0], [1]).perplexity == np.inf
    assert np.isnan(metrics.bootstrap_loss([np.nan, 1.0], [1, 1]).loss)
    assert metrics.error_rates([""], ["a"]) == {"wer": 1, "cer": 1}


def test_alignment_is_that_of_the_character_error_rate():
    assert metrics.align_characters("kota", "koty") == [("kot", "kot", True), ("a", "y", False)]


def test_there_is_one_bootstrap_and_one_error_rate():
    root = Path(mowa.__file__).parents[1]
    files = [file for folder in ("mowa", "benchmarks", "projects") for file in (root / folder).rglob("*.py")]
    found = {file.name for file in files if re.search(r"import jiwer|def \w*bootstrap", file.read_text("utf-8"))}
    assert found == {"metrics.py"}
