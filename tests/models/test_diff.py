"""Differences of two models' outputs against torch, on known numbers, and with NaN and infinities."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mowa.models import diff
from mowa.models.diff import compare, compare_pairs


def logits(seed, frames=20, tokens=5):
    return np.random.default_rng(seed).standard_normal((frames, tokens)).astype(np.float32) * 3


def test_it_follows_its_formula():
    ours, theirs = [logits(0), logits(1, 7)], [logits(2), logits(3, 7)]
    found = compare(ours, theirs, blank_id=0)
    p, q = (torch.from_numpy(np.concatenate(one)).double().log_softmax(-1) for one in (ours, theirs))
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert found.num_frames == 27
    assert found.kl == pytest.approx(float(kl.mean()))
    assert found.max_kl == pytest.approx(float(kl.max()))
    assert found.max_abs_diff == pytest.approx(float((p - q).abs().max()))
    assert found.mean_abs_diff == pytest.approx(float((p - q).abs().mean()))
    clamped = p.clamp(min=diff.MIN_LOG_PROB_RMS) - q.clamp(min=diff.MIN_LOG_PROB_RMS)
    assert found.rms_diff == pytest.approx(float(clamped.square().mean().sqrt()))
    assert found.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    more_blank = int((q.argmax(-1) == 0).sum()) - int((p.argmax(-1) == 0).sum())
    assert found.blank_ratio_change == pytest.approx(more_blank / 27)


@given(st.integers(0, 1000), st.integers(1, 63), st.integers(2, 33))
def test_a_model_equals_itself_whatever_the_form(seed, frames, tokens):
    values = logits(seed, frames, tokens)
    normal = torch.from_numpy(values).double().log_softmax(-1)
    for same in (values, torch.from_numpy(values), normal, values + 100):
        found = compare([values], [same])
        assert found.max_abs_diff == pytest.approx(0, abs=1e-4)
        assert (found.agreement, found.num_frames) == (1, frames)
        assert found.kl <= found.max_kl <= 1e-8
    assert compare([values], [logits(seed + 1, frames, tokens)]).kl >= 0


def test_frames_are_compared_in_blocks(monkeypatch):
    ours, theirs = [logits(0, 100)], [torch.from_numpy(logits(1, 100)).requires_grad_()]
    whole = compare(ours, theirs, 0)
    monkeypatch.setattr(diff, "BLOCK_VALUES", 35)
    blocks = compare_pairs(iter(zip(ours, theirs, strict=True)), 0)
    for name in diff.ModelDiff.__slots__:
        assert getattr(blocks, name) == pytest.approx(getattr(whole, name))


@pytest.mark.parametrize("side", ["reference", "candidate", "both"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_agrees_with_nothing(side, value):
    """numpy's and torch's argmax of NaNs is 0, which is often the blank."""
    good = np.zeros((9, 4), np.float32)
    good[:, 0] = 9
    broken = good.copy()
    broken[3] = value
    pairs = {"reference": ([broken], [good]), "candidate": ([good], [broken]), "both": ([broken], [broken])}
    found = compare(*pairs[side], blank_id=0)
    assert found.agreement == 8 / 9
    assert (found.max_abs_diff, found.mean_abs_diff, found.rms_diff, found.kl, found.max_kl) == (np.inf,) * 5
    assert compare([good], [np.full_like(good, np.nan)]).agreement == 0


def test_tokens_of_probability_zero_are_clamped():
    ours = np.array([[0.0, -np.inf, 1.0]])
    assert compare([ours], [ours]).max_abs_diff == 0
    found = compare([np.array([[0.0, 0.0, 1.0]])], [ours])
    assert np.isfinite([found.kl, found.max_abs_diff]).all()
    assert found.max_abs_diff > 40


def test_half_precision_tensors_are_compared_in_float64():
    values = torch.from_numpy(logits(0)).bfloat16()
    assert compare([values], [values.double()]).max_abs_diff == 0
    assert str(compare([values], [values])).startswith("same top token at 100.00% of 20 positions")


def test_shapes_must_match_and_nothing_is_no_frame():
    with pytest.raises(ValueError, match="they do not match"):
        compare([logits(0)], [logits(0, 21)])
    with pytest.raises(ValueError, match="shorter"):
        compare([logits(0)], [])
    assert not diff.have_same_shapes([logits(0)], [])
    empty = compare([], [])
    assert (empty.num_frames, empty.agreement, empty.kl) == (0, 0, 0)
