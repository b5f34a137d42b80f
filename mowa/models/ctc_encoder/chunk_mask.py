"""What a bidirectional CTC net says when sound comes in chunks: its stock modules, each frame seeing less.

Frames are numbered from 0 and belong to chunks of `size`. A chunk k is heard together with the `ahead` frames after it,
and sees `left` frames before it as they were heard in chunks of their own:

    k · size − left ≤ j < k · size          keys and values of frame j, as its own chunk made them
    k · size ≤ j < (k + 1) · size + ahead   keys and values that are made with chunk k, and those ahead once more later

The positional convolution gets zeros in place of what lies beyond that. So nothing of a chunk ever changes when the
next one comes, and `streaming` can compute it once. The front end looks beyond a frame by its receptive field less one
hop (5 ms of XLSR, 45 ms of pl-tiny), as it always does.

After U. Zhang et al., "Unified Streaming and Non-streaming Two-pass End-to-end Model", 2020, arXiv:2012.05481 (chunks
of changing size in training); Y. Shi et al., "Emformer", 2021, arXiv:2010.10759 (frames ahead that are made again); and
C. Fu et al., "wav2vec-S", 2021, arXiv:2110.12852 (the positional convolution).
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

from mowa.kernels.attention.dispatch import AttentionMask
from mowa.models.ctc_encoder.positions import absolute_position_table

SUPPORTED_CLASSES = ("Wav2Vec2ForCTC", "HubertForCTC")
STREAMING_CONFIG_KEY = (
    "streaming"  # config key: {"chunk_frames": [16, 32], "left_frames": None, "ahead_frames": [0, 8]}
)


@dataclass(frozen=True, slots=True)
class ChunkConfig:
    """Chunks of `size` frames that see `left` frames before themselves (None: all there are) and `ahead` after."""

    size: int
    left_context: int | None = None
    lookahead: int = 0


class ChunkLayout:
    """`count` frames as rows in the order in which chunks make them, those that are made again beside the first time.

    `frame` int [N] and `chunk` int [N]: which frame a row is, and with which chunk it is made. `main` bool [N]: rows
    that stay; there is one for each frame, in order. `seen` bool [N, N]: whether a row sees another.
    """

    def __init__(self, config: ChunkConfig, num_frames: int, device: Any = None) -> None:
        begins = torch.arange(0, num_frames, config.size, device=device)
        rows = begins[:, None] + torch.arange(config.size + config.lookahead, device=device)
        self.valid = rows < num_frames  # [chunks, size + ahead]
        self.frame_index = rows[self.valid]
        self.chunk_index = (begins // config.size)[:, None].expand_as(rows)[self.valid]
        self.is_main = self.frame_index < (self.chunk_index + 1) * config.size
        mine = self.chunk_index[:, None] == self.chunk_index
        before = (self.chunk_index < self.chunk_index[:, None]) & self.is_main
        if config.left_context is not None:
            before &= self.frame_index >= (self.chunk_index * config.size - config.left_context)[:, None]
        self.visible = mine | before


@dataclass(frozen=True, slots=True)
class TrainedChunking:
    """What a net was trained with, in frames: chunks of these sizes, so much to the left (None: all), so much ahead."""

    chunk_sizes: tuple[int, ...]
    left_context: int | None = None
    lookaheads: tuple[int, ...] = (0,)


def get_trained_chunking(config: Any) -> TrainedChunking | None:
    """How a net was trained to hear in chunks; None: it was not."""
    said = getattr(config, STREAMING_CONFIG_KEY, None)
    if not said:
        return None
    return TrainedChunking(
        tuple(said["chunk_frames"]), said.get("left_frames"), tuple(said.get("ahead_frames") or (0,))
    )


def receptive_field(config: Any) -> int:
    """Samples that the first frame is made of."""
    far, step = 1, 1
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        far, step = far + (kernel - 1) * step, step * stride
    return far


def unsupported_reason(net: Any) -> str:
    """Why `net` cannot hear in chunks; empty where it can."""
    config, name = net.config, type(net).__name__
    if name not in SUPPORTED_CLASSES:
        return f"{name} attends in a way of its own"
    if config.feat_extract_norm == "group":
        return "its front end normalises over the whole recording"
    if getattr(config, "conv_pos_batch_norm", False):
        return "its positional convolution normalises over the batch"
    return "it has convolutions over its last frames" if getattr(config, "add_adapter", False) else ""


@contextmanager
def apply_chunk_mask(net: Any, config: ChunkConfig | None) -> Iterator[Callable[[Tensor], Tensor]]:
    """As long as the context lasts, `net` hears in chunks; None leaves it alone. ValueError where `refused`.

    Gives what makes states of blocks, [B, N, D], into those of the frames, [B, T, D].
    """
    if config is None:
        yield lambda states: states
        return
    if why := unsupported_reason(net):
        raise ValueError(why)
    encoder, laid = net.base_model.encoder, _ChunkHooks(config)
    along = encoder.pos_conv_embed
    absolute, before = absolute_position_table(net), vars(along).get("forward")
    along.forward = partial(_chunked_positions, along, config, laid, absolute)
    hooks = [
        encoder.register_forward_pre_hook(laid.expand_frames, with_kwargs=True),
        encoder.register_forward_hook(laid.drop_lookahead_output),
        *(layer.attention.register_forward_pre_hook(laid.mask_attention, with_kwargs=True) for layer in encoder.layers),
    ]
    try:
        yield laid.drop_lookahead
    finally:
        for hook in hooks:
            hook.remove()
        del along.forward
        if before is not None:
            along.forward = before


class _ChunkHooks:
    """The layout of the batch that is just heard."""

    def __init__(self, config: ChunkConfig) -> None:
        self._how = config
        self.layout = ChunkLayout(config, 0)

    def expand_frames(self, module: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[Any, Any]:
        inputs = dict(inputs)
        states = args[0] if args else inputs.pop("hidden_states")
        self.layout = ChunkLayout(self._how, states.shape[1], states.device)
        mask = inputs.get("attention_mask")
        if mask is not None:
            inputs["attention_mask"] = mask[:, self.layout.frame_index]
        return (states[:, self.layout.frame_index], *args[1:]), inputs

    def drop_lookahead_output(self, module: Any, args: tuple[Any, ...], out: Any) -> Any:
        out.last_hidden_state = self.drop_lookahead(out.last_hidden_state)
        return out

    def drop_lookahead(self, states: Tensor) -> Tensor:
        return states[:, self.layout.is_main] if states.shape[1] == len(self.layout.is_main) else states

    def mask_attention(self, module: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[Any, Any]:
        states, mask = (args[0] if args else inputs["hidden_states"]), inputs.get("attention_mask")
        count, seen = states.shape[1], self.layout.visible[None, None]
        if isinstance(mask, AttentionMask):
            mask = mask.to_dense(count, count, states.device)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask >= 0
        if mask is not None:  # padding sees itself: a softmax over nothing would be NaN
            seen = (seen & mask) | torch.eye(count, dtype=torch.bool, device=states.device)
        kind = module.config._attn_implementation
        if kind == "mowa":
            return args, inputs | {"attention_mask": AttentionMask(dense_mask=seen)}
        if kind == "eager":
            seen = torch.zeros_like(seen, dtype=states.dtype).masked_fill(~seen, torch.finfo(states.dtype).min)
        return args, inputs | {"attention_mask": seen}


def _chunked_positions(
    module: Any, how: ChunkConfig, laid: _ChunkHooks, absolute: Tensor | None, states: Tensor
) -> Tensor:
    """What the positional convolution adds to states [B, N, C] that are laid out, each chunk the last there is."""
    now = laid.layout
    if absolute is not None:
        return absolute.to(states)[now.frame_index.clamp(max=len(absolute) - 1)].expand_as(states)
    conv, alone = module.conv, states[:, now.is_main]
    kernel, chunks = conv.kernel_size[0], len(now.valid)
    before, wide = kernel // 2, how.size + how.lookahead
    row = functional.pad(alone.transpose(1, 2), (before, (chunks - 1) * how.size + wide - alone.shape[1]))
    parts = row.unfold(2, before + wide, how.size).transpose(1, 2).flatten(0, 1)  # [B · chunks, C, before + wide]
    parts = functional.pad(parts, (0, kernel - 1 - before))
    made = module.activation(functional.conv1d(parts, conv.weight, conv.bias, groups=conv.groups))
    whole: Tensor = made.unflatten(0, (len(states), chunks)).transpose(2, 3)[:, now.valid]
    return whole
