"""Describe sequences packed end to end in one row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedSequences:
    """Lengths of the sequences packed in one row, in positions (frames or tokens)."""

    lengths: tuple[int, ...]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """The first position of each sequence, and the one after the last."""
        offsets = [0]
        for length in self.lengths:
            offsets.append(offsets[-1] + length)
        return tuple(offsets)

    @cached_property
    def _on_device(self) -> dict[torch.device, Tensor]:
        return {}

    def cu_seqlens(self, device: torch.device) -> Tensor:
        """Return `offsets` as int32 [n + 1] on `device`, cached per device."""
        if device not in self._on_device:
            self._on_device[device] = torch.tensor(self.offsets, dtype=torch.int32, device=device)
        return self._on_device[device]
