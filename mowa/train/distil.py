"""One step's loss: letters (CTC), what a teacher hears, or both. No transcript is needed for hearing.

    loss = letters · CTC + front · d(z, z′) + ear · mean over the chosen blocks of d(h, h′)
    d(a, b) = mean over frames and features of ((a − b) / s)²,   s: the teacher's standard deviation, per feature

z is the projected front-end (before positions), h the features after a block; primes are the teacher's. Whisper's
features carry the absolute position of a frame; a wav2vec2 net has none to give. So the teacher hears every batch from
a position drawn anew, and the mean feature of each position, over many recordings, is taken away from its features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mowa.errors import RecipeError
from mowa.tasks import ctc
from mowa.train.transplant import FRAME, LEVEL, LOUDEST, Ear

WINDOWS = 48  # of 30 s each: what the means and deviations of the teacher's features are taken over


@dataclass(frozen=True, slots=True)
class Weights:
    """What a stage's loss is made of."""

    letters: float = 1.0
    front: float = 0.0
    ear: float = 0.0


class Teacher:
    """An `Ear` that gives features a net without positions can be held to."""

    def __init__(self, ear: Ear, net: nn.Module) -> None:
        self.ear, self.config = ear, net.config
        shift = centre(net.config)
        self.samples, self.frames = shift % FRAME, shift // FRAME
        self.means: tuple[Tensor, ...] = ()
        self.scales: tuple[Tensor, ...] = ()

    @torch.no_grad()
    def listen(self, values: Tensor, mask: Tensor | None, *, start: int = 0, deep: bool = True) -> tuple[Tensor, ...]:
        """Normalised samples [B, N] → [B, T, width]: frames below the blocks, and if `deep` the features after each.

        Frame t is heard where frame t of the net is centred; mask [B, N] is 1 where there is sound.
        """
        mel = self.ear.mel(values[:, self.samples :] * LEVEL, LOUDEST)
        low = self.ear.front(mel)
        heard = None
        if mask is not None:
            lengths = (mask.sum(1) - self.samples).clamp(min=1).div(FRAME, rounding_mode="floor")
            heard = torch.arange(low.shape[1], device=low.device) < lengths[:, None]
        features = self.ear.hear(low, heard, start=start) if deep else ()
        return tuple(part[:, self.frames :].float() for part in (low, *features))

    def survey(self, recordings: Iterable[np.ndarray]) -> None:
        """Measure, over full windows of joined recordings, each position's mean and each feature's deviation."""
        sums: list[Tensor] = []
        squares: list[Tensor] = []
        count = 0
        for window in _windows(recordings, self.ear.longest * FRAME, WINDOWS):
            low = self.ear.front(self.ear.mel(torch.from_numpy(window)[None] * LEVEL, LOUDEST))
            states = [state[0].float() for state in (low, *self.ear.hear(low))]
            powers = [state.square().mean(0) for state in states]
            sums = [a + b for a, b in zip(sums, states, strict=True)] if count else states
            squares = [a + b for a, b in zip(squares, powers, strict=True)] if count else powers
            count += 1
        means = [total / count for total in sums]
        means[0] = means[0].new_zeros(means[0].shape)  # positions are added only above it
        self.means = tuple(means)
        deviations = [
            (square / count - mean.square().mean(0)).clamp(min=0).sqrt()
            for square, mean in zip(squares, self.means, strict=True)
        ]
        self.scales = tuple(deviation + 0.1 * deviation.mean() for deviation in deviations)

    def targets(self, values: Tensor, mask: Tensor, *, start: int, deep: bool) -> list[Tensor]:
        """`listen`, position by position freed of what is due to the position alone."""
        states = self.listen(values, mask, start=start, deep=deep)
        first = start + self.frames
        pairs = zip(states, self.means, strict=False)  # the lowest only, where it is not deep
        return [state - mean[first : first + state.shape[1]] for state, mean in pairs]


