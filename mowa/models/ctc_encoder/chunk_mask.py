"""Run a bidirectional CTC net with chunked attention: its stock modules, with a mask over frames.

Frames are numbered from 0 and divided into chunks of `size`. Chunk k is computed together with `lookahead` frames after
it, and attends to `left_context` frames before it as they were computed in their own chunks:

    k · size − left_context ≤ j < k · size        keys and values of frame j from its own chunk
    k · size ≤ j < (k + 1) · size + lookahead     keys and values computed with chunk k; look-ahead frames are computed
                                                  once more with their own chunk

The positional convolution sees zeros beyond that. Nothing of a chunk changes when later audio arrives, so `streaming`
can compute it once. The front end looks ahead by its receptive field less one hop (5 ms in XLSR, 45 ms in pl-tiny).

Sources: Zhang et al., "Unified Streaming and Non-streaming Two-pass End-to-end Model", arXiv:2012.05481 (chunks of
varying size in training); Shi et al., "Emformer", arXiv:2010.10759 (look-ahead frames computed twice); Fu et al.,
"wav2vec-S", arXiv:2110.12852 (the positional convolution).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mowa.errors import ModelError
from mowa.kernels.attention.dispatch import AttentionMask
from mowa.models.ctc_encoder import anatomy
from mowa.models.ctc_encoder.anatomy import Anatomy, PositionLayer, read_anatomy
from mowa.models.ctc_encoder.positions import replace_positions

# config key: {"chunk_frames": [16, 32], "left_context_frames": None, "lookahead_frames": [0, 8]}
STREAMING_CONFIG_KEY = "streaming"
STREAMING_CONFIG_KEYS = {"chunk_frames", "left_context_frames", "lookahead_frames"}


@dataclass(frozen=True, slots=True)
class ChunkConfig:
    """Chunks of `size` frames that attend to `left_context` frames before (None: all) and `lookahead` frames after."""

    size: int
    left_context: int | None = None
    lookahead: int = 0


class ChunkLayout:
    """The frames of a recording in the order in which chunks compute them, N ≥ T with look-ahead frames repeated.

    Attributes:
        valid: bool [chunks, size + lookahead], which positions of each chunk exist.
        frame_index: int [N], the frame computed at each position.
        chunk_index: int [N], the chunk it is computed with.
        is_main: bool [N], False for look-ahead copies; the True ones are the T frames in order.
        visible: bool [N, N], whether a position attends to another.
    """

    def __init__(self, config: ChunkConfig, num_frames: int, device: Any = None) -> None:
        starts = torch.arange(0, num_frames, config.size, device=device)
        frames = starts[:, None] + torch.arange(config.size + config.lookahead, device=device)
        self.valid = frames < num_frames
        self.frame_index = frames[self.valid]
        self.chunk_index = (starts // config.size)[:, None].expand_as(frames)[self.valid]
        self.is_main = self.frame_index < (self.chunk_index + 1) * config.size
        same_chunk = self.chunk_index[:, None] == self.chunk_index
        before = (self.chunk_index < self.chunk_index[:, None]) & self.is_main
        if config.left_context is not None:
            before &= self.frame_index >= (self.chunk_index * config.size - config.left_context)[:, None]
        self.visible = same_chunk | before


@dataclass(frozen=True, slots=True)
class TrainedChunking:
    """The chunk sizes, left context (None: all) and look-aheads that a net was trained with, in frames."""

    chunk_sizes: tuple[int, ...]
    left_context: int | None = None
    lookaheads: tuple[int, ...] = (0,)


def get_trained_chunking(config: Any) -> TrainedChunking | None:
    """Return how a net was trained for chunked attention, from its config; None: it was not.

    Raises:
        ModelError: the entry has other keys, as older versions of mowa wrote them.
    """
    entry = getattr(config, STREAMING_CONFIG_KEY, None)
    if not entry:
        return None
    if not isinstance(entry, dict) or "chunk_frames" not in entry or set(entry) - STREAMING_CONFIG_KEYS:
        found = ", ".join(entry) if isinstance(entry, dict) else repr(entry)
        expected, folder = ", ".join(sorted(STREAMING_CONFIG_KEYS)), config._name_or_path or "."
        raise ModelError(
            f"{folder}/config.json: {STREAMING_CONFIG_KEY} has the keys {found}, written by an older version of mowa"
            f" (expected: {expected}); train the checkpoint again"
        )
    lookaheads = tuple(entry.get("lookahead_frames") or (0,))
    return TrainedChunking(tuple(entry["chunk_frames"]), entry.get("left_context_frames"), lookaheads)


def set_trained_chunking(config: Any, trained: TrainedChunking | None) -> None:
    """Write what `get_trained_chunking` reads into a net's config; None removes it."""
    vars(config).pop(STREAMING_CONFIG_KEY, None)
    if trained is not None:
        entry = {
            "chunk_frames": list(trained.chunk_sizes),
            "left_context_frames": trained.left_context,
            "lookahead_frames": list(trained.lookaheads),
        }
        setattr(config, STREAMING_CONFIG_KEY, entry)


def unsupported_reason(net: Any) -> str:
    """Return why `net` cannot run with chunked attention, or an empty string where it can."""
    if reason := anatomy.unsupported_reason(net, "chunked"):
        return reason
    config = net.config
    if read_anatomy(net).normalizes_over_time:
        return "its front end normalizes over the whole recording (group norm)"
    if getattr(config, "conv_pos_batch_norm", False):
        return "its positional convolution has batch norm"
    return "it has a convolutional adapter after the last block" if getattr(config, "add_adapter", False) else ""


