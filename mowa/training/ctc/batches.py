"""Recordings → the batches of a fine-tuning run, planned before it starts: batch i is the same whenever it is made.

Packed batches are rows without padding (`tasks.packing`), padded ones are rows of recordings of like length. What a
batch is for is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from mowa.data import audio
from mowa.data.audio import augment
from mowa.data.audio.augment import AugmentConfig, SpecAugmentConfig
from mowa.models.ctc_encoder import packing
from mowa.models.ctc_encoder.packing import FrameGeometry
from mowa.tasks import ctc
from mowa.types import IGNORE_INDEX, Example, Preprocessing, Vocabulary

PAD_MULTIPLE_S = 0.5


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """What every batch of a run has in common. `width` is the net's, for masks."""

    vocabulary: Vocabulary
    preprocessing: Preprocessing
    frames: FrameGeometry
    hidden_size: int
    packing: bool
    augment: AugmentConfig | None = None  # None: as recorded
    spec_augment: SpecAugmentConfig | None = None
    seed: int = 0


def plan_eval_batches(examples: Sequence[Example], max_seconds: float, packing: bool) -> list[list[Example]]:
    """Every recording once, in batches of at most `seconds` (padding counted, where there is any)."""
    ordered = sorted(examples, key=lambda example: example.duration_s)
    return list(
        group_by_total_duration(ordered, max_seconds) if packing else group_by_padded_duration(ordered, max_seconds)
    )


def plan_batches(
    sources: Sequence[tuple[Sequence[Example], float]],
    *,
    max_seconds: float,
    packing: bool,
    epochs: float,
    num_batches: int,
    multiple_of: int,
    seed: int,
) -> list[list[Example]]:
    """Shuffled batches of at most `seconds`: `count` of them, or if that is 0 as many as make `epochs` passes.

    Their number is a multiple of `multiple` (batches in a step). `parts` are recordings and their shares of the
    seconds; where no share is given, they are shuffled together.
    """
    if not any(share for _, share in sources):
        sources = [([example for examples, _ in sources for example in examples], 1.0)]
    total = epochs * sum(example.duration_s for examples, _ in sources for example in examples)
    rng = np.random.default_rng(seed)
    drawn, batches, heard = sample_pools(sources, rng), list[list[Example]](), 0.0
    while len(batches) < num_batches if num_batches else heard < total:
        pool = next(drawn)
        heard += sum(example.duration_s for example in pool)
        if packing:
            batches.extend(group_by_total_duration([pool[index] for index in rng.permutation(len(pool))], max_seconds))
        else:
            filled = list(group_by_padded_duration(sorted(pool, key=lambda example: example.duration_s), max_seconds))
            batches.extend(filled[index] for index in rng.permutation(len(filled)))
    if not num_batches:
        if heard > total:  # the last pool goes beyond a broken number of epochs
            batches = batches[: max(1, round(len(batches) * total / heard))]
        batches.extend(batches[: -len(batches) % multiple_of])
        return batches
    return batches[:num_batches]


def group_by_total_duration(examples: Sequence[Example], max_seconds: float) -> Iterator[list[Example]]:
    """Consecutive recordings grouped so that their sum stays within `seconds` (a longer one stands alone)."""
    group: list[Example] = []
    total = 0.0
    for example in examples:
        if group and total + example.duration_s > max_seconds:
            yield group
            group, total = [], 0.0
        group.append(example)
        total += example.duration_s
    if group:
        yield group