class Lesson(nn.Module):
    """What the Trainer trains: the net, with the loss of a stage. While letters are learnt, only they are evaluated."""

    def __init__(self, net: nn.Module, weights: Weights, teacher: Teacher | None = None) -> None:
        super().__init__()
        self.net, self.weights = net, weights
        self._teacher = (teacher,)  # in a tuple: no part of the checkpoint

    @property
    def taught(self) -> bool:
        return self._teacher[0] is not None

    def forward(self, input_values: Tensor, attention_mask: Tensor, labels: Tensor, ear: Tensor) -> dict[str, Tensor]:
        """Batch [B, N] → loss [], logits [B, T, V]; `ear` [B]: the clips on which the teacher is listened to."""
        net: Any = self.net
        (teacher,) = self._teacher
        weigh = self.weights
        if not (weigh.letters or weigh.ear):
            normed = net.wav2vec2.feature_extractor(input_values).transpose(1, 2)
            states: tuple[Any, ...] = (net.wav2vec2.feature_projection(normed)[0],)
            logits = states[0].new_zeros(len(states[0]), 1, 2)
        else:
            out = net.wav2vec2(input_values, attention_mask=attention_mask, output_hidden_states=True)
            low = net.wav2vec2.feature_projection.projection(out.extract_features) if weigh.front else None
            states = (low, *out.hidden_states[1 : len(net.wav2vec2.encoder.layers)], out.last_hidden_state)
            logits = net.lm_head(net.dropout(out.last_hidden_state))
        loss = logits.new_zeros((), dtype=torch.float32)
        if weigh.letters:
            frames = net._get_feat_extract_output_lengths(attention_mask.sum(-1))
            loss = loss + weigh.letters * ctc.loss(logits, frames, labels, net.config.pad_token_id)
        if teacher is not None and ear.any() and (self.training or not weigh.letters):
            loss = loss + self._apart(teacher, states, input_values[ear], attention_mask[ear], ear)
        return {"loss": loss, "logits": logits}

    def _apart(self, teacher: Teacher, states: tuple[Any, ...], values: Tensor, mask: Tensor, ear: Tensor) -> Tensor:
        """Front and ear terms over true frames; the last block counts three times."""
        weigh, deepest = self.weights, len(states) - 1
        shares = {depth: 1.0 for depth in range(1, deepest)} | {deepest: 3.0}
        weights = {depth: weigh.ear * share / sum(shares.values()) for depth, share in shares.items()}
        weights[0] = weigh.front
        room = teacher.ear.longest - values.shape[1] // FRAME
        start = int(torch.randint(max(1, room), ())) if self.training else 0
        targets = teacher.targets(values, mask, start=start, deep=deepest > 0)
        count = min(targets[0].shape[1], max(state.shape[1] for state in states if state is not None))
        lengths = mask.sum(1) // FRAME - 1 - teacher.frames
        true = (torch.arange(count, device=values.device) < lengths[:, None]).float()[..., None]
        total = values.new_zeros(())
        for depth, weight in weights.items():
            if weight and depth < len(states):
                wrong = (
                    (states[depth][ear][:, :count].float() - targets[depth][:, :count]) / teacher.scales[depth]
                ).square()
                total = total + weight * (wrong * true).sum() / (true.sum() * wrong.shape[-1]).clamp(min=1)
        return total


def centre(config: Any) -> int:
    """The sample in the middle of a net's first frame. RecipeError where its frames are not the teacher's in length."""
    reach, stride = 1, 1
    for kernel, step in zip(config.conv_kernel, config.conv_stride, strict=True):
        reach, stride = reach + (kernel - 1) * stride, stride * step
    if stride != FRAME:
        raise RecipeError(f"net: conv_stride makes a frame of {stride} samples, the teacher's has {FRAME}")
    return reach // 2


def _windows(recordings: Iterable[np.ndarray], length: int, count: int) -> Iterator[np.ndarray]:
    """`count` windows of `length` samples, made of whole recordings one after another."""
    parts: list[np.ndarray] = []
    for recording in recordings:
        parts.append(recording)
        if sum(map(len, parts)) >= length:
            yield np.concatenate(parts)[:length].astype(np.float32)
            parts, count = [], count - 1
            if not count:
                return