@contextmanager
def apply_chunk_mask(net: Any, config: ChunkConfig | None) -> Iterator[Callable[[Tensor], Tensor]]:
    """Run `net` with chunked attention inside the context; with config None, as it is.

    Yields:
        A function that reduces hidden states of a block, [B, N, D] in the layout of the chunks, to [B, T, D].

    Raises:
        ValueError: with `unsupported_reason`.
    """
    if config is None:
        yield lambda states: states
        return
    if reason := unsupported_reason(net):
        raise ValueError(reason)
    parts, hooks = read_anatomy(net), _ChunkHooks(config)
    handles = [
        parts.encoder.register_forward_pre_hook(hooks.expand_frames, with_kwargs=True),
        parts.encoder.register_forward_hook(hooks.drop_lookahead_output),
        *(block.attention.register_forward_pre_hook(hooks.mask_attention, with_kwargs=True) for block in parts.blocks),
    ]
    try:
        with replace_positions(net, partial(_chunked_positions, parts, config, hooks)):
            yield hooks.drop_lookahead
    finally:
        for handle in handles:
            handle.remove()


class _ChunkHooks:
    """Hooks on an encoder and its attention layers, the layout of the current batch and its padding mask [B, N]."""

    def __init__(self, config: ChunkConfig) -> None:
        self._config = config
        self.layout = ChunkLayout(config, 0)
        self.valid: Tensor | None = None

    def expand_frames(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Repeat look-ahead frames at the input of the encoder: [B, T, D] → [B, N, D]."""
        kwargs = dict(kwargs)
        states = args[0] if args else kwargs.pop("hidden_states")
        self.layout = ChunkLayout(self._config, states.shape[1], states.device)
        mask = kwargs.get("attention_mask")
        self.valid = None if mask is None else mask[:, self.layout.frame_index]
        if mask is not None:
            kwargs["attention_mask"] = self.valid
        return (states[:, self.layout.frame_index], *args[1:]), kwargs

    def drop_lookahead_output(self, module: Any, args: tuple[Any, ...], out: Any) -> Any:
        out.last_hidden_state = self.drop_lookahead(out.last_hidden_state)
        return out

    def drop_lookahead(self, states: Tensor) -> Tensor:
        """Drop the look-ahead frames, [B, N, D] → [B, T, D]; return states that have T frames already as they are."""
        return states[:, self.layout.is_main] if states.shape[1] == len(self.layout.is_main) else states

    def mask_attention(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        states, mask = (args[0] if args else kwargs["hidden_states"]), kwargs.get("attention_mask")
        length, visible = states.shape[1], self.layout.visible[None, None]
        if isinstance(mask, AttentionMask):
            mask = mask.to_dense(length, length, states.device)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask >= 0
        if mask is not None:  # padding attends to itself: a softmax over no keys would be NaN
            visible = (visible & mask) | torch.eye(length, dtype=torch.bool, device=states.device)
        implementation = module.config._attn_implementation
        if implementation == "mowa":
            return args, kwargs | {"attention_mask": AttentionMask(dense_mask=visible)}
        if implementation == "eager":
            lowest = torch.finfo(states.dtype).min
            visible = torch.zeros_like(visible, dtype=states.dtype).masked_fill(~visible, lowest)
        return args, kwargs | {"attention_mask": visible}


def _chunked_positions(parts: Anatomy, config: ChunkConfig, hooks: _ChunkHooks, states: Tensor) -> Tensor:
    """Positions of states [B, N, C] in the layout of the chunks, each chunk seeing zeros after its look-ahead."""
    if parts.absolute_positions is not None:
        return parts.absolute_positions.at(hooks.layout.frame_index, states).expand_as(states)
    for index, layer in enumerate(parts.position_layers):
        if index and hooks.valid is not None:  # the encoder itself zeroes padding before the first one
            states = states.masked_fill(~hooks.valid[..., None].bool(), 0)
        states = _convolve_chunks(layer, config, hooks.layout, states)
    return states


def _convolve_chunks(layer: PositionLayer, config: ChunkConfig, layout: ChunkLayout, states: Tensor) -> Tensor:
    """One convolution over states [B, N, C]: of each chunk with its look-ahead and the main frames before it."""
    conv, (chunks, length) = layer.conv, layout.valid.shape
    kernel = conv.kernel_size[0]
    before = kernel // 2
    main = functional.pad(states[:, layout.is_main].transpose(1, 2), (before, config.size))
    earlier = main.unfold(2, before, config.size)[:, :, :chunks]
    own = states.new_zeros(len(states), chunks, length, states.shape[-1])
    own[:, layout.valid] = states
    windows = torch.cat([earlier.transpose(1, 2), own.transpose(2, 3)], 3).flatten(0, 1)
    windows = functional.pad(windows, (0, kernel - 1 - before))  # [B · chunks, C, before + length + …]
    convolved = layer.activate(functional.conv1d(windows, conv.weight, conv.bias, groups=conv.groups))
    positions: Tensor = convolved.unflatten(0, (len(states), chunks)).transpose(2, 3)[:, layout.valid]
    return positions
