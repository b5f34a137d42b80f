"""Loss of one training step: CTC, distillation of a Whisper teacher's encoder features, or both.

    loss = ctc · CTC + front_end · d(z, z′) + features · mean over the chosen blocks of d(h, h′)
    d(a, b) = mean over frames and channels of ((a − b) / s)²,   s: standard deviation of the teacher's channel

z is the projected front end (before positions), h the output of a block; primes are the teacher's. Distillation needs
no transcripts. The net has the teacher's positions (`write_positions`), so its features start close to the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mowa.errors import RecipeError
from mowa.models.ctc_encoder.chunk_mask import ChunkConfig, apply_chunk_mask
from mowa.models.ctc_encoder.geometry import frame_geometry
from mowa.tasks import ctc
from projects.pl_tiny.whisper_encoder import FRAME_SAMPLES, INPUT_RMS, LOG_MEL_MAX, WhisperEncoder
from projects.pl_tiny.write_positions import SHIFT


@dataclass(frozen=True, slots=True)
class LossWeights:
    """Weights of the three loss terms."""

    ctc: float = 1.0
    front_end: float = 0.0
    features: float = 0.0


class Teacher:
    """A Whisper encoder whose features are aligned with the frames of a net.

    `feature_std`: standard deviations from `measure_feature_std`, of the front end and of each block.
    """

    def __init__(self, encoder: WhisperEncoder, config: Any, feature_std: Sequence[Tensor]) -> None:
        self.encoder = encoder
        offset = first_frame_center(config)
        self.sample_offset, self.frame_offset = offset % FRAME_SAMPLES, offset // FRAME_SAMPLES
        # below the blocks one channel in each group of the positional convolution carries the positions
        width, groups = encoder.hidden_size, config.num_conv_pos_embedding_groups
        reserved = torch.arange(width) % (width // groups) == 0
        lowest, *others = feature_std
        lowest = (lowest + 0.1 * lowest[~reserved].mean()).masked_fill(reserved, torch.inf)
        self.scales = [lowest, *(std + 0.1 * std.mean() for std in others)]

    @torch.no_grad()
    def extract(self, values: Tensor, mask: Tensor | None, *, with_blocks: bool = True) -> tuple[Tensor, ...]:
        """Return features [B, T, D] for normalized samples [B, N]: the front end's and, if asked for, each block's.

        Frame t is centered where frame t of the net is. `mask` [B, N] is 1 for samples and 0 for padding.
        """
        mel = self.encoder.log_mel(values[:, self.sample_offset :] * INPUT_RMS, LOG_MEL_MAX)
        low = self.encoder.embed(mel)
        frame_mask = None
        if mask is not None:
            lengths = (mask.sum(1) - self.sample_offset).clamp(min=1).div(FRAME_SAMPLES, rounding_mode="floor")
            frame_mask = torch.arange(low.shape[1], device=low.device) < lengths[:, None]
        blocks = self.encoder.encode(low, frame_mask) if with_blocks else ()
        return tuple(part[:, self.frame_offset :].float() for part in (low, *blocks))

    @torch.no_grad()
    def extract_above(self, depth: int, state: Tensor, mask: Tensor) -> dict[int, Tensor]:
        """Return the features of the teacher's blocks above `depth`, float32 [B, T, D] by depth.

        They are the teacher's only if the net's blocks up to `depth` equal the teacher's.

        Args:
            state: output of block `depth`, [B, T, D].
            mask: [B, N], 1 for samples and 0 for padding.
        """
        lengths = (mask.sum(1) // FRAME_SAMPLES - self.frame_offset).clamp(min=1)
        frame_mask = torch.arange(state.shape[1], device=state.device) < lengths[:, None]
        above = self.encoder.encode_from(depth, state, frame_mask)
        return {number: features.float() for number, features in enumerate(above, depth + 1)}


@torch.no_grad()
def measure_feature_std(encoder: WhisperEncoder, recordings: Sequence[np.ndarray]) -> list[Tensor]:
    """Return the feature standard deviations [D] over normalized recordings, of the front end and of each block."""
    sums: list[Tensor] = []
    squares: list[Tensor] = []
    for recording in recordings:
        low = encoder.embed(encoder.log_mel(torch.from_numpy(recording)[None] * INPUT_RMS, LOG_MEL_MAX))
        states = [state[0].double() for state in (low, *encoder.encode(low))]
        means, powers = [state.mean(0) for state in states], [state.square().mean(0) for state in states]
        sums = [a + b for a, b in zip(sums, means, strict=True)] if sums else means
        squares = [a + b for a, b in zip(squares, powers, strict=True)] if squares else powers
    count = len(recordings)
    return [
        (square / count - (total / count).square()).clamp(min=0).sqrt().float()
        for total, square in zip(sums, squares, strict=True)
    ]


class FeatureDistillationModule(nn.Module):
    """The module the Trainer trains: the net and the loss of a stage. Evaluation has the CTC term alone, if it is used.

    `left_context`: frames before a chunk that are attended to, for batches in chunks; None: all. `frozen_blocks`: lower
    blocks that still are the teacher's; its features are computed from their output, which saves running it whole.
    """

    def __init__(
        self,
        net: nn.Module,
        weights: LossWeights,
        teacher: Teacher | None = None,
        left_context: int | None = None,
        frozen_blocks: int = 0,
    ) -> None:
        super().__init__()
        self.net, self.weights, self.left_context, self.frozen_blocks = net, weights, left_context, frozen_blocks
        self._teacher = (teacher,)  # a tuple, so that it is no part of the checkpoint

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        use_features: Tensor,
        chunk_frames: Tensor | None = None,
        lookahead_frames: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return loss [] and logits [B, T, V] of a batch [B, N].

        `use_features` bool [B]: clips with distillation terms. `chunk_frames` []: frames of a chunk, 0 for none;
        `lookahead_frames` []: frames after it.
        """
        net: Any = self.net
        (teacher,) = self._teacher
        weights = self.weights
        if not (weights.ctc or weights.features):
            frames = net.wav2vec2.feature_extractor(input_values).transpose(1, 2)
            states: tuple[Any, ...] = (net.wav2vec2.feature_projection(frames)[0],)
            logits = states[0].new_zeros(len(states[0]), 1, 2)
        else:
            size = 0 if chunk_frames is None else int(chunk_frames)
            lookahead = 0 if lookahead_frames is None else int(lookahead_frames)
            with apply_chunk_mask(
                net, ChunkConfig(size, self.left_context, lookahead) if size else None
            ) as main_frames:
                out = net.base_model(input_values, attention_mask=attention_mask, output_hidden_states=True)
                inner = tuple(map(main_frames, out.hidden_states[1 : len(net.wav2vec2.encoder.layers)]))
            low = net.wav2vec2.feature_projection.projection(out.extract_features) if weights.front_end else None
            states = (low, *inner, out.last_hidden_state)
            logits = net.lm_head(net.dropout(out.last_hidden_state))
        loss = logits.new_zeros((), dtype=torch.float32)
        if weights.ctc:
            lengths = net._get_feat_extract_output_lengths(attention_mask.sum(-1))
            loss = loss + weights.ctc * ctc.mean_ctc_loss(logits, lengths, labels, net.config.pad_token_id)
        if teacher is not None and use_features.any() and (self.training or not weights.ctc):
            values, mask = input_values[use_features], attention_mask[use_features]
            loss = loss + self._feature_loss(teacher, states, values, mask, use_features)
        return {"loss": loss, "logits": logits}

    def _feature_loss(
        self, teacher: Teacher, states: tuple[Any, ...], values: Tensor, mask: Tensor, selected: Tensor
    ) -> Tensor:
        """Return the front-end and feature terms over unpadded frames; the last block counts three times."""
        last = len(states) - 1
        shares = {depth: 1.0 for depth in range(self.frozen_blocks + 1, last)} | {last: 3.0}
        weights = {depth: self.weights.features * share / sum(shares.values()) for depth, share in shares.items()}
        weights[0] = self.weights.front_end
        if self.frozen_blocks:
            targets = teacher.extract_above(self.frozen_blocks, states[self.frozen_blocks][selected], mask)
        else:
            targets = dict(enumerate(teacher.extract(values, mask, with_blocks=last > 0)))
            targets[0] = targets[0] - SHIFT
        count = min(targets[last].shape[1], states[last].shape[1])
        lengths = mask.sum(1) // FRAME_SAMPLES - 1 - teacher.frame_offset
        valid = (torch.arange(count, device=values.device) < lengths[:, None]).float()[..., None]
        total = values.new_zeros(())
        for depth, weight in weights.items():
            if weight and depth < len(states):
                difference = states[depth][selected][:, :count].float() - targets[depth][:, :count]
                squared = (difference / teacher.scales[depth]).square()
                total = total + weight * (squared * valid).sum() / (valid.sum() * squared.shape[-1]).clamp(min=1)
        return total


def first_frame_center(config: Any) -> int:
    """Return the sample at the center of a net's first frame. Raise RecipeError if its stride is not the teacher's."""
    geometry = frame_geometry(config)
    if geometry.hop != FRAME_SAMPLES:
        raise RecipeError(
            f"model_config: conv_stride gives frames of {geometry.hop} samples, the teacher's have {FRAME_SAMPLES}"
        )
    return geometry.receptive_field // 2
