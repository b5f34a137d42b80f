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
from mowa.models.ctc_encoder.geometry import FrameGeometry, frame_geometry
from mowa.models.ctc_encoder.positions import absolute_position_table

ATTN_IMPLEMENTATION = attention_interface.ATTN_IMPLEMENTATION
SUPPORTED_FAMILIES = ("wav2vec2", "hubert")
FRAME_MULTIPLE = 32  # rows are padded to a multiple of this many frames, as oneDNN prepares anew for every shape
FRONT_END_CHUNK_FRAMES = 256  # frames that a frozen front end computes at a time
MAX_KERNEL_RATIO = 4  # with a kernel longer than this many times the recordings, convolve each separately


def unsupported_reason(family: str, config: Any) -> str:
    """Return why a net of this family and config cannot run over packed recordings; empty where it can."""
    if family not in SUPPORTED_FAMILIES:
        return f"{family} has an attention of its own"
    if getattr(config, "add_adapter", False):
        return "its convolutional adapter mixes neighboring frames"
    if getattr(config, "conv_pos_batch_norm", False):
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
    core = net.base_model
    counts = [frame_geometry(core.config).num_frames(length) for length in lengths]
    features = _features(core, input_values, lengths, counts)
    padding = -features.shape[1] % FRAME_MULTIPLE
    if padding:
        features = torch.nn.functional.pad(features, (0, 0, 0, padding))
    sequences = PackedSequences((*counts, padding) if padding else tuple(counts))
    states = core.feature_projection(features)
    states = states[0] if isinstance(states, tuple) else states
    states = _spec_augment(core, states, counts, mask_time_indices, mask_feature_indices)
    states = states + _positions(core, states, sequences, len(counts)).to(states)
    states, hidden = _blocks(core, states, sequences, hidden_layers)
    logits = net.lm_head(net.dropout(states))[0]
    parts = [logits[a : a + count] for a, count in zip(sequences.offsets, counts, strict=False)]
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True), [part[0, : sum(counts)] for part in hidden]


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
    core = net.base_model
    counts = [frame_geometry(core.config).num_frames(length) for length in lengths]
    states = core.feature_projection(core.feature_extractor(input_values).transpose(1, 2))
    states = states[0] if isinstance(states, tuple) else states
    valid = torch.arange(states.shape[1], device=states.device) < torch.tensor(counts, device=states.device)[:, None]
    if mask_time_indices is not None or mask_feature_indices is not None:
        flat = _spec_augment(core, states[valid][None], counts, mask_time_indices, mask_feature_indices)[0]
        states = states.masked_scatter(valid[..., None], flat)
    states = core.encoder(states, attention_mask=valid if use_attention_mask else None).last_hidden_state
    return net.lm_head(net.dropout(states))


def _features(core: Any, values: Tensor, lengths: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Front-end frames [1, F, C] of all recordings, concatenated."""
    geometry = frame_geometry(core.config)
    hop, offsets = geometry.hop, frame_offsets(lengths, geometry)
    if core.config.feat_extract_norm == "group":  # normalizes over all samples of a recording
        clips = (values[:, offset * hop : offset * hop + n] for offset, n in zip(offsets, lengths, strict=False))
        return torch.cat([core.feature_extractor(clip) for clip in clips], dim=2).transpose(1, 2)
    frozen = not any(weight.requires_grad for weight in core.feature_extractor.parameters())
    if frozen and not is_deepspeed_zero3_enabled():  # whose processes must call every module equally often
        features = _front_end_in_chunks(core.feature_extractor, values, geometry)
    else:
        features = core.feature_extractor(values).transpose(1, 2)
    parts = [features[:, offset : offset + count] for offset, count in zip(offsets, counts, strict=False)]
    return torch.cat(parts, dim=1)


@torch.no_grad()
def _front_end_in_chunks(module: Any, values: Tensor, geometry: FrameGeometry) -> Tensor:
    """The same frames [1, T, C], computed in chunks, which bounds the memory of intermediate layers."""
    total = geometry.num_frames(values.shape[1])
    chunks = []
    for first in range(0, total, FRONT_END_CHUNK_FRAMES):
        count = min(FRONT_END_CHUNK_FRAMES, total - first)
        last = (first + count - 1) * geometry.hop + geometry.receptive_field
        chunks.append(module(values[:, first * geometry.hop : last]).transpose(1, 2))
    return torch.cat(chunks, dim=1)


def _spec_augment(
    core: Any,
    states: Tensor,
    counts: Sequence[int],
    mask_time_indices: Tensor | None,
    mask_feature_indices: Tensor | None,
) -> Tensor:
    total = sum(counts)
    if mask_time_indices is not None:
        embedding = getattr(core, "masked_spec_embed", None)
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


def _positions(core: Any, states: Tensor, sequences: PackedSequences, count: int) -> Tensor:
    """Positional convolution of each of the first `count` sequences separately; zeros for the rest."""
    module = core.encoder.pos_conv_embed
    kernel = module.conv.kernel_size[0]
    offsets, lengths = sequences.offsets, sequences.lengths[:count]
    rest = states.shape[1] - offsets[count]
    table = absolute_position_table(core) is not None
    if table or (kernel > MAX_KERNEL_RATIO * max(lengths) and not is_deepspeed_zero3_enabled()):
        parts = [module(states[:, a : a + n]) for a, n in zip(offsets, lengths, strict=False)]
    else:
        gap = states.new_zeros(1, kernel // 2, states.shape[-1])
        row = [part for a, n in zip(offsets, lengths, strict=False) for part in (states[:, a : a + n], gap)]
        convolved = module(torch.cat(row, dim=1))
        shifts = [index * (kernel // 2) for index in range(count)]
        parts = [convolved[:, a + shift : a + shift + n] for a, shift, n in zip(offsets, shifts, lengths, strict=False)]
    return torch.cat([*parts, states.new_zeros(1, rest, states.shape[-1]).to(parts[0])], dim=1)


def _blocks(
    core: Any, states: Tensor, sequences: PackedSequences, hidden_layers: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """Run the blocks. Return the encoder's output and the states after each of `hidden_layers`."""
    encoder, config, kept = core.encoder, core.config, {}
    stable = config.do_stable_layer_norm
    states = encoder.dropout(states if stable else encoder.layer_norm(states))
    mask = AttentionMask(documents=(sequences,))
    lockstep = is_deepspeed_zero3_enabled()  # then every process must run every block
    for index, layer in enumerate(encoder.layers):
        drop = core.training and config.layerdrop > 0 and bool(torch.rand([]) < config.layerdrop)
        if lockstep or not drop:
            out = layer(states, attention_mask=mask)
            states = out[0] if isinstance(out, tuple) else out
        if index in hidden_layers:
            kept[index] = states
    return (encoder.layer_norm(states) if stable else states), [kept[index] for index in hidden_layers]
