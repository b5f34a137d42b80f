"""Which clips train together, step by step: the whole run is planned before it starts, so it can be resumed exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from mowa.data import audio, augment
from mowa.nouns import Example, Preprocessing, Vocabulary
from mowa.tasks import ctc
from mowa.train.recipe import Augment

POOL = 1024  # clips sorted by length together: little padding, yet no two epochs share their batches


def fill(examples: Sequence[Example], budget_s: float) -> Iterator[list[Example]]:
    """Consecutive clips grouped so that count × longest stays within the budget (a longer clip stands alone)."""
    group: list[Example] = []
    longest = 0.0
    for example in examples:
        widened = max(longest, example.duration_s)
        if group and widened * (len(group) + 1) > budget_s:
            yield group
            group, widened = [], example.duration_s
        group.append(example)
        longest = widened
    if group:
        yield group


def plan(
    examples: Sequence[Example], *, count: int, budget_s: float, shortest_first: int, seed: int
) -> list[list[Example]]:
    """`count` batches: `shortest_first` of the shortest clips, then epochs of shuffled length pools."""
    rng = np.random.default_rng(seed)
    ordered = sorted(examples, key=lambda example: example.duration_s)
    batches = list(fill(ordered, budget_s))[:shortest_first]
    rng.shuffle(batches)
    while len(batches) < count:
        shuffled = [examples[index] for index in rng.permutation(len(examples))]
        epoch: list[list[Example]] = []
        for start in range(0, len(shuffled), POOL):
            pool = sorted(shuffled[start : start + POOL], key=lambda example: example.duration_s)
            epoch.extend(fill(pool, budget_s))
        batches.extend(epoch[index] for index in rng.permutation(len(epoch)))
    return batches[:count]


class Batches(Dataset[dict[str, Any]]):
    """One item = one ready batch, and batch i is for step i. `rough` is None for evaluation."""

    def __init__(
        self,
        plan: Sequence[Sequence[Example]],
        vocabulary: Vocabulary,
        preprocessing: Preprocessing,
        *,
        rough: Augment | None = None,
        seed: int = 0,
    ) -> None:
        self.plan, self.vocabulary, self.preprocessing = plan, vocabulary, preprocessing
        self.rough, self.seed = rough, seed

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict[str, Any]:
        clips = [self._clip(example, index, place) for place, example in enumerate(self.plan[index])]
        targets = [ctc.labels(example.text, self.vocabulary) for example in self.plan[index]]
        return ctc.collate(clips, targets, self.preprocessing)

    def _clip(self, example: Example, index: int, place: int) -> np.ndarray:
        samples = audio.load(example.audio, self.preprocessing.rate_hz)
        if self.rough is not None:
            amount = float(np.clip((index - self.rough.start) / max(1, self.rough.full - self.rough.start), 0, 1))
            rng = np.random.default_rng((self.seed, index, place))
            samples = augment.roughen(samples, rng, self.rough.how, amount)
        return audio.normalize(samples) if self.preprocessing.normalize else samples
