"""Clean recordings → rough ones: speed, room, equalisation, telephone band, noise, gaps, loudness.

Every function takes float32 [n] at `rate_hz` and a numpy Generator, and gives float32; nothing here knows a model.
`roughen` draws from all of them; the same generator state gives the same sound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

Samples = np.ndarray


@dataclass(frozen=True, slots=True)
class AugmentConfig:
    """How often (probability) and how strongly each change is drawn."""

    speed: tuple[float, float] = field(default=(0.9, 1.1), metadata={"help": "slowest and fastest"})
    reverb: float = field(default=0.3, metadata={"help": "how often in a synthetic room"})
    equalize: float = field(default=0.4, metadata={"help": "how often through another microphone"})
    telephone: float = field(default=0.15, metadata={"help": "how often through a telephone (300 to 3400 Hz, G.711)"})
    noise: float = field(default=0.7, metadata={"help": "how often in noise"})
    snr_db: tuple[float, float] = field(default=(3.0, 30.0), metadata={"help": "the recording over the noise, in dB"})
    gaps: float = field(
        default=0.05, metadata={"help": "share of a recording that is silenced, in ten times that share of them"}
    )
    loudness_db: tuple[float, float] = field(
        default=(-30.0, -6.0), metadata={"help": "mean power, in dB of full scale"}
    )


@dataclass(frozen=True, slots=True)
class SpecAugmentConfig:
    """SpecAugment (arXiv:1904.08779) on the frames below the blocks, as wav2vec 2.0 does it."""

    mask_time_prob: float = field(default=0.05, metadata={"help": "share of the frames that is hidden"})
    mask_time_length: int = field(default=10, metadata={"help": "frames hidden together"})
    mask_feature_prob: float = field(
        default=0.0, metadata={"help": "share of the channels that is silenced, of each recording"}
    )
    mask_feature_length: int = field(default=64, metadata={"help": "channels silenced together"})


def change_speed(samples: Samples, factor: float) -> Samples:
    """Played `factor` times faster (pitch moves with it), by linear interpolation."""
    count = max(1, round(len(samples) / factor))
    return np.interp(np.arange(count) * factor, np.arange(len(samples)), samples).astype(np.float32)


def add_reverb(samples: Samples, rng: np.random.Generator, rate_hz: int = 16_000) -> Samples:
    """Convolved with a synthetic room: a direct path, then noise that decays by 60 dB in 0.15 to 0.7 s."""
    rt60 = rng.uniform(0.15, 0.7)
    length = int(rt60 * rate_hz * 0.6)
    tail = rng.standard_normal(length).astype(np.float32) * np.exp(-6.9 * np.arange(length) / (rt60 * rate_hz))
    tail[: int(rng.uniform(0.002, 0.01) * rate_hz)] = 0
    tail *= rng.uniform(0.2, 0.8) / (np.sqrt(np.sum(tail**2)) + 1e-9)
    tail[0] = 1.0
    size = _fast_length(len(samples) + length)
    wet = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(tail, size), size)[: len(samples)]
    return wet.astype(np.float32)


def equalize(samples: Samples, rng: np.random.Generator, rate_hz: int = 16_000, strength_db: float = 9.0) -> Samples:
    """A smooth random frequency response of up to ± `strength_db`: microphones and loudspeakers differ."""
    gains_db = rng.uniform(-strength_db, strength_db, 8)
    corners_hz = np.geomspace(60, rate_hz / 2, 8)
    return _filtered(samples, rate_hz, lambda hz: 10 ** (np.interp(hz, corners_hz, gains_db) / 20))


def simulate_telephone(samples: Samples, rate_hz: int = 16_000) -> Samples:
    """Band-limited to 300–3400 Hz and companded with 8-bit µ-law (ITU-T G.711)."""
    narrow = _filtered(samples, rate_hz, lambda hz: 1 / (1 + (300 / np.maximum(hz, 1)) ** 6) / (1 + (hz / 3400) ** 16))
    peak = float(np.max(np.abs(narrow))) + 1e-9
    x = narrow / peak
    coded = np.round(np.sign(x) * np.log1p(255 * np.abs(x)) / np.log(256) * 127) / 127
    return (np.sign(coded) * (256 ** np.abs(coded) - 1) / 255 * peak).astype(np.float32)


def add_noise(samples: Samples, rng: np.random.Generator, snr_db: float, rate_hz: int = 16_000) -> Samples:
    """Coloured noise added at `snr_db` below the recording's mean power: from rumble (1/f²) to hiss (white)."""
    slope = rng.uniform(0, 1)
    hiss = rng.standard_normal(len(samples)).astype(np.float32)
    hiss = _filtered(hiss, rate_hz, lambda hz: np.maximum(hz, 30.0) ** -slope)
    power = np.mean(samples**2) / (np.mean(hiss**2) + 1e-12)
    return (samples + hiss * np.sqrt(power * 10 ** (-snr_db / 10))).astype(np.float32)


def add_gaps(
    samples: Samples, rng: np.random.Generator, ratio: float, gap_s: float = 0.12, rate_hz: int = 16_000
) -> Samples:
    """Silences of `span_s` over about `share` of the recording: SpecAugment's time masks, in the waveform."""
    span = int(gap_s * rate_hz)
    holed = samples.copy()
    for start in rng.integers(0, max(1, len(samples) - span), rng.poisson(ratio * len(samples) / span)):
        holed[start : start + span] = 0
    return holed


def augment_audio(samples: Samples, rng: np.random.Generator, config: AugmentConfig, strength: float = 1.0) -> Samples:
    """One random draw of everything; `amount` in [0, 1] scales how often and how strong."""
    slowest, fastest = (1 + (edge - 1) * strength for edge in config.speed)
    out = change_speed(samples, rng.uniform(slowest, fastest))
    if rng.random() < config.reverb * strength:
        out = add_reverb(out, rng)
    if rng.random() < config.equalize * strength:
        out = equalize(out, rng)
    if rng.random() < config.gaps * 10 * strength:
        out = add_gaps(out, rng, config.gaps)
    if rng.random() < config.noise * strength:
        lowest, highest = config.snr_db
        out = add_noise(out, rng, rng.uniform(highest - (highest - lowest) * strength, highest))
    if rng.random() < config.telephone * strength:
        out = simulate_telephone(out)
    rms = float(np.sqrt(np.mean(out**2))) + 1e-9
    return np.clip(out * (10 ** (rng.uniform(*config.loudness_db) / 20) / rms), -1, 1).astype(np.float32)


def sample_span_mask(length: int, mask_prob: float, mask_length: int, rng: np.random.Generator) -> np.ndarray:
    """Bool [length]: about `share` of it in spans that may overlap; their number is rounded up as often as down."""
    hidden = np.zeros(length, bool)
    mask_length = min(mask_length, length)
    count = int(mask_prob * length / max(1, mask_length) + rng.random()) if mask_prob else 0
    for start in rng.integers(0, length - mask_length + 1, count):
        hidden[start : start + mask_length] = True
    return hidden


def _filtered(samples: Samples, rate_hz: int, response: Callable[[np.ndarray], np.ndarray]) -> Samples:
    size = _fast_length(len(samples))
    spectrum = np.fft.rfft(samples, size)
    spectrum *= response(np.fft.rfftfreq(size, 1 / rate_hz))
    return np.fft.irfft(spectrum, size)[: len(samples)].astype(np.float32)


def _fast_length(n: int) -> int:
    """The next length made of small primes: a power of two, or three quarters of one."""
    power = 1 << max(n - 1, 1).bit_length()
    return 3 * power // 4 if 3 * power // 4 >= n else power
