"""Sequences that lie end to end in one row: where each begins and ends."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedSequences:
    """Lengths, in frames, of sequences that lie end to end."""

    lengths: tuple[int, ...]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """The frame at which each begins, and the one after the last."""
        starts = [0]
        for length in self.lengths:
            starts.append(starts[-1] + length)
        return tuple(starts)

    @cached_property
    def _on_device(self) -> dict[torch.device, Tensor]:
        return {}

    def cu_seqlens(self, device: torch.device) -> Tensor:
        """`starts` as int32 [count + 1], made once a device."""
        if device not in self._on_device:
            self._on_device[device] = torch.tensor(self.offsets, dtype=torch.int32, device=device)
        return self._on_device[device]
