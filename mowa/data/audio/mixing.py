"""Average channels, except where they cancel each other because one of them is inverted.

A balanced line wired to a stereo input, or a swapped plug, gives two channels that are each other's negative. Their
mean is silence, so the loudest channel is used where the mean is far below that of unrelated channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mowa.data.audio.decoders import AudioInput, Samples, warn_once

CANCELLED_DB = -17.0  # below the mean of unrelated channels: a mean of two that is 20 dB below each of them
SOUND_DBFS = -60.0  # nothing is decided by softer channels
BLOCK_S = 1.0  # of a recording: long enough that microphones in antiphase for one vowel are not taken for inverted
LIVE_HALF_LIFE_S = 1.0

_MIN_S = 0.25  # of audio before the first decision
_MAX_BLOCK_VALUES = 2**22  # over all channels


def block_size(rate_hz: int, channels: int) -> int:
    """Return the number of samples of the blocks of a recording that are mixed at once."""
    return max(1, min(round(BLOCK_S * rate_hz), _MAX_BLOCK_VALUES // (1 + channels)))


def stack_mean(values: npt.NDArray[Any], channels: int) -> npt.NDArray[Any]:
    """Put the mean of the channels before them: [n, C] → [n, 1 + channels]."""
    return np.column_stack([values.mean(axis=1), fit_channels(values, channels)])


def fit_channels(values: npt.NDArray[Any], channels: int) -> npt.NDArray[Any]:
    """Return [n, channels] of [n, C]: where a recording changes its channels, the last one is repeated."""
    missing = channels - values.shape[1]
    return np.pad(values, ((0, 0), (0, missing)), mode="edge") if missing > 0 else values[:, :channels]


class ChannelMix:
    """Mixes consecutive blocks to mono, and logs a warning about `source` where channels cancel each other.

    channel  the channel used instead of the mean at present; None: the mean
    """

    def __init__(self, source: AudioInput | str, rate_hz: int, half_life_s: float = 0.0) -> None:
        """Decide by each block alone, or by those before it too, whose weight halves in `half_life_s`."""
        self.channel: int | None = None
        self._source, self._rate_hz, self._half_life_s = source, rate_hz, half_life_s
        self._count, self._energy = 0.0, np.zeros(1)

    def mix(self, stacked: npt.NDArray[Any]) -> Samples:
        """Return [n] of a block from `stack_mean`, full scale ±1."""
        self._update(stacked)
        level = self._energy / max(1.0, self._count)
        channels = level[1:]
        if self._count >= _MIN_S * self._rate_hz and channels.max() > 10 ** (SOUND_DBFS / 10):
            unrelated = channels.sum() / len(channels) ** 2
            if level[0] >= unrelated * 10 ** (CANCELLED_DB / 10):
                self.channel = None
            elif self.channel is None:
                self.channel = int(np.argmax(channels))
                warn_once(
                    self._source,
                    "has channels that cancel each other when they are averaged, as where one is inverted: channel"
                    f" {self.channel} alone is used there.",
                )
        return np.ascontiguousarray(stacked[:, 0 if self.channel is None else 1 + self.channel], np.float32)

    def _update(self, stacked: npt.NDArray[Any]) -> None:
        duration_s = len(stacked) / self._rate_hz
        keep = 0.5 ** (duration_s / self._half_life_s) if self._half_life_s else 0.0
        energy = (stacked.astype(np.float64) ** 2).sum(axis=0)
        same = len(energy) == len(self._energy)  # the number of channels of a stream may change
        self._energy = keep * self._energy + energy if same else energy
        self._count = keep * self._count * same + len(stacked)
