"""Pack recordings end to end in one row and run a CTC net over them as if each were alone, without padding.

Each recording starts at a multiple of the net's hop, so one pass of the convolutional front end computes the frames of
all (frames that straddle two are dropped); front ends that normalize over time run on each recording separately.
Attention is limited to a recording by `AttentionMask.documents`; the positional convolution runs over a row with half a
kernel of zeros between recordings, as padding would give it.

The net's own modules are called in their own order; tests compare with the padded net.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from mowa.models.ctc_encoder import anatomy
from mowa.models.ctc_encoder.anatomy import Anatomy, read_anatomy
from mowa.models.ctc_encoder.geometry import FrameGeometry

ATTN_IMPLEMENTATION = attention_interface.ATTN_IMPLEMENTATION
FRAME_MULTIPLE = 32  # rows are padded to a multiple of this many frames, as oneDNN prepares anew for every shape
FRONT_END_CHUNK_FRAMES = 256  # frames that a frozen front end computes at a time
MAX_KERNEL_RATIO = 4  # with a kernel longer than this many times the recordings, convolve each separately


def unsupported_reason(net: Any) -> str:
    """Return why `net` cannot run over packed recordings; empty where it can."""
    if reason := anatomy.unsupported_reason(net, "packing"):
        return reason
    if getattr(net.config, "add_adapter", False):
        return "its convolutional adapter mixes neighboring frames"
    if getattr(net.config, "conv_pos_batch_norm", False):
        return "its positional convolution has batch norm"
    return ""


def frame_offsets(lengths: Sequence[int], geometry: FrameGeometry) -> list[int]:
    """Return the frame at which each recording, of `lengths` samples, starts in a packed row, and the row's end."""
    return [0, *accumulate(-(-length // geometry.hop) for length in lengths)]


def pack_samples(clips: Sequence[np.ndarray], geometry: FrameGeometry, *, pad_to_multiple_of: int = 1) -> np.ndarray:
    """Pack recordings, float32 [n] each, end to end into one row, float32 [N].

    Args:
        clips: each long enough for a frame.
        geometry: each recording starts at a multiple of its hop.
        pad_to_multiple_of: N is a multiple of this.

    Raises:
        ModelError: a recording is shorter than one frame.
    """
    lengths = [len(clip) for clip in clips]
    if not min(map(geometry.num_frames, lengths), default=0):
        raise ModelError(
            f"a recording has {min(lengths, default=0)} samples, less than one frame of the net"
            f" ({geometry.receptive_field} samples); leave it out"
        )
    offsets = frame_offsets(lengths, geometry)
    size = max(offsets[-1] * geometry.hop, geometry.receptive_field)
    row = np.zeros(-(-size // pad_to_multiple_of) * pad_to_multiple_of, np.float32)
    for offset, clip in zip(offsets, clips, strict=False):
        row[offset * geometry.hop : offset * geometry.hop + len(clip)] = clip
    return row


@contextmanager
def packed_attention(net: Any) -> Iterator[None]:
    """Let the attention of `net` accept packed sequences inside the context; its forward pass stays the same."""
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
    """Run a CTC net over a packed row, inside `packed_attention(net)`.

    Args:
        net: a transformers CTC net of a supported family.
        input_values: [1, N], a row from `pack_samples`.
        lengths: of the U recordings, in samples.
        mask_time_indices: SpecAugment, bool [F]: frames replaced by the net's mask embedding; F counts the frames of
            all recordings in order.
        mask_feature_indices: SpecAugment, bool [U, D]: channels set to zero.
        hidden_layers: blocks whose output to return.

    Returns:
        Logits [U, T, V], zero after each recording's own frames, and hidden states [F, D] for each of `hidden_layers`.
    """
    parts = read_anatomy(net)
    counts = [parts.geometry.num_features(length) for length in lengths]
    features = _features(parts, input_values, lengths, counts)
    padding = -features.shape[1] % FRAME_MULTIPLE
    if padding:
        features = torch.nn.functional.pad(features, (0, 0, 0, padding))
    sequences = PackedSequences((*counts, padding) if padding else tuple(counts))
    states = parts.project(features)
    states = _spec_augment(parts, states, counts, mask_time_indices, mask_feature_indices)
    states = states + _positions(parts, states, sequences, len(counts)).to(states)
    states, hidden = _blocks(parts, states, sequences, hidden_layers)
    logits = parts.head(net.dropout(states))[0]
    rows = [logits[a : a + count] for a, count in zip(sequences.offsets, counts, strict=False)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), [one[0, : sum(counts)] for one in hidden]


def forward_padded(
    net: Any,
    input_values: Tensor,
    lengths: Sequence[int],
    *,
    use_attention_mask: bool,
    mask_time_indices: Tensor | None = None,
    mask_feature_indices: Tensor | None = None,
) -> Tensor:
    """Run the stock net over padded recordings, with explicit SpecAugment masks.

    Args:
        net: a transformers CTC net.
        input_values: [U, N].
        lengths: of the U recordings, in samples.
        use_attention_mask: pass the padding mask to the encoder (`return_attention_mask` of the checkpoint).
        mask_time_indices: as in `forward_packed`.
        mask_feature_indices: as in `forward_packed`.

    Returns:
        Logits [U, T, V].
    """
    parts = read_anatomy(net)
    counts = [parts.geometry.num_features(length) for length in lengths]
    states = parts.project(parts.features(input_values))
    valid = torch.arange(states.shape[1], device=states.device) < torch.tensor(counts, device=states.device)[:, None]
    if mask_time_indices is not None or mask_feature_indices is not None:
        flat = _spec_augment(parts, states[valid][None], counts, mask_time_indices, mask_feature_indices)[0]
        states = states.masked_scatter(valid[..., None], flat)
    states = parts.encoder(states, attention_mask=valid if use_attention_mask else None).last_hidden_state
    states = states if parts.adapter is None else parts.adapter(states)
    logits: Tensor = parts.head(net.dropout(states))
    return logits


def _features(parts: Anatomy, values: Tensor, lengths: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Front-end frames [1, F, C] of all recordings, concatenated."""
    geometry = parts.geometry
    hop, offsets = geometry.feature_hop, frame_offsets(lengths, geometry)
    if parts.normalizes_over_time:
        clips = (values[:, offset * hop : offset * hop + n] for offset, n in zip(offsets, lengths, strict=False))
        return torch.cat([parts.front_end(clip) for clip in clips], dim=2).transpose(1, 2)
    frozen = not any(weight.requires_grad for weight in parts.front_end.parameters())
    if frozen and not is_deepspeed_zero3_enabled():  # whose processes must call every module equally often
        features = _front_end_in_chunks(parts, values)
    else:
        features = parts.features(values)
    return torch.cat([features[:, at : at + count] for at, count in zip(offsets, counts, strict=False)], dim=1)


@torch.no_grad()
def _front_end_in_chunks(parts: Anatomy, values: Tensor) -> Tensor:
    """The same frames [1, T, C], computed in chunks, which bounds the memory of intermediate layers."""
    geometry = parts.geometry
    total = geometry.num_features(values.shape[1])
    chunks = []
    for first in range(0, total, FRONT_END_CHUNK_FRAMES):
        count = min(FRONT_END_CHUNK_FRAMES, total - first)
        start = first * geometry.feature_hop
        chunks.append(parts.features(values[:, start : start + geometry.num_feature_samples(count)]))
    return torch.cat(chunks, dim=1)


def _spec_augment(
    parts: Anatomy,
    states: Tensor,
    counts: Sequence[int],
    mask_time_indices: Tensor | None,
    mask_feature_indices: Tensor | None,
) -> Tensor:
    total = sum(counts)
    if mask_time_indices is not None:
        embedding = parts.mask_embedding
        fill = embedding.to(states.dtype) if embedding is not None else states.new_zeros(states.shape[-1])
        masked = torch.zeros(states.shape[1], dtype=torch.bool, device=states.device)
        masked[:total] = mask_time_indices
        states = torch.where(masked[None, :, None], fill, states)
    if mask_feature_indices is not None:
        lengths = torch.tensor(counts, device=states.device)
        kept = (~mask_feature_indices).repeat_interleave(lengths, dim=0).to(states.dtype)
        kept = torch.nn.functional.pad(kept, (0, 0, 0, states.shape[1] - total), value=1.0)
        states = states * kept
    return states


def _positions(parts: Anatomy, states: Tensor, sequences: PackedSequences, count: int) -> Tensor:
    """Positions of each of the first `count` sequences separately; zeros for the rest."""
    kernel = max((layer.conv.kernel_size[0] for layer in parts.position_layers), default=0)
    offsets, lengths = sequences.offsets, sequences.lengths[:count]
    padding = states.new_zeros(1, states.shape[1] - offsets[count], states.shape[-1])
    long_kernel = kernel > MAX_KERNEL_RATIO * max(lengths) and not is_deepspeed_zero3_enabled()
    if parts.absolute_positions is not None or long_kernel:
        alone = [parts.position_module(states[:, a : a + n]) for a, n in zip(offsets, lengths, strict=False)]
        return torch.cat([*alone, padding.to(alone[0])], dim=1)
    for layer in parts.position_layers:
        gap = states.new_zeros(1, layer.conv.kernel_size[0] // 2, states.shape[-1])
        row = [part for a, n in zip(offsets, lengths, strict=False) for part in (states[:, a : a + n], gap)]
        convolved = layer(torch.cat(row, dim=1))
        starts = [a + index * gap.shape[1] for index, a in enumerate(offsets[:count])]
        cut = [convolved[:, start : start + n] for start, n in zip(starts, lengths, strict=True)]
        states = torch.cat([*cut, padding.to(cut[0])], dim=1)
    return states


def _blocks(
    parts: Anatomy, states: Tensor, sequences: PackedSequences, hidden_layers: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """Run the blocks. Return the encoder's output and the states after each of `hidden_layers`."""
    encoder, kept = parts.encoder, {}
    states = encoder.dropout(parts.before_blocks(states))
    mask = AttentionMask(documents=(sequences,))
    lockstep = is_deepspeed_zero3_enabled()  # then every process must run every block
    layerdrop = parts.config.layerdrop if encoder.training else 0.0
    for index, block in enumerate(parts.blocks):
        drop = layerdrop > 0 and bool(torch.rand([]) < layerdrop)
        if lockstep or not drop:
            out = block(states, attention_mask=mask)
            states = out[0] if isinstance(out, tuple) else out
        if index in hidden_layers:
            kept[index] = states
    return parts.after_blocks(states), [kept[index] for index in hidden_layers]
