"""One step's loss: letters (CTC), what a teacher hears, or both. No transcript is needed for hearing.

    loss = letters · CTC + front · d(z, z′) + ear · mean over the chosen blocks of d(h, h′)
    d(a, b) = mean over frames and features of ((a − b) / s)²,   s: a feature's standard deviation, the teacher's

z is the projected front-end (before positions), h the features after a block; primes are the teacher's. The
net has the teacher's positions (`positions`), so its features are the teacher's own to begin with, and stay near them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mowa.errors import RecipeError
from mowa.models.ctc_encoder.chunk_mask import ChunkConfig, apply_chunk_mask, receptive_field
from mowa.tasks import ctc
from projects.pl_tiny import write_positions
from projects.pl_tiny.transplant import FRAME, LEVEL, LOUDEST, Ear


@dataclass(frozen=True, slots=True)
class Weights:
    """What a stage's loss is made of."""

    letters: float = 1.0
    front: float = 0.0
    ear: float = 0.0


class Teacher:
    """An `Ear` heard where the net's frames lie. `scales` are the deviations that `survey` gives."""

    def __init__(self, ear: Ear, config: Any, scales: Sequence[Tensor]) -> None:
        self.ear = ear
        shift = centre(config)
        self.samples, self.frames = shift % FRAME, shift // FRAME
        # below the blocks one channel of each group of the positional convolution is spent on positions
        spent = torch.arange(ear.width) % (ear.width // config.num_conv_pos_embedding_groups) == 0
        lowest, *others = scales
        lowest = (lowest + 0.1 * lowest[~spent].mean()).masked_fill(spent, torch.inf)
        self.scales = [lowest, *(scale + 0.1 * scale.mean() for scale in others)]

    @torch.no_grad()
    def listen(self, values: Tensor, mask: Tensor | None, *, deep: bool = True) -> tuple[Tensor, ...]:
        """Normalised samples [B, N] → [B, T, width]: frames below the blocks, and if `deep` the features after each.

        Frame t is heard where frame t of the net is centred; mask [B, N] is 1 where there is sound.
        """
        mel = self.ear.mel(values[:, self.samples :] * LEVEL, LOUDEST)
        low = self.ear.front(mel)
        heard = None
        if mask is not None:
            lengths = (mask.sum(1) - self.samples).clamp(min=1).div(FRAME, rounding_mode="floor")
            heard = torch.arange(low.shape[1], device=low.device) < lengths[:, None]
        features = self.ear.hear(low, heard) if deep else ()
        return tuple(part[:, self.frames :].float() for part in (low, *features))


@torch.no_grad()
def survey(ear: Ear, recordings: Sequence[np.ndarray]) -> list[Tensor]:
    """The standard deviations [width] of the teacher's features over normalised recordings, lowest first."""
    sums: list[Tensor] = []
    squares: list[Tensor] = []
    for recording in recordings:
        low = ear.front(ear.mel(torch.from_numpy(recording)[None] * LEVEL, LOUDEST))
        states = [state[0].double() for state in (low, *ear.hear(low))]
        means, powers = [state.mean(0) for state in states], [state.square().mean(0) for state in states]
        sums = [a + b for a, b in zip(sums, means, strict=True)] if sums else means
        squares = [a + b for a, b in zip(squares, powers, strict=True)] if squares else powers
    count = len(recordings)
    return [
        (square / count - (total / count).square()).clamp(min=0).sqrt().float()
        for total, square in zip(sums, squares, strict=True)
    ]


class Lesson(nn.Module):
    """What the Trainer trains: the net, with the loss of a stage. While letters are learnt, only they are evaluated.

    `left` is how many frames before a chunk are seen, where batches come in chunks; None: all.
    """

    def __init__(
        self, net: nn.Module, weights: Weights, teacher: Teacher | None = None, left: int | None = None
    ) -> None:
        super().__init__()
        self.net, self.weights, self.left = net, weights, left
        self._teacher = (teacher,)  # in a tuple: no part of the checkpoint

    @property
    def taught(self) -> bool:
        return self._teacher[0] is not None

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        ear: Tensor,
        chunk: Tensor | None = None,
        ahead: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Batch [B, N] → loss [], logits [B, T, V]; `ear` [B]: the clips on which the teacher is listened to.

        `chunk` []: of so many frames is a chunk, 0 for none; `ahead` []: so many are heard after it.
        """
        net: Any = self.net
        (teacher,) = self._teacher
        weigh = self.weights
        if not (weigh.letters or weigh.ear):
            normed = net.wav2vec2.feature_extractor(input_values).transpose(1, 2)
            states: tuple[Any, ...] = (net.wav2vec2.feature_projection(normed)[0],)
            logits = states[0].new_zeros(len(states[0]), 1, 2)
        else:
            size = 0 if chunk is None else int(chunk)
            how = ChunkConfig(size, self.left, 0 if ahead is None else int(ahead)) if size else None
            with apply_chunk_mask(net, how) as alone:
                out = net.base_model(input_values, attention_mask=attention_mask, output_hidden_states=True)
                inner = tuple(map(alone, out.hidden_states[1 : len(net.wav2vec2.encoder.layers)]))
            low = net.wav2vec2.feature_projection.projection(out.extract_features) if weigh.front else None
            states = (low, *inner, out.last_hidden_state)
            logits = net.lm_head(net.dropout(out.last_hidden_state))
        loss = logits.new_zeros((), dtype=torch.float32)
        if weigh.letters:
            frames = net._get_feat_extract_output_lengths(attention_mask.sum(-1))
            loss = loss + weigh.letters * ctc.mean_ctc_loss(logits, frames, labels, net.config.pad_token_id)
        if teacher is not None and ear.any() and (self.training or not weigh.letters):
            loss = loss + self._apart(teacher, states, input_values[ear], attention_mask[ear], ear)
        return {"loss": loss, "logits": logits}

    def _apart(self, teacher: Teacher, states: tuple[Any, ...], values: Tensor, mask: Tensor, ear: Tensor) -> Tensor:
        """Front and ear terms over true frames; the last block counts three times."""
        weigh, deepest = self.weights, len(states) - 1
        shares = {depth: 1.0 for depth in range(1, deepest)} | {deepest: 3.0}
        weights = {depth: weigh.ear * share / sum(shares.values()) for depth, share in shares.items()}
        weights[0] = weigh.front
        targets = list(teacher.listen(values, mask, deep=deepest > 0))
        targets[0] = targets[0] - write_positions.LOWERED
        count = min(targets[0].shape[1], max(state.shape[1] for state in states if state is not None))
        lengths = mask.sum(1) // FRAME - 1 - teacher.frames
        true = (torch.arange(count, device=values.device) < lengths[:, None]).float()[..., None]
        total = values.new_zeros(())
        for depth, weight in weights.items():
            if weight and depth < len(states):
                apart = states[depth][ear][:, :count].float() - targets[depth][:, :count]
                wrong = (apart / teacher.scales[depth]).square()
                total = total + weight * (wrong * true).sum() / (true.sum() * wrong.shape[-1]).clamp(min=1)
        return total


def centre(config: Any) -> int:
    """The sample in the middle of a net's first frame. RecipeError where its frames are not the teacher's in length."""
    stride = math.prod(config.conv_stride)
    if stride != FRAME:
        raise RecipeError(f"net: conv_stride makes a frame of {stride} samples, the teacher's has {FRAME}")
    return receptive_field(config) // 2
