"""Running normalization does not depend on how a stream is split, and converges to that of the whole recording."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mowa.data.audio.running_norm import BLOCK_SAMPLES, RunningStats, normalize_running
from tests.checkpoints import clip


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(0, BLOCK_SAMPLES - 1))
def test_splitting_between_blocks_changes_nothing(blocks, rest):
    sound = clip(0, sum(blocks) * BLOCK_SAMPLES + rest)
    whole, after = normalize_running(sound, RunningStats.prior())
    stats, parts, start = RunningStats.prior(), [], 0
    for end in (*np.cumsum(blocks) * BLOCK_SAMPLES, len(sound)):
        part, stats = normalize_running(sound[start:end], stats)
        parts.append(part)
        start = end
    assert np.array_equal(np.concatenate(parts), whole)
    assert stats == after


def test_steady_audio_is_normalized_like_the_whole():
    sound = (np.random.default_rng(0).standard_normal(320_000) * 0.01 + 0.005).astype(np.float32)
    out, _ = normalize_running(sound, RunningStats.prior(0.0001))
    assert out.dtype == np.float32
    assert out.shape == sound.shape
    late = out[240_000:]
    assert late.std() == pytest.approx(1, abs=0.1)
    assert late.mean() == pytest.approx(0, abs=0.6)


def test_later_samples_change_nothing():
    sound = clip(1, 10 * BLOCK_SAMPLES)
    early, _ = normalize_running(sound[: 4 * BLOCK_SAMPLES], RunningStats.prior())
    assert np.array_equal(normalize_running(sound, RunningStats.prior())[0][: 4 * BLOCK_SAMPLES], early)


@pytest.mark.parametrize("samples", [0, 1, BLOCK_SAMPLES - 1, BLOCK_SAMPLES + 1])
def test_odd_lengths_and_silence(samples):
    out, stats = normalize_running(np.zeros(samples, np.float32), RunningStats.prior())
    assert np.array_equal(out, np.zeros(samples))
    for _ in range(3000):
        _, stats = normalize_running(np.zeros(BLOCK_SAMPLES, np.float32), stats)
    assert np.isfinite(normalize_running(clip(2, BLOCK_SAMPLES), stats)[0]).all()
