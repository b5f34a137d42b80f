"""Plan and collate the batches of a CTC fine-tuning run.

The whole run is planned before it starts, and batch i depends on (seed, i) alone, so a resumed run sees the same
batches. Packed batches concatenate recordings without padding (`models.ctc_encoder.packing`); padded batches hold
recordings of similar length.
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
from mowa.models.ctc_encoder.geometry import FrameGeometry
from mowa.tasks import ctc
from mowa.training.ctc.streaming import ChunkSchedule
from mowa.types import IGNORE_INDEX, Example, Preprocessing, Vocabulary

PAD_MULTIPLE_S = 0.5  # few distinct shapes: CPU kernels are prepared for each
POOL_SIZE = 1024  # recordings sorted by length together: little padding, yet no two epochs share their batches


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """What all batches of a run, or of an evaluation, have in common; `hidden_size` is the net's, for feature masks."""

    vocabulary: Vocabulary
    preprocessing: Preprocessing
    frames: FrameGeometry
    hidden_size: int
    packing: bool
    augment: AugmentConfig | None = None
    spec_augment: SpecAugmentConfig | None = None
    chunks: ChunkSchedule | None = None
    seed: int = 0


def plan_eval_batches(examples: Sequence[Example], max_seconds: float, packing: bool) -> list[list[Example]]:
    """Group every recording once into batches of at most `max_seconds`, including padding."""
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
    """Plan the shuffled batches of a run.

    Args:
        sources: recordings with their share of the seconds; where no source has a share, all are shuffled together.
        max_seconds: seconds per batch at most, including padding; a longer recording is a batch of its own.
        packing: whether batches are packed or padded.
        epochs: passes over the recordings, where `num_batches` is 0.
        num_batches: number of batches; 0: as many as `epochs` passes have.
        multiple_of: with `epochs`, the number of batches is a multiple of this (the batches in a step).
        seed: random seed.
    """
    if not any(share for _, share in sources):
        sources = [([example for examples, _ in sources for example in examples], 1.0)]
    total = epochs * sum(example.duration_s for examples, _ in sources for example in examples)
    rng = np.random.default_rng(seed)
    pools, batches, seconds = sample_pools(sources, rng), list[list[Example]](), 0.0
    while len(batches) < num_batches if num_batches else seconds < total:
        pool = next(pools)
        seconds += sum(example.duration_s for example in pool)
        if packing:
            batches.extend(group_by_total_duration([pool[index] for index in rng.permutation(len(pool))], max_seconds))
        else:
            groups = list(group_by_padded_duration(sorted(pool, key=lambda example: example.duration_s), max_seconds))
            batches.extend(groups[index] for index in rng.permutation(len(groups)))
    if num_batches:
        return batches[:num_batches]
    if seconds > total:  # the last pool exceeds a fractional number of epochs
        batches = batches[: max(1, round(len(batches) * total / seconds))]
    batches.extend(batches[: -len(batches) % multiple_of])
    return batches


