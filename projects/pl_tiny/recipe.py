"""A training run as one value: read from YAML, checked key by key, written back beside what it made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mowa.data.audio.augment import AugmentConfig
from mowa.training.config import schema
from projects.pl_tiny.text import POLISH


@dataclass(frozen=True, slots=True)
class Source:
    """A manifest (JSON lines: id, audio, text, duration_s) and how much of every batch it fills.

    `letters`: its texts are learnt. `ear`: on its recordings the net is held to what the teacher hears.
    """

    manifest: str
    share: float = 1.0
    letters: bool = True
    ear: bool = False


@dataclass(frozen=True, slots=True)
class Dev:
    """A manifest that is watched during training, under a name of its own; of a long one, `clips` of them.

    With a `chunk_s` it is heard in chunks, as if it were live, each with `ahead_s` after it.
    """

    name: str
    manifest: str
    clips: int = 150
    chunk_s: float = math.inf
    ahead_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Streaming:
    """Hearing in chunks is learnt: every batch has a length of chunk drawn from `chunk_s`, which sees `left_s` before
    it, and a length from `ahead_s` after it. `full` is no chunk at all, or all that was before.

    What is heard in chunks is normalised as a live stream is (`data.level`). `families.chunks` says what is seen.
    """

    chunk_s: tuple[float, ...] = schema.option((0.32, 0.64, 1.28, math.inf), "lengths of chunks", minimum=0.02)
    left_s: float = schema.option(math.inf, "what is seen before a chunk", minimum=0.0)
    ahead_s: tuple[float, ...] = schema.option((0.0,), "what is seen after it", minimum=0.0, maximum=2.0)


@dataclass(frozen=True, slots=True)
class Augment:
    """Rough audio, from none at step `start` to all of it at step `full`."""

    start: int = 300
    full: int = 2500
    how: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True, slots=True)
class Optimise:
    """How weights move. `batch_s` seconds of (padded) audio a step; the shortest clips come first.

    `rates` multiplies the learning rate of the parameters whose name begins with a key (the longest such key wins);
    0 freezes them. `average`: the result is the mean of that many last checkpoints. `keep`: of the way that the weights
    below the head have gone in the stage, the share that is kept; less than 1 forgets less of what they knew before
    (Wortsman et al. 2022, arXiv:2109.01903).
    """

    steps: int = 3000
    batch_s: float = 40.0
    shortest_first: int = 300
    learning_rate: float = 1e-3
    rates: dict[str, float] = field(default_factory=dict)
    warmup_steps: int = 400
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    bf16: bool = True
    seed: int = 0
    evaluate_every: int = 500
    average: int = 1
    keep: float = 1.0


@dataclass(frozen=True, slots=True)
class Stage:
    """One stretch of a run. `letters`, `front` and `ear` weigh the terms of its loss, which `distil` defines.

    Without letters, what is heard are windows of `window_s`, cut from the recordings put end to end.
    """

    name: str
    sources: tuple[Source, ...]
    dev: tuple[Dev, ...]
    longest_s: float = 15.0
    window_s: float = 5.0
    letters: float = 1.0
    front: float = 0.0
    ear: float = 0.0
    streaming: Streaming | None = None
    augment: Augment = field(default_factory=Augment)
    optimise: Optimise = field(default_factory=Optimise)


@dataclass(frozen=True, slots=True)
class Recipe:
    """`net` holds the keys of the transformers config of `model_type`, as its documentation names them.

    `teacher` is the folder of a Whisper model in CTranslate2 format, or the name of one in `teachers.KNOWN`: its
    encoder's blocks are where the net starts, and its features are what `ear` means. Stages run in their order. `blank`
    is added to the bias of the blank in the end: below 0 for a net that leaves out letters of the people it is for.
    """

    name: str
    stages: tuple[Stage, ...]
    language: str = "pl"
    model_type: str = "wav2vec2"
    alphabet: str = POLISH
    teacher: str = ""
    blank: float = 0.0
    net: dict[str, Any] = field(default_factory=dict)


def read(path: Path) -> Recipe:
    """A recipe file → Recipe. A wrong key or value is a RecipeError with its path and the nearest right key."""
    return schema.from_dict(Recipe, schema.read_yaml(path), str(path))


def write(recipe: Recipe, path: Path) -> None:
    schema.write_yaml(recipe, path)
