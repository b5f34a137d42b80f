"""Gradient checkpointing (arXiv:1604.06174) that keeps the checkpointed inputs in pinned host memory.

Each block's input is copied to the host on a side stream while the block runs, at most two copies at a time; in the
backward pass the previous block's input is copied back while a block is recomputed. Gradients are bit-identical to
plain checkpointing. CPU tensors stay where they are.
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
MIN_BYTES = 1 << 20  # smaller tensors are kept on the device


class _Offloaded:
    """An input in host memory, the event of its copy, and its copy back on the device."""

    __slots__ = ("__weakref__", "copied_event", "device", "device_copy", "host", "previous", "ready_event")

    def __init__(
        self, host: Tensor, device: torch.device, copied_event: Any, previous: weakref.ref[_Offloaded] | None
    ) -> None:
        self.host, self.device, self.copied_event, self.previous = host, device, copied_event, previous
        self.device_copy: Tensor | None = None
        self.ready_event: Any = None


class OffloadedCheckpoint:
    """Drop-in for `torch.utils.checkpoint.checkpoint`: called with (function, *args, **kwargs).

    One instance serves all blocks of one net, which run one after another. Only tensors among `args` are offloaded;
    tensors that `function` closes over (masks, positions) are shared by all blocks. Copies and unpickled instances
    start empty.

    Args:
        checkpoint_fn: does the checkpointing; torch's own, non-reentrant, by default.
    """

    def __init__(self, checkpoint_fn: Callable[..., Any] = DEFAULT_CHECKPOINT) -> None:
        self.checkpoint_fn = checkpoint_fn
        self._streams: dict[torch.device, Any] = {}
        self._last: weakref.ref[_Offloaded] | None = None

    def __reduce__(self) -> tuple[type[OffloadedCheckpoint], tuple[Any, ...]]:
        return OffloadedCheckpoint, (self.checkpoint_fn,)

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(self._offload, self._fetch):
            return self.checkpoint_fn(function, *args, **kwargs)

    def _offload(self, tensor: Tensor) -> Tensor | _Offloaded:
        if not tensor.is_cuda or tensor.nbytes < MIN_BYTES:
            return tensor
        main, side = torch.cuda.current_stream(tensor.device), self._side_stream(tensor.device)
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        previous = self._last() if self._last else None
        earlier = previous.previous() if previous and previous.previous else None
        if earlier is not None:  # at most two copies in flight, so that device memory is freed in time
            main.wait_event(earlier.copied_event)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            host.copy_(tensor, non_blocking=True)
            copied_event = torch.cuda.Event()
            copied_event.record(side)
        tensor.record_stream(side)
        offloaded = _Offloaded(host, tensor.device, copied_event, self._last)
        self._last = weakref.ref(offloaded)
        return offloaded

    def _fetch(self, packed: Tensor | _Offloaded) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self._prefetch(packed)
        main = torch.cuda.current_stream(packed.device)
        main.wait_event(packed.ready_event)
        tensor, packed.device_copy = packed.device_copy, None
        assert tensor is not None
        tensor.record_stream(main)
        previous = packed.previous() if packed.previous else None
        if previous is not None:
            self._prefetch(previous)
        return tensor

    def _prefetch(self, offloaded: _Offloaded) -> None:
        if offloaded.device_copy is not None:
            return
        side = self._side_stream(offloaded.device)
        with torch.cuda.stream(side):
            offloaded.device_copy = torch.empty_like(offloaded.host, device=offloaded.device)
            offloaded.device_copy.copy_(offloaded.host, non_blocking=True)
            offloaded.ready_event = torch.cuda.Event()
            offloaded.ready_event.record(side)

    def _side_stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]