def group_by_total_duration(examples: Sequence[Example], max_seconds: float) -> Iterator[list[Example]]:
    """Group consecutive recordings so that their sum is at most `max_seconds`; a longer one is a group of its own."""
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
    """A map-style dataset whose item i is the collated batch i, made from (seed, i) alone."""

    def __init__(self, batches: Sequence[Sequence[Example]], options: BatchOptions) -> None:
        self.batches, self.options = batches, options

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the tensors of one batch of U recordings with F frames in all.

        input_values float32 [1, N] (packed) or [U, N] (padded); lengths int64 [U] in samples; labels int64 [U, L],
        padded with IGNORE_INDEX; batch_index [1]. With SpecAugment, mask_time_indices bool [F] and
        mask_feature_indices bool [U, hidden_size]. With chunks, chunk_frames [1] and lookahead_frames [1].
        """
        options, group = self.options, self.batches[index]
        rng = np.random.default_rng((options.seed, index))
        chunk, lookahead = options.chunks.draw(rng) if options.chunks else (0, 0)
        ids = [ctc.encode_labels(example.text, options.vocabulary) for example in group]
        clips = [
            self._load(example, ctc.min_frames(target), rng, live=chunk > 0)
            for example, target in zip(group, ids, strict=True)
        ]
        batch = {
            "input_values": self._collate(clips),
            "lengths": torch.tensor([len(clip) for clip in clips]),
            "labels": _pad_labels(ids),
            "batch_index": torch.tensor([index]),
        }
        if options.spec_augment is not None:
            counts = [options.frames.num_frames(len(clip)) for clip in clips]
            batch |= _draw_masks(counts, options.hidden_size, options.spec_augment, rng)
        if options.chunks is not None:
            batch |= {"chunk_frames": torch.tensor([chunk]), "lookahead_frames": torch.tensor([lookahead])}
        return batch

    def _load(self, example: Example, min_frames: int, rng: np.random.Generator, *, live: bool) -> np.ndarray:
        options = self.options
        rate_hz = options.preprocessing.rate_hz
        part: Any = {"offset_s": example.offset_s, "duration_s": example.duration_s} if example.is_excerpt else {}
        samples = audio.load_audio(example.audio, rate_hz, **part)
        if options.augment is not None:
            augmented = augment.augment_audio(samples, rng, options.augment, rate_hz=rate_hz)
            if options.frames.num_frames(len(augmented)) >= min_frames:  # sped up, it may be too short for its text
                samples = augmented
        if not options.preprocessing.normalize:
            return samples
        if live and options.chunks is not None:
            return options.chunks.normalize(samples, rng, rate_hz)
        return audio.normalize(samples)

    def _collate(self, clips: Sequence[np.ndarray]) -> torch.Tensor:
        options = self.options
        multiple = int(PAD_MULTIPLE_S * options.preprocessing.rate_hz)
        if options.packing:
            return torch.from_numpy(packing.pack_samples(clips, options.frames, pad_to_multiple_of=multiple))[None]
        labels: list[list[int]] = [[] for _ in clips]
        return ctc.collate(clips, labels, options.preprocessing, pad_to_multiple_of=multiple)["input_values"]


def _pad_labels(ids: Sequence[Sequence[int]]) -> torch.Tensor:
    labels = torch.full((len(ids), max(1, *map(len, ids))), IGNORE_INDEX)
    for row, target in enumerate(ids):
        labels[row, : len(target)] = torch.tensor(target)
    return labels


def _draw_masks(
    counts: Sequence[int], hidden_size: int, config: SpecAugmentConfig, rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    masks = {}
    if config.mask_time_prob:
        times = [augment.sample_span_mask(n, config.mask_time_prob, config.mask_time_length, rng) for n in counts]
        masks["mask_time_indices"] = torch.from_numpy(np.concatenate(times))
    if config.mask_feature_prob:
        features = [
            augment.sample_span_mask(hidden_size, config.mask_feature_prob, config.mask_feature_length, rng)
            for _ in counts
        ]
        masks["mask_feature_indices"] = torch.from_numpy(np.stack(features))
    return masks


class Timed(Protocol):
    @property
    def duration_s(self) -> float: ...


Item = TypeVar("Item", bound=Timed)


def group_by_padded_duration(clips: Sequence[Item], max_seconds: float) -> Iterator[list[Item]]:
    """Group consecutive clips so that count × longest is at most `max_seconds`; a longer clip is a group of its own."""
    group: list[Item] = []
    longest = 0.0
    for clip in clips:
        duration = max(longest, clip.duration_s)
        if group and duration * (len(group) + 1) > max_seconds:
            yield group
            group, duration = [], clip.duration_s
        group.append(clip)
        longest = duration
    if group:
        yield group


def sample_pools(sources: Sequence[tuple[Sequence[Item], float]], rng: np.random.Generator) -> Iterator[list[Item]]:
    """Yield endless pools of up to POOL_SIZE clips, in each of which every source has its share of the seconds."""
    clips_per_s = [share / np.mean([clip.duration_s for clip in clips]) for clips, share in sources]
    if len(sources) == 1:
        (clips, _) = sources[0]
        while True:
            shuffled = [clips[index] for index in rng.permutation(len(clips))]
            yield from (shuffled[start : start + POOL_SIZE] for start in range(0, len(shuffled), POOL_SIZE))
    endless = [_shuffle_forever(clips, rng) for clips, _ in sources]
    while True:
        counts = [max(1, round(POOL_SIZE * rate / sum(clips_per_s))) for rate in clips_per_s]
        yield [next(clips) for clips, count in zip(endless, counts, strict=True) for _ in range(count)]


def _shuffle_forever(clips: Sequence[Item], rng: np.random.Generator) -> Iterator[Item]:
    while True:
        for index in rng.permutation(len(clips)):
            yield clips[index]
