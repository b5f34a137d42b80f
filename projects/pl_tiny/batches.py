"""Training batches, planned for the whole run before it starts, so that a resumed run sees the same ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from mowa.data import audio
from mowa.data.audio import augment, running_norm
from mowa.models.ctc_encoder.geometry import frame_geometry
from mowa.tasks import ctc
from mowa.training.ctc.batches import group_by_padded_duration, sample_pools
from mowa.types import Example, Preprocessing, Vocabulary
from projects.pl_tiny.recipe import AugmentSchedule

LEVEL_ERROR_DB = 4.0  # standard deviation of the level that a live stream assumes before it has measured one
PAD_MULTIPLE_S = 0.5  # few distinct shapes: CPU kernels prepare anew for each


@dataclass(frozen=True, slots=True)
class Clip:
    """A recording and the loss terms it takes part in: CTC on its text, features of the teacher, or both."""

    example: Example
    ctc: bool = True
    features: bool = False

    @property
    def duration_s(self) -> float:
        return self.example.duration_s


def seconds_to_frames(config: Any, seconds: float) -> int:
    """Convert a length to output frames of the net; 0 stands for an infinite one."""
    if math.isinf(seconds):
        return 0
    return round(seconds * Preprocessing().rate_hz / frame_geometry(config).hop)


def plan_batches(
    sources: Sequence[tuple[Sequence[Clip], float]], *, count: int, budget_s: float, shortest_first: int, seed: int
) -> list[list[Clip]]:
    """Plan `count` batches of at most `budget_s` padded seconds from sources of (clips, share of the seconds).

    The first `shortest_first` batches hold the shortest clips. A single source is read in shuffled epochs; each of
    several starts a new epoch when it is exhausted.
    """
    rng = np.random.default_rng(seed)
    ordered = sorted((clip for clips, _ in sources for clip in clips), key=lambda clip: clip.duration_s)
    batches = list(group_by_padded_duration(ordered, budget_s))[:shortest_first]
    rng.shuffle(batches)
    pools = sample_pools(sources, rng)
    while len(batches) < count:
        pool = sorted(next(pools), key=lambda clip: clip.duration_s)
        groups = list(group_by_padded_duration(pool, budget_s))
        batches.extend(groups[index] for index in rng.permutation(len(groups)))
    return batches[:count]


class BatchDataset(Dataset[dict[str, Any]]):
    """Planned batches of padded clips; item i is the batch of step i. Without `schedule` audio is not augmented.

    `chunk_frames` and `lookahead_frames` are drawn from per batch; 0 chunk frames is the whole recording at once.
    """

    def __init__(
        self,
        plan: Sequence[Sequence[Clip]],
        vocabulary: Vocabulary,
        preprocessing: Preprocessing,
        *,
        schedule: AugmentSchedule | None = None,
        chunk_frames: Sequence[int] = (),
        lookahead_frames: Sequence[int] = (0,),
        seed: int = 0,
    ) -> None:
        self.plan, self.vocabulary, self.preprocessing = plan, vocabulary, preprocessing
        self.schedule, self.seed = schedule, seed
        self.chunk_frames, self.lookahead_frames = tuple(chunk_frames), tuple(lookahead_frames)

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the tensors of `tasks.ctc.collate` and use_features bool [B].

        With `chunk_frames` also chunk_frames [] and lookahead_frames []. A clip without the CTC term has no labels.
        """
        group = self.plan[index]
        rng = np.random.default_rng((self.seed, index))
        chunk = int(rng.choice(self.chunk_frames)) if self.chunk_frames else 0
        lookahead = int(rng.choice(self.lookahead_frames))
        samples = [self._load(clip.example, index, place, live=chunk > 0) for place, clip in enumerate(group)]
        targets = [ctc.encode_labels(clip.example.text, self.vocabulary) if clip.ctc else [] for clip in group]
        batch = ctc.collate(
            samples, targets, self.preprocessing, pad_to_multiple_of=int(PAD_MULTIPLE_S * self.preprocessing.rate_hz)
        )
        batch["use_features"] = torch.tensor([clip.features for clip in group])
        if self.chunk_frames:
            batch |= {"chunk_frames": torch.tensor(chunk), "lookahead_frames": torch.tensor(lookahead)}
        return batch

    def _load(self, example: Example, index: int, place: int, *, live: bool) -> np.ndarray:
        rng, rate_hz = np.random.default_rng((self.seed, index, place)), self.preprocessing.rate_hz
        samples = _augment(audio.load_audio(example.audio, rate_hz), self.schedule, index, rng)
        if not self.preprocessing.normalize:
            return samples
        if not live:
            return audio.normalize(samples)
        level_error = 10 ** (rng.normal(0, LEVEL_ERROR_DB if self.schedule else 0) / 10)
        prior = running_norm.RunningStats.prior(float(samples.var()) * level_error, rate_hz)
        return running_norm.normalize_running(samples, prior, rate_hz)[0]


class WindowDataset(Dataset[dict[str, Any]]):
    """Batches without transcripts: windows of one length, cut from concatenated recordings.

    No padding and one shape for every batch, which is much faster on a CPU.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Sequence[Clip], float]],
        count: int,
        preprocessing: Preprocessing,
        *,
        batch_s: float,
        window_s: float,
        schedule: AugmentSchedule | None = None,
        seed: int = 0,
    ) -> None:
        self.sources, self.count, self.preprocessing = sources, count, preprocessing
        self.batch_size, self.window_s = max(1, int(batch_s / window_s)), window_s
        self.schedule, self.seed = schedule, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the tensors of `tasks.ctc.collate` without labels, and use_features bool [B], all true."""
        rngs = (np.random.default_rng((self.seed, index, row)) for row in range(self.batch_size))
        windows = [self._window(rng, index) for rng in rngs]
        batch = ctc.collate(windows, [[] for _ in windows], self.preprocessing)
        return batch | {"use_features": torch.ones(self.batch_size, dtype=torch.bool)}

    def _window(self, rng: np.random.Generator, index: int) -> np.ndarray:
        shares = np.array([share for _, share in self.sources])
        clips, _ = self.sources[int(rng.choice(len(shares), p=shares / shares.sum()))]
        length, parts = int(self.window_s * self.preprocessing.rate_hz), [np.zeros(0, np.float32)]
        while sum(map(len, parts)) <= length:
            samples = audio.load_audio(clips[int(rng.integers(len(clips)))].example.audio, self.preprocessing.rate_hz)
            parts.append(_augment(samples, self.schedule, index, rng))
        joined = np.concatenate(parts)
        start = int(rng.integers(len(joined) - length))
        window = joined[start : start + length]
        return audio.preprocess(window, self.preprocessing)


def _augment(samples: np.ndarray, schedule: AugmentSchedule | None, step: int, rng: np.random.Generator) -> np.ndarray:
    if schedule is None:
        return samples
    ramp = (step - schedule.start_step) / max(1, schedule.full_step - schedule.start_step)
    return augment.augment_audio(samples, rng, schedule.config, float(np.clip(ramp, 0, 1)))
