"""Read sizes from the config of a wav2vec2-like net: samples per frame, and the last frame position. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

POSITIONS_CONFIG_KEY = "absolute_positions"  # in config.json: the last position, in frames; see `positions`


@dataclass(frozen=True, slots=True)
class FrameGeometry:
    """A front end that makes one frame every `hop` samples, each from `receptive_field` samples."""

    hop: int
    receptive_field: int

    def num_frames(self, samples: int) -> int:
        """Return the number of frames of a recording of `samples` samples."""
        return max(0, (samples - self.receptive_field) // self.hop + 1)


def frame_geometry(config: Any) -> FrameGeometry:
    """Return the geometry of a wav2vec2-like config (`conv_kernel`, `conv_stride`)."""
    hop, receptive_field = 1, 1
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        receptive_field, hop = receptive_field + (kernel - 1) * hop, hop * stride
    return FrameGeometry(hop, receptive_field)


def receptive_field(config: Any) -> int:
    """Return the number of samples that one frame depends on."""
    return frame_geometry(config).receptive_field


def max_absolute_position(config: Any) -> int | None:
    """Return the last frame position of a net with absolute positions, which windows must not exceed; else None."""
    position: int | None = getattr(config, POSITIONS_CONFIG_KEY, None)
    return position
