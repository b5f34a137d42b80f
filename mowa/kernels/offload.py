"""Gradient checkpointing (arXiv:1604.06174) whose kept inputs wait in host memory for the backward pass.

Each block's input is copied to pinned memory on a stream of its own while the block runs, at most two at a time, and
the input of the block before is on its way back while a block is gone through again. Gradients are those of plain
checkpointing to the bit: nothing but the place of the inputs differs. What lies in host memory already stays there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

DEFAULT_CHECKPOINT = partial(checkpoint, use_reentrant=False)
MIN_BYTES = 1 << 20  # below this a copy costs more than the memory is worth


class _Parked:
    """An input in host memory: where it came from, when it had left, and its way back."""

    __slots__ = ("__weakref__", "back", "before", "device", "gone", "here", "host")

    def __init__(self, host: Tensor, device: torch.device, gone: Any, before: weakref.ref[_Parked] | None) -> None:
        self.host, self.device, self.gone, self.before = host, device, gone, before
        self.back: Tensor | None = None
        self.here: Any = None


class OffloadedCheckpoint:
    """A function to give a net for `torch.utils.checkpoint.checkpoint`: offload(function, *args, **kwargs).

    `inner` checkpoints; by default torch's own, not reentrant, with random states kept. Only tensors among `args` move:
    what `function` holds by itself (masks, positions), all blocks share. One Offload serves all blocks of one net,
    which run one after another. A copy of it, or one read from a file, starts with nothing parked.
    """

    def __init__(self, checkpoint_fn: Callable[..., Any] = DEFAULT_CHECKPOINT) -> None:
        self.checkpoint_fn = checkpoint_fn
        self._streams: dict[torch.device, Any] = {}
        self._last: weakref.ref[_Parked] | None = None

    def __reduce__(self) -> tuple[type[OffloadedCheckpoint], tuple[Any, ...]]:
        return OffloadedCheckpoint, (self.checkpoint_fn,)

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(self._park, self._fetch):
            return self.checkpoint_fn(function, *args, **kwargs)

    def _park(self, tensor: Tensor) -> Tensor | _Parked:
        if not tensor.is_cuda or tensor.nbytes < MIN_BYTES:
            return tensor
        now, aside = torch.cuda.current_stream(tensor.device), self._aside(tensor.device)
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        before = self._last() if self._last else None
        earlier = before.before() if before and before.before else None
        if earlier is not None:  # two at a time: the memory of the third from here must be free before more is filled
            now.wait_event(earlier.gone)
        aside.wait_stream(now)
        with torch.cuda.stream(aside):
            host.copy_(tensor, non_blocking=True)
            gone = torch.cuda.Event()
            gone.record(aside)
        tensor.record_stream(aside)
        parked = _Parked(host, tensor.device, gone, self._last)
        self._last = weakref.ref(parked)
        return parked

    def _fetch(self, packed: Tensor | _Parked) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self._send_back(packed)
        now = torch.cuda.current_stream(packed.device)
        now.wait_event(packed.here)
        tensor, packed.back = packed.back, None
        assert tensor is not None
        tensor.record_stream(now)
        before = packed.before() if packed.before else None
        if before is not None:
            self._send_back(before)
        return tensor

    def _send_back(self, parked: _Parked) -> None:
        if parked.back is not None:
            return
        aside = self._aside(parked.device)
        with torch.cuda.stream(aside):
            parked.back = torch.empty_like(parked.host, device=parked.device)
            parked.back.copy_(parked.host, non_blocking=True)
            parked.here = torch.cuda.Event()
            parked.here.record(aside)

    def _aside(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]
