import numpy as np
import pytest

from mowa.data.audio import augment
from tests.checkpoints import clip

RATE = 16_000


def test_same_seed_same_result():
    x = clip(0, 20_000)
    one, two, other = (augment.augment_audio(x, np.random.default_rng(s), augment.AugmentConfig()) for s in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one[:1000], other[:1000])


@pytest.mark.parametrize("length", [400, 401, 4097, 48_000])
def test_shape_dtype_and_range(length):
    x = clip(length, length)
    for seed in range(20):
        y = augment.augment_audio(x, np.random.default_rng(seed), augment.AugmentConfig(), seed / 19)
        assert y.dtype == np.float32
        assert np.isfinite(y).all()
        assert np.abs(y).max() <= 1
        assert 0.9 * length - 2 <= len(y) <= length / 0.9 + 2


def test_strength_zero_changes_loudness_only():
    x = clip(1, 16_000)
    y = augment.augment_audio(x, np.random.default_rng(0), augment.AugmentConfig(), 0.0)
    assert np.corrcoef(x, y)[0, 1] > 0.9999


@pytest.mark.parametrize("snr_db", [0.0, 10.0, 30.0])
def test_noise_has_the_requested_snr(snr_db):
    x = clip(2, 32_000)
    added = augment.add_noise(x, np.random.default_rng(0), snr_db) - x
    assert 10 * np.log10(np.mean(x**2) / np.mean(added**2)) == pytest.approx(snr_db, abs=0.01)


def test_telephone_limits_the_band():
    seconds = np.arange(RATE) / RATE
    for hz, kept in ((60, False), (1000, True), (6000, False)):
        tone = (np.sin(2 * np.pi * hz * seconds) + np.sin(2 * np.pi * 1500 * seconds)).astype(np.float32)
        spectrum = np.abs(np.fft.rfft(augment.simulate_telephone(tone)))
        assert (spectrum[hz] > 0.5 * spectrum[1500]) == kept


def test_speed_changes_pitch():
    tone = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE).astype(np.float32)
    fast = augment.change_speed(tone, 1.1)
    assert len(fast) == round(RATE / 1.1)
    assert np.argmax(np.abs(np.fft.rfft(fast, RATE))) == pytest.approx(484, abs=2)


def test_reverb_keeps_the_direct_path():
    click = np.zeros(8000, np.float32)
    click[1000] = 1
    wet = augment.add_reverb(click, np.random.default_rng(0))
    assert wet[1000] == pytest.approx(1, abs=1e-5)
    assert np.abs(wet[:1000]).max() < 1e-5
    assert np.sum(wet[1001:] ** 2) > 0.01


@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 48_000])
def test_telephone_audio_has_the_same_band_at_every_rate(rate_hz):
    config = augment.AugmentConfig(
        speed=(1, 1), reverb=0, equalize=0, telephone=1, noise=0, gaps=0, loudness_db=(-20, -20)
    )
    time_s = np.arange(rate_hz) / rate_hz
    tones = (0.3 * (np.sin(2 * np.pi * 100 * time_s) + np.sin(2 * np.pi * 3000 * time_s))).astype(np.float32)
    spectrum = np.abs(np.fft.rfft(augment.augment_audio(tones, np.random.default_rng(0), config, rate_hz=rate_hz)))
    assert spectrum[3000] > 20 * spectrum[100]