class BatchDataset(Dataset[dict[str, Any]]):
    """One item = one ready batch. Batch i is made from (seed, i) alone."""

    def __init__(self, batches: Sequence[Sequence[Example]], options: BatchOptions) -> None:
        self.batches, self.options = batches, options

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """→ tensors of one batch of U recordings; F is the sum of their frames.

        input_values [1, N] (packed) or [U, N] (padded); lengths [U] in samples; labels [U, L]; index [1]; in training
        hidden bool [F] and silenced bool [U, width], what SpecAugment takes away.
        """
        how, group = self.options, self.batches[index]
        rng = np.random.default_rng((how.seed, index))
        ids = [ctc.encode_labels(example.text, how.vocabulary) for example in group]
        sounds = [self._sound(example, ctc.min_frames(target), rng) for example, target in zip(group, ids, strict=True)]
        batch = {
            "input_values": self._laid(sounds),
            "lengths": torch.tensor([len(sound) for sound in sounds]),
            "labels": _labels(ids),
            "index": torch.tensor([index]),
        }
        if how.spec_augment is not None:
            counts = [how.frames.num_frames(len(sound)) for sound in sounds]
            batch |= _draw_masks(counts, how.hidden_size, how.spec_augment, rng)
        return batch

    def _sound(self, example: Example, frames: int, rng: np.random.Generator) -> np.ndarray:
        how = self.options
        samples = audio.load_audio(example.audio, how.preprocessing.rate_hz)
        if how.augment is not None:
            rough = augment.augment_audio(samples, rng, how.augment)
            samples = (
                rough if how.frames.num_frames(len(rough)) >= frames else samples
            )  # played faster, it may be too short
        return audio.normalize(samples) if how.preprocessing.normalize else samples

    def _laid(self, sounds: Sequence[np.ndarray]) -> torch.Tensor:
        how = self.options
        grid = int(PAD_MULTIPLE_S * how.preprocessing.rate_hz)
        if how.packing:
            return torch.from_numpy(packing.pack_samples(sounds, how.frames, pad_to_multiple_of=grid))[None]
        return ctc.collate(sounds, [[] for _ in sounds], how.preprocessing, pad_to_multiple_of=grid)["input_values"]


def _labels(ids: Sequence[Sequence[int]]) -> torch.Tensor:
    labels = torch.full((len(ids), max(1, *map(len, ids))), IGNORE_INDEX)
    for row, target in enumerate(ids):
        labels[row, : len(target)] = torch.tensor(target)
    return labels


def _draw_masks(
    counts: Sequence[int], width: int, how: SpecAugmentConfig, rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    out = {}
    if how.mask_time_prob:
        hidden = [augment.sample_span_mask(count, how.mask_time_prob, how.mask_time_length, rng) for count in counts]
        out["hidden"] = torch.from_numpy(np.concatenate(hidden))
    if how.mask_feature_prob:
        silenced = [
            augment.sample_span_mask(width, how.mask_feature_prob, how.mask_feature_length, rng) for _ in counts
        ]
        out["silenced"] = torch.from_numpy(np.stack(silenced))
    return out


POOL_SIZE = 1024  # clips sorted by length together: little padding, yet no two epochs share their batches


class Timed(Protocol):
    @property
    def duration_s(self) -> float: ...


Item = TypeVar("Item", bound=Timed)


def group_by_padded_duration(clips: Sequence[Item], budget_s: float) -> Iterator[list[Item]]:
    """Consecutive clips grouped so that count × longest stays within the budget (a longer clip stands alone)."""
    group: list[Item] = []
    longest = 0.0
    for clip in clips:
        widened = max(longest, clip.duration_s)
        if group and widened * (len(group) + 1) > budget_s:
            yield group
            group, widened = [], clip.duration_s
        group.append(clip)
        longest = widened
    if group:
        yield group


def sample_pools(sources: Sequence[tuple[Sequence[Item], float]], rng: np.random.Generator) -> Iterator[list[Item]]:
    """Endless pools of up to POOL_SIZE clips, in each of which every source has its share of the seconds."""
    clips_per_s = [share / np.mean([clip.duration_s for clip in clips]) for clips, share in sources]
    if len(sources) == 1:
        (clips, _) = sources[0]
        while True:
            shuffled = [clips[index] for index in rng.permutation(len(clips))]
            yield from (shuffled[start : start + POOL_SIZE] for start in range(0, len(shuffled), POOL_SIZE))
    endless = [_shuffled_for_ever(clips, rng) for clips, _ in sources]
    while True:
        parts = [max(1, round(POOL_SIZE * pace / sum(clips_per_s))) for pace in clips_per_s]
        yield [next(clips) for clips, part in zip(endless, parts, strict=True) for _ in range(part)]


def _shuffled_for_ever(clips: Sequence[Item], rng: np.random.Generator) -> Iterator[Item]:
    while True:
        for index in rng.permutation(len(clips)):
            yield clips[index]
