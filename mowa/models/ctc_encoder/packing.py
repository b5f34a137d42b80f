"""Recordings end to end in one row, and a CTC net over them as if each stood alone: no padding, nothing leaks.

Samples: every recording begins at a multiple of the net's hop, so one pass of the convolutional front end gives the
frames of each (a frame that straddles two is dropped). Front ends that normalise over time are run on each recording
by itself. Frames: attention sees its own recording (`kernels.segments`), and the positional convolution runs over a row
in which half a kernel of zeros lies between recordings, which is what padding would give it.

The net's own modules are called, in the net's own order; `parity` with the padded net is in the tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from mowa.errors import ModelError
from mowa.kernels.attention.dispatch import AttentionMask
from mowa.kernels.attention.varlen import PackedSequences
from mowa.models.causal import attention_interface

ATTN_IMPLEMENTATION = attention_interface.ATTN_IMPLEMENTATION
SUPPORTED_FAMILIES = ("wav2vec2", "hubert")
FRAME_MULTIPLE = 32  # frames in a row are a multiple of this: a processor prepares anew for every new shape
FRONT_END_CHUNK_FRAMES = 256  # frames that a frozen front end makes at a time
MAX_KERNEL_RATIO = (
    4  # a positional convolution with a kernel of so many times the recordings' length is run on each by itself
)


@dataclass(frozen=True, slots=True)
class FrameGeometry:
    """How a front end makes frames: one every `hop` samples, each from `reach` samples."""

    hop: int
    receptive_field: int

    def num_frames(self, samples: int) -> int:
        return max(0, (samples - self.receptive_field) // self.hop + 1)


def frame_geometry(config: Any) -> FrameGeometry:
    """Of a wav2vec2-like config; nested roundings of its convolutions come to the same."""
    hop, reach = 1, 1
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        reach, hop = reach + (kernel - 1) * hop, hop * stride
    return FrameGeometry(hop, reach)


def unsupported_reason(family: str, config: Any) -> str:
    """Why a net cannot be run over packed recordings; empty where it can."""
    if family not in SUPPORTED_FAMILIES:
        return f"{family} attends in a way of its own"
    if getattr(config, "add_adapter", False):
        return "its convolutional adapter mixes neighbouring frames"
    if getattr(config, "conv_pos_batch_norm", False):
        return "its positional convolution normalises over the batch"
    return ""


def frame_offsets(lengths: Sequence[int], geometry: FrameGeometry) -> list[int]:
    """The frame at which each recording of so many samples begins, in a row that `lay` makes; then the row's end."""
    return [0, *accumulate(-(-length // geometry.hop) for length in lengths)]


def pack_samples(clips: Sequence[np.ndarray], geometry: FrameGeometry, *, pad_to_multiple_of: int = 1) -> np.ndarray:
    """Recordings float32 [n] end to end → row [N], N a multiple of `grid`.

    A recording too short for a frame is a ModelError; leave such out before.
    """
    lengths = [len(sound) for sound in clips]
    if not min(map(geometry.num_frames, lengths), default=0):
        raise ModelError(
            f"a recording is shorter than one frame of the net ({geometry.receptive_field} samples); leave it out"
        )
    begins = frame_offsets(lengths, geometry)
    row = np.zeros(
        -(-max(begins[-1] * geometry.hop, geometry.receptive_field) // pad_to_multiple_of) * pad_to_multiple_of,
        np.float32,
    )
    for begin, sound in zip(begins, clips, strict=False):
        row[begin * geometry.hop : begin * geometry.hop + len(sound)] = sound
    return row


@contextmanager
def packed_attention(net: Any) -> Iterator[None]:
    """Let `net`'s attention know segments, as long as the context lasts; its ordinary forward stays as it was."""
    restore = attention_interface.install_attention(net)
    try:
        yield
    finally:
        restore()


def forward_packed(
    net: Any,
    input_values: Tensor,
    lengths: Sequence[int],
    *,
    mask_time_indices: Tensor | None = None,
    mask_feature_indices: Tensor | None = None,
    hidden_layers: Sequence[int] = (),
) -> tuple[Tensor, list[Tensor]]:
    """A row [1, N] of recordings of so many samples, laid by `lay` → logits [U, T, V], zero beyond each one's frames.

    With it, the features [F, width] after each of the blocks in `after`, over the frames of all recordings in order.
    Inside `packed(net)`. SpecAugment: `hidden` bool [frames] are replaced by the net's mask vector, `silenced` bool
    [U, width] are the channels set to zero, over the frames of all recordings in order.
    """
    core = net.base_model
    counts = [frame_geometry(core.config).num_frames(length) for length in lengths]
    features = _features(core, input_values, lengths, counts)
    spare = -features.shape[1] % FRAME_MULTIPLE
    if spare:
        features = torch.nn.functional.pad(features, (0, 0, 0, spare))
    segments = PackedSequences((*counts, spare) if spare else tuple(counts))
    states = core.feature_projection(features)
    states = states[0] if isinstance(states, tuple) else states
    states = _masked(core, states, counts, mask_time_indices, mask_feature_indices)
    states = states + _positions(core.encoder.pos_conv_embed, states, segments, len(counts)).to(states)
    states, kept = _blocks(core, states, segments, hidden_layers)
    logits = net.lm_head(net.dropout(states))[0]
    parts = [logits[a : a + count] for a, count in zip(segments.offsets, counts, strict=False)]
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True), [part[0, : sum(counts)] for part in kept]


def forward_padded(
    net: Any,
    input_values: Tensor,
    lengths: Sequence[int],
    *,
    use_attention_mask: bool,
    mask_time_indices: Tensor | None = None,
    mask_feature_indices: Tensor | None = None,
) -> Tensor:
    """Padded recordings [U, N] of so many samples → logits [U, T, V], by the stock net; masks as `emit` takes them.

    attend: tell the net where padding is, as its checkpoint asks for or not.
    """
    core = net.base_model
    counts = [frame_geometry(core.config).num_frames(length) for length in lengths]
    states = core.feature_projection(core.feature_extractor(input_values).transpose(1, 2))
    states = states[0] if isinstance(states, tuple) else states
    true = torch.arange(states.shape[1], device=states.device) < torch.tensor(counts, device=states.device)[:, None]
    if mask_time_indices is not None or mask_feature_indices is not None:
        flat = _masked(core, states[true][None], counts, mask_time_indices, mask_feature_indices)[0]
        states = states.masked_scatter(true[..., None], flat)
    states = core.encoder(states, attention_mask=true if use_attention_mask else None).last_hidden_state
    return net.lm_head(net.dropout(states))


def _features(core: Any, values: Tensor, lengths: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Front-end frames [1, T, C] of all recordings, end to end."""
    how = frame_geometry(core.config)
    begins = frame_offsets(lengths, how)
    if core.config.feat_extract_norm == "group":  # over time, so over all samples of a recording and no others
        alone = (values[:, a * how.hop : a * how.hop + n] for a, n in zip(begins, lengths, strict=False))
        return torch.cat([core.feature_extractor(part) for part in alone], dim=2).transpose(1, 2)
    frozen = not any(weight.requires_grad for weight in core.feature_extractor.parameters())
    if frozen and not is_deepspeed_zero3_enabled():  # whose processes have to call every module equally often
        features = _in_pieces(core.feature_extractor, values, how)
    else:
        features = core.feature_extractor(values).transpose(1, 2)
    return torch.cat([features[:, a : a + count] for a, count in zip(begins, counts, strict=False)], dim=1)


@torch.no_grad()
def _in_pieces(module: Any, values: Tensor, how: FrameGeometry) -> Tensor:
    """The same frames [1, T, C], made a piece of the row at a time: what lies between two layers stays small."""
    total = how.num_frames(values.shape[1])
    pieces = []
    for first in range(0, total, FRONT_END_CHUNK_FRAMES):
        count = min(FRONT_END_CHUNK_FRAMES, total - first)
        heard = values[:, first * how.hop : (first + count - 1) * how.hop + how.receptive_field]
        pieces.append(module(heard).transpose(1, 2))
    return torch.cat(pieces, dim=1)


def _masked(core: Any, states: Tensor, counts: Sequence[int], hidden: Tensor | None, silenced: Tensor | None) -> Tensor:
    true = sum(counts)
    if hidden is not None:
        vector = getattr(core, "masked_spec_embed", None)
        fill = vector.to(states.dtype) if vector is not None else states.new_zeros(states.shape[-1])
        whole = torch.zeros(states.shape[1], dtype=torch.bool, device=states.device)
        whole[:true] = hidden
        states = torch.where(whole[None, :, None], fill, states)
    if silenced is not None:
        lengths = torch.tensor(counts, device=states.device)
        kept = (~silenced).repeat_interleave(lengths, dim=0).to(states.dtype)
        kept = torch.nn.functional.pad(kept, (0, 0, 0, states.shape[1] - true), value=1.0)
        states = states * kept
    return states


def _positions(module: Any, states: Tensor, segments: PackedSequences, count: int) -> Tensor:
    """What the positional convolution gives each of the first `count` segments by itself; the rest gets zeros."""
    kernel = module.conv.kernel_size[0]
    starts, lengths = segments.offsets, segments.lengths[:count]
    rest = states.shape[1] - starts[count]
    looked_up = "forward" in vars(module)  # in a table (`positions_by_table`)
    if looked_up or (kernel > MAX_KERNEL_RATIO * max(lengths) and not is_deepspeed_zero3_enabled()):
        parts = [module(states[:, a : a + length]) for a, length in zip(starts, lengths, strict=False)]
    else:
        gap = states.new_zeros(1, kernel // 2, states.shape[-1])
        row = [part for a, length in zip(starts, lengths, strict=False) for part in (states[:, a : a + length], gap)]
        wide = module(torch.cat(row, dim=1))
        shifts = [index * (kernel // 2) for index in range(count)]
        parts = [wide[:, a + shift : a + shift + n] for a, shift, n in zip(starts, shifts, lengths, strict=False)]
    return torch.cat([*parts, states.new_zeros(1, rest, states.shape[-1]).to(parts[0])], dim=1)


def _blocks(core: Any, states: Tensor, segments: PackedSequences, after: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    encoder, config, kept = core.encoder, core.config, {}
    stable = config.do_stable_layer_norm
    states = encoder.dropout(states if stable else encoder.layer_norm(states))
    mask = AttentionMask(documents=(segments,))
    in_step = is_deepspeed_zero3_enabled()  # then every process has to run every block
    for depth, layer in enumerate(encoder.layers):
        drop = core.training and config.layerdrop > 0 and bool(torch.rand([]) < config.layerdrop)
        if in_step or not drop:
            out = layer(states, attention_mask=mask)
            states = out[0] if isinstance(out, tuple) else out
        if depth in after:
            kept[depth] = states
    return (encoder.layer_norm(states) if stable else states), [kept[depth] for depth in after]
