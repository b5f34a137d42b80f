"""Which clips train together, step by step: the whole run is planned before it starts, so it can be resumed exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from mowa.data import audio
from mowa.data.audio import augment, running_norm
from mowa.tasks import ctc
from mowa.training.ctc.batches import group_by_padded_duration, sample_pools
from mowa.types import Example, Preprocessing, Vocabulary
from projects.pl_tiny.recipe import Augment

WRONG_DB = 4.0  # by how much the level that a live stream begins with may be wrong
GRID_S = 0.5  # batches are padded to multiples of this: a processor prepares anew for every new shape


@dataclass(frozen=True, slots=True)
class Clip:
    """An example and what is learnt from it: its letters, its sound as the teacher hears it, or both."""

    example: Example
    letters: bool = True
    ear: bool = False

    @property
    def duration_s(self) -> float:
        return self.example.duration_s


def plan(
    sources: Sequence[tuple[Sequence[Clip], float]], *, count: int, budget_s: float, shortest_first: int, seed: int
) -> list[list[Clip]]:
    """`count` batches of clips drawn from sources (clips, share of the seconds): `shortest_first` of the shortest.

    A single source is gone through in shuffled epochs; of several, each is gone through at a pace of its own.
    """
    rng = np.random.default_rng(seed)
    ordered = sorted((clip for clips, _ in sources for clip in clips), key=lambda clip: clip.duration_s)
    batches = list(group_by_padded_duration(ordered, budget_s))[:shortest_first]
    rng.shuffle(batches)
    drawn = sample_pools(sources, rng)
    while len(batches) < count:
        pool = sorted(next(drawn), key=lambda clip: clip.duration_s)
        filled = list(group_by_padded_duration(pool, budget_s))
        batches.extend(filled[index] for index in rng.permutation(len(filled)))
    return batches[:count]


class Batches(Dataset[dict[str, Any]]):
    """One item = one ready batch, and batch i is for step i. `rough` is None for evaluation."""

    def __init__(
        self,
        plan: Sequence[Sequence[Clip]],
        vocabulary: Vocabulary,
        preprocessing: Preprocessing,
        *,
        rough: Augment | None = None,
        chunks: Sequence[int] = (),
        ahead: Sequence[int] = (0,),
        seed: int = 0,
    ) -> None:
        self.plan, self.vocabulary, self.preprocessing = plan, vocabulary, preprocessing
        self.rough, self.chunks, self.ahead, self.seed = rough, tuple(chunks), tuple(ahead), seed

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """→ `ctc.collate`'s tensors, ear [B] bool, and where there are `chunks`, which of them this batch has: chunk
        [].

        A clip whose letters are not learnt has no labels. 0 frames are no chunk: all is heard at once.
        """
        group = self.plan[index]
        rng = np.random.default_rng((self.seed, index))
        chunk = int(rng.choice(self.chunks)) if self.chunks else 0
        ahead = int(rng.choice(self.ahead))
        sounds = [self._sound(clip.example, index, place, live=chunk > 0) for place, clip in enumerate(group)]
        targets = [ctc.encode_labels(clip.example.text, self.vocabulary) if clip.letters else [] for clip in group]
        batch = ctc.collate(
            sounds, targets, self.preprocessing, pad_to_multiple_of=int(GRID_S * self.preprocessing.rate_hz)
        )
        batch |= {"ear": torch.tensor([clip.ear for clip in group])}
        return batch | {"chunk": torch.tensor(chunk), "ahead": torch.tensor(ahead)} if self.chunks else batch

    def _sound(self, example: Example, index: int, place: int, *, live: bool) -> np.ndarray:
        rng, rate_hz = np.random.default_rng((self.seed, index, place)), self.preprocessing.rate_hz
        samples = _roughened(audio.load_audio(example.audio, rate_hz), self.rough, index, rng)
        if not self.preprocessing.normalize:
            return samples
        if not live:
            return audio.normalize(samples)
        wrong = 10 ** (rng.normal(0, WRONG_DB if self.rough else 0) / 10)
        before = running_norm.RunningStats.prior(float(samples.var()) * wrong, rate_hz)
        return running_norm.normalize_running(samples, before, rate_hz)[0]


class Windows(Dataset[dict[str, Any]]):
    """Batches to listen to, where no letters are learnt: windows of one length, cut from recordings put end to end.

    Nothing is padded, so every batch has one shape, which a processor is much faster with.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Sequence[Clip], float]],
        count: int,
        preprocessing: Preprocessing,
        *,
        batch_s: float,
        window_s: float,
        rough: Augment | None = None,
        seed: int = 0,
    ) -> None:
        self.sources, self.count, self.preprocessing = sources, count, preprocessing
        self.rows, self.window_s, self.rough, self.seed = max(1, int(batch_s / window_s)), window_s, rough, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        """→ `ctc.collate`'s tensors without labels, and ear [B] bool, all true."""
        sounds = [self._window(np.random.default_rng((self.seed, index, row)), index) for row in range(self.rows)]
        batch = ctc.collate(sounds, [[] for _ in sounds], self.preprocessing)
        return batch | {"ear": torch.ones(self.rows, dtype=torch.bool)}

    def _window(self, rng: np.random.Generator, index: int) -> np.ndarray:
        shares = np.array([share for _, share in self.sources])
        clips, _ = self.sources[int(rng.choice(len(shares), p=shares / shares.sum()))]
        length, parts = int(self.window_s * self.preprocessing.rate_hz), [np.zeros(0, np.float32)]
        while sum(map(len, parts)) <= length:
            samples = audio.load_audio(clips[int(rng.integers(len(clips)))].example.audio, self.preprocessing.rate_hz)
            parts.append(_roughened(samples, self.rough, index, rng))
        joined = np.concatenate(parts)
        start = int(rng.integers(len(joined) - length))
        window = joined[start : start + length]
        return audio.normalize(window) if self.preprocessing.normalize else window


def _roughened(samples: np.ndarray, rough: Augment | None, step: int, rng: np.random.Generator) -> np.ndarray:
    if rough is None:
        return samples
    amount = float(np.clip((step - rough.start) / max(1, rough.full - rough.start), 0, 1))
    return augment.augment_audio(samples, rng, rough.how, amount)
