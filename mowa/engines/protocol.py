"""What every engine is: a recogniser that turns clips into log-probabilities, whatever computes them.

How recordings may share a batch (`Sharing`):
- PADDED: layer-norm front-ends in float32. The attention mask keeps padding out of every sum, so a padded batch gives
  what each recording gives alone, to 1e-5.
  Engines that lay recordings end to end, and pad none, may share all that is float32.
- EQUAL: group-norm front-ends normalise over time, padding included, and no mask can help; only recordings of the very
  same length share a batch.
- ALONE: half precision and integers on a CPU. Matrix products of another shape round elsewhere, and a rounding may tip
  a letter; a CPU gains little from batches anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any, Protocol

import numpy as np

from mowa.types import Origin, Preprocessing, Vocabulary


class BatchPolicy(Enum):
    PADDED = "padded"
    EQUAL_LENGTH = "equal"
    SINGLE = "alone"


class Engine(Protocol):
    """A loaded recogniser. `config` is the transformers config of its net, whose front-end says how frames are cut."""

    @property
    def name(self) -> str:
        """What computes: native, onnx, …"""

    @property
    def origin(self) -> Origin: ...

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def preprocessing(self) -> Preprocessing: ...

    @property
    def config(self) -> Any: ...

    @property
    def batch_policy(self) -> BatchPolicy: ...

    @property
    def device(self) -> str: ...

    @property
    def dtype(self) -> str:
        """float32, bfloat16, float16 or int8: what most products are made in."""

    def emissions(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probabilities of one batch: clips float32 [n_i], already normalised → float32 [T_i, V] each.

        T_i counts the frames of clip i alone: nothing of the padding is returned.
        """


def batch_by_length(lengths: Sequence[int], max_padded_samples: int, policy: BatchPolicy) -> list[list[int]]:
    """Indices of clips that run together, shortest first; count × longest stays within `budget` samples.

    A clip longer than the budget runs alone.
    """
    grouped: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        last = grouped[-1] if grouped else []
        fits = bool(last) and lengths[index] * (len(last) + 1) <= max_padded_samples
        alike = bool(last) and lengths[index] == lengths[last[0]]
        if fits and (policy is BatchPolicy.PADDED or (policy is BatchPolicy.EQUAL_LENGTH and alike)):
            last.append(index)
        else:
            grouped.append([index])
    return grouped


def hop_length(config: Any) -> int:
    """Samples from one frame to the next: 320 for every stock front-end."""
    step = int(np.prod(config.conv_stride))
    return (
        step * int(config.adapter_stride) ** int(config.num_adapter_layers)
        if getattr(config, "add_adapter", False)
        else step
    )


def num_frames(config: Any, num_samples: int) -> int:
    """How many frames the net gives for so many samples (0 for fewer than its receptive field)."""
    n = num_samples
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        n = (n - kernel) // stride + 1 if n >= kernel else 0
    if getattr(config, "add_adapter", False):
        for _ in range(config.num_adapter_layers):
            n = (n - 1) // config.adapter_stride + 1 if n else 0
    return n
