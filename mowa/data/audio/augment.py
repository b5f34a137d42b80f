"""Augment speech recordings in the waveform: speed, reverberation, equalization, telephone band, noise, gaps, loudness.

Every function takes float32 samples [n] and returns float32. `augment_audio` applies a random selection of them; the
same generator state gives the same result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mowa.data.audio.decoders import Samples


@dataclass(frozen=True, slots=True)
class AugmentConfig:
    """Probability and strength of each augmentation."""

    speed: tuple[float, float] = field(default=(0.9, 1.1), metadata={"help": "lowest and highest speed factor"})
    reverb: float = field(default=0.3, metadata={"help": "probability of synthetic reverberation"})
    equalize: float = field(default=0.4, metadata={"help": "probability of a random frequency response"})
    telephone: float = field(default=0.15, metadata={"help": "probability of telephone audio (300-3400 Hz, G.711)"})
    noise: float = field(default=0.7, metadata={"help": "probability of added noise"})
    snr_db: tuple[float, float] = field(default=(3.0, 30.0), metadata={"help": "range of signal-to-noise ratios, dB"})
    gaps: float = field(
        default=0.05, metadata={"help": "share of the samples set to zero; 10 x this is the probability of doing so"}
    )
    loudness_db: tuple[float, float] = field(default=(-30.0, -6.0), metadata={"help": "range of RMS levels, dBFS"})


@dataclass(frozen=True, slots=True)
class SpecAugmentConfig:
    """SpecAugment on the features that enter the transformer, as in wav2vec 2.0.

    Sources: https://arxiv.org/abs/1904.08779 and https://arxiv.org/abs/2006.11477 (section 4).
    """

    mask_time_prob: float = field(default=0.05, metadata={"help": "share of frames masked"})
    mask_time_length: int = field(default=10, metadata={"help": "frames per time mask"})
    mask_feature_prob: float = field(default=0.0, metadata={"help": "share of feature channels masked, per recording"})
    mask_feature_length: int = field(default=64, metadata={"help": "feature channels per mask"})


def change_speed(samples: Samples, factor: float) -> Samples:
    """Resample [n] to [n / factor] by linear interpolation, which changes speed and pitch."""
    count = max(1, round(len(samples) / factor))
    return np.interp(np.arange(count) * factor, np.arange(len(samples)), samples).astype(np.float32)


def add_reverb(samples: Samples, rng: np.random.Generator, rate_hz: int = 16_000) -> Samples:
    """Convolve with a synthetic room response: a direct path, then noise with a random RT60 of 0.15 to 0.7 s."""
    rt60 = rng.uniform(0.15, 0.7)
    length = int(rt60 * rate_hz * 0.6)
    tail = rng.standard_normal(length).astype(np.float32) * np.exp(-6.9 * np.arange(length) / (rt60 * rate_hz))
    tail[: int(rng.uniform(0.002, 0.01) * rate_hz)] = 0
    tail *= rng.uniform(0.2, 0.8) / (np.sqrt(np.sum(tail**2)) + 1e-9)
    tail[0] = 1.0
    size = _fft_length(len(samples) + length)
    wet = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(tail, size), size)[: len(samples)]
    return wet.astype(np.float32)


def equalize(samples: Samples, rng: np.random.Generator, rate_hz: int = 16_000, strength_db: float = 9.0) -> Samples:
    """Apply a smooth random frequency response within ±`strength_db`, as microphones and loudspeakers do."""
    gains_db = rng.uniform(-strength_db, strength_db, 8)
    corners_hz = np.geomspace(60, rate_hz / 2, 8)
    return _filter(samples, rate_hz, lambda hz: 10 ** (np.interp(hz, corners_hz, gains_db) / 20))


def simulate_telephone(samples: Samples, rate_hz: int = 16_000) -> Samples:
    """Limit the band to 300-3400 Hz and quantize with 8-bit µ-law (ITU-T G.711)."""
    band = _filter(samples, rate_hz, lambda hz: 1 / (1 + (300 / np.maximum(hz, 1)) ** 6) / (1 + (hz / 3400) ** 16))
    peak = float(np.max(np.abs(band))) + 1e-9
    x = band / peak
    coded = np.round(np.sign(x) * np.log1p(255 * np.abs(x)) / np.log(256) * 127) / 127
    return (np.sign(coded) * (256 ** np.abs(coded) - 1) / 255 * peak).astype(np.float32)


def add_noise(samples: Samples, rng: np.random.Generator, snr_db: float, rate_hz: int = 16_000) -> Samples:
    """Add noise of a random color, from brown (1/f²) to white, `snr_db` below the mean power of the recording."""
    slope = rng.uniform(0, 1)
    noise = rng.standard_normal(len(samples)).astype(np.float32)
    noise = _filter(noise, rate_hz, lambda hz: np.maximum(hz, 30.0) ** -slope)
    power = np.mean(samples**2) / (np.mean(noise**2) + 1e-12)
    return (samples + noise * np.sqrt(power * 10 ** (-snr_db / 10))).astype(np.float32)


def add_gaps(
    samples: Samples, rng: np.random.Generator, ratio: float, gap_s: float = 0.12, rate_hz: int = 16_000
) -> Samples:
    """Set random gaps of `gap_s` to zero, about `ratio` of the samples: SpecAugment's time masks in the waveform."""
    length = int(gap_s * rate_hz)
    out = samples.copy()
    for start in rng.integers(0, max(1, len(samples) - length), rng.poisson(ratio * len(samples) / length)):
        out[start : start + length] = 0
    return out


