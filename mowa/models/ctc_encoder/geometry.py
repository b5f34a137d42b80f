"""Read sizes from the config of a wav2vec2-like net: samples per frame, and the last frame position. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from math import prod
from operator import mul
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

CountT = TypeVar("CountT", int, "Tensor")
POSITIONS_CONFIG_KEY = "absolute_positions"  # in config.json: the last position, in frames; see `positions`


@dataclass(frozen=True, slots=True)
class FrameGeometry:
    """Which samples the frames of a net come from.

    conv_hops        samples from one frame to the next after each convolution of the front end
    receptive_field  samples that a frame of the front end depends on
    adapter_strides  strides of the convolutional adapter after the blocks; empty without one
    """

    conv_hops: tuple[int, ...]
    receptive_field: int
    adapter_strides: tuple[int, ...] = ()

    @property
    def feature_hop(self) -> int:
        """Samples from one frame of the front end to the next: 320 in every stock net."""
        return self.conv_hops[-1]

    @property
    def hop(self) -> int:
        """Samples from one frame of the logits to the next."""
        return self.feature_hop * prod(self.adapter_strides)

    def num_features(self, samples: int) -> int:
        """Return the number of front-end frames of a recording of `samples` samples."""
        return max(0, (samples - self.receptive_field) // self.feature_hop + 1)

    def num_frames(self, samples: int) -> int:
        """Return the number of frames of the logits of a recording of `samples` samples."""
        frames = self.num_features(samples)
        for stride in self.adapter_strides:
            frames = (frames - 1) // stride + 1 if frames else 0
        return frames

    def num_samples(self, frames: CountT) -> CountT:
        """Return the number of samples that `frames` frames of the logits need at least: the inverse of `num_frames`.

        A tensor of integers is computed element by element.
        """
        return frames * self.hop + (self.receptive_field - self.hop)

    def num_feature_samples(self, features: int) -> int:
        """Return the number of samples that `features` front-end frames need: the inverse of `num_features`."""
        return features * self.feature_hop + (self.receptive_field - self.feature_hop)


def frame_geometry(config: Any) -> FrameGeometry:
    """Return the geometry of a wav2vec2-like config (`conv_kernel`, `conv_stride`, `add_adapter`)."""
    hops = tuple(accumulate(config.conv_stride, mul))
    spans = ((kernel - 1) * hop for kernel, hop in zip(config.conv_kernel, (1, *hops[:-1]), strict=True))
    has_adapter = getattr(config, "add_adapter", False)
    strides = (int(config.adapter_stride),) * int(config.num_adapter_layers) if has_adapter else ()
    return FrameGeometry(hops, 1 + sum(spans), strides)


def max_absolute_position(config: Any) -> int | None:
    """Return the last frame position of a net with absolute positions, which windows must not exceed; else None."""
    position: int | None = getattr(config, POSITIONS_CONFIG_KEY, None)
    return position
