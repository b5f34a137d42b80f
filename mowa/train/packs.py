"""Recordings → the batches of a fine-tuning run, planned before it starts: batch i is the same whenever it is made.

Packed batches are rows without padding (`tasks.packing`), padded ones are rows of recordings of like length. What a
batch is for is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from mowa.data import audio, augment
from mowa.data.augment import Masks, Roughness
from mowa.nouns import IGNORED, Example, Preprocessing, Vocabulary
from mowa.tasks import ctc, packing
from mowa.tasks.packing import Frames
from mowa.train.batches import fill, pools

GRID_S = 0.5


@dataclass(frozen=True, slots=True)
class Batching:
    """What every batch of a run has in common. `width` is the net's, for masks."""

    vocabulary: Vocabulary
    preprocessing: Preprocessing
    frames: Frames
    width: int
    layout: str
    rough: Roughness | None = None  # None: as recorded
    masks: Masks | None = None
    seed: int = 0


def one_pass(examples: Sequence[Example], seconds: float, layout: str) -> list[list[Example]]:
    """Every recording once, in batches of at most `seconds` (padding counted, where there is any)."""
    ordered = sorted(examples, key=lambda example: example.duration_s)
    return list(end_to_end(ordered, seconds) if layout == "packed" else fill(ordered, seconds))


def plan(
    parts: Sequence[tuple[Sequence[Example], float]],
    *,
    seconds: float,
    layout: str,
    epochs: float,
    count: int,
    multiple: int,
    seed: int,
) -> list[list[Example]]:
    """Shuffled batches of at most `seconds`: `count` of them, or if that is 0 as many as make `epochs` passes.

    Their number is a multiple of `multiple` (batches in a step). `parts` are recordings and their shares of the
    seconds; where no share is given, they are shuffled together.
    """
    if not any(share for _, share in parts):
        parts = [([example for examples, _ in parts for example in examples], 1.0)]
    total = epochs * sum(example.duration_s for examples, _ in parts for example in examples)
    rng = np.random.default_rng(seed)
    drawn, batches, heard = pools(parts, rng), list[list[Example]](), 0.0
    while len(batches) < count if count else heard < total:
        pool = next(drawn)
        heard += sum(example.duration_s for example in pool)
        if layout == "packed":
            batches.extend(end_to_end([pool[index] for index in rng.permutation(len(pool))], seconds))
        else:
            filled = list(fill(sorted(pool, key=lambda example: example.duration_s), seconds))
            batches.extend(filled[index] for index in rng.permutation(len(filled)))
    if not count:
        if heard > total:  # the last pool goes beyond a broken number of epochs
            batches = batches[: max(1, round(len(batches) * total / heard))]
        batches.extend(batches[: -len(batches) % multiple])
        return batches
    return batches[:count]


def end_to_end(examples: Sequence[Example], seconds: float) -> Iterator[list[Example]]:
    """Consecutive recordings grouped so that their sum stays within `seconds` (a longer one stands alone)."""
    group: list[Example] = []
    total = 0.0
    for example in examples:
        if group and total + example.duration_s > seconds:
            yield group
            group, total = [], 0.0
        group.append(example)
        total += example.duration_s
    if group:
        yield group


class Packs(Dataset[dict[str, Any]]):
    """One item = one ready batch. Batch i is made from (seed, i) alone."""

    def __init__(self, batches: Sequence[Sequence[Example]], how: Batching) -> None:
        self.batches, self.how = batches, how

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """→ tensors of one batch of U recordings; F is the sum of their frames.

        input_values [1, N] (packed) or [U, N] (padded); lengths [U] in samples; labels [U, L]; index [1]; in training
        hidden bool [F] and silenced bool [U, width], what SpecAugment takes away.
        """
        how, group = self.how, self.batches[index]
        rng = np.random.default_rng((how.seed, index))
        ids = [ctc.labels(example.text, how.vocabulary) for example in group]
        sounds = [self._sound(example, ctc.needed(target), rng) for example, target in zip(group, ids, strict=True)]
        batch = {
            "input_values": self._laid(sounds),
            "lengths": torch.tensor([len(sound) for sound in sounds]),
            "labels": _labels(ids),
            "index": torch.tensor([index]),
        }
        if how.masks is not None:
            counts = [how.frames.count(len(sound)) for sound in sounds]
            batch |= _masks(counts, how.width, how.masks, rng)
        return batch

    def _sound(self, example: Example, frames: int, rng: np.random.Generator) -> np.ndarray:
        how = self.how
        samples = audio.load(example.audio, how.preprocessing.rate_hz)
        if how.rough is not None:
            rough = augment.roughen(samples, rng, how.rough)
            samples = rough if how.frames.count(len(rough)) >= frames else samples  # played faster, it may be too short
        return audio.normalize(samples) if how.preprocessing.normalize else samples

    def _laid(self, sounds: Sequence[np.ndarray]) -> torch.Tensor:
        how = self.how
        grid = int(GRID_S * how.preprocessing.rate_hz)
        if how.layout == "packed":
            return torch.from_numpy(packing.lay(sounds, how.frames, grid=grid))[None]
        return ctc.collate(sounds, [[] for _ in sounds], how.preprocessing, grid=grid)["input_values"]


def _labels(ids: Sequence[Sequence[int]]) -> torch.Tensor:
    labels = torch.full((len(ids), max(1, *map(len, ids))), IGNORED)
    for row, target in enumerate(ids):
        labels[row, : len(target)] = torch.tensor(target)
    return labels


def _masks(counts: Sequence[int], width: int, how: Masks, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    out = {}
    if how.time:
        hidden = [augment.spans(count, how.time, how.time_span, rng) for count in counts]
        out["hidden"] = torch.from_numpy(np.concatenate(hidden))
    if how.features:
        silenced = [augment.spans(width, how.features, how.features_span, rng) for _ in counts]
        out["silenced"] = torch.from_numpy(np.stack(silenced))
    return out