def augment_audio(
    samples: Samples, rng: np.random.Generator, config: AugmentConfig, strength: float = 1.0, rate_hz: int = 16_000
) -> Samples:
    """Apply a random selection of all augmentations to a recording.

    `strength` in [0, 1] scales probabilities and ranges. float32 [n] → [n / speed factor], clipped to ±1.
    """
    slowest, fastest = (1 + (edge - 1) * strength for edge in config.speed)
    out = change_speed(samples, rng.uniform(slowest, fastest))
    if rng.random() < config.reverb * strength:
        out = add_reverb(out, rng, rate_hz)
    if rng.random() < config.equalize * strength:
        out = equalize(out, rng, rate_hz)
    if rng.random() < config.gaps * 10 * strength:
        out = add_gaps(out, rng, config.gaps, rate_hz=rate_hz)
    if rng.random() < config.noise * strength:
        lowest, highest = config.snr_db
        out = add_noise(out, rng, rng.uniform(highest - (highest - lowest) * strength, highest), rate_hz)
    if rng.random() < config.telephone * strength:
        out = simulate_telephone(out, rate_hz)
    rms = float(np.sqrt(np.mean(out**2))) + 1e-9
    return np.clip(out * (10 ** (rng.uniform(*config.loudness_db) / 20) / rms), -1, 1).astype(np.float32)


def sample_span_mask(length: int, mask_prob: float, mask_length: int, rng: np.random.Generator) -> np.ndarray:
    """Sample a bool mask [length] with about `mask_prob` of it set, in spans of `mask_length` that may overlap.

    The expected number of spans is mask_prob · length / mask_length, rounded up or down at random.
    """
    mask = np.zeros(length, bool)
    mask_length = min(mask_length, length)
    count = int(mask_prob * length / max(1, mask_length) + rng.random()) if mask_prob else 0
    for start in rng.integers(0, length - mask_length + 1, count):
        mask[start : start + mask_length] = True
    return mask


def _filter(samples: Samples, rate_hz: int, response: Callable[[np.ndarray], np.ndarray]) -> Samples:
    """Multiply the spectrum by `response(frequencies in Hz)`."""
    size = _fft_length(len(samples))
    spectrum = np.fft.rfft(samples, size)
    spectrum *= response(np.fft.rfftfreq(size, 1 / rate_hz))
    return np.fft.irfft(spectrum, size)[: len(samples)].astype(np.float32)


def _fft_length(n: int) -> int:
    """Return the smallest length ≥ n that is a power of two or three quarters of one."""
    power = 1 << max(n - 1, 1).bit_length()
    return 3 * power // 4 if 3 * power // 4 >= n else power
