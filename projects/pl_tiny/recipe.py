"""Recipe of a staged training run: a YAML file parsed into frozen dataclasses and written back beside the results."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mowa.data.audio.augment import AugmentConfig
from mowa.training.config import schema


@dataclass(frozen=True, slots=True)
class Source:
    """A training manifest (JSON lines: id, audio, text, duration_s) and its share of the seconds of every batch.

    `ctc`: train on its transcripts. `features`: train on the teacher's features of its recordings. `optional`: if
    the manifest is missing, the source is skipped with a message, and the others share its seconds.
    """

    manifest: str
    share: float = schema.option(1.0, "share of the seconds of a batch", minimum=1e-6)
    ctc: bool = True
    features: bool = False
    optional: bool = False


@dataclass(frozen=True, slots=True)
class DevSet:
    """A manifest to evaluate during training, under its own name; at most `max_samples` recordings of it are used.

    With a finite `chunk_s` it is evaluated in chunks, as a live stream, with `lookahead_s` after each chunk.
    """

    name: str
    manifest: str
    max_samples: int = 150
    chunk_s: float = schema.option(math.inf, "chunk length", unlimited=True)
    lookahead_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StreamingConfig:
    """Train in chunks: every batch draws a chunk length from `chunk_s` and a look-ahead from `lookahead_s`.

    Frames attend to `left_context_s` before their chunk. `full` means the whole recording, or the whole past. Batches
    with chunks are normalized as a live stream is (`data.audio.running_norm`); `models.ctc_encoder.chunk_mask` defines
    the attention mask.
    """

    chunk_s: tuple[float, ...] = schema.option(
        (0.32, 0.64, 1.28, math.inf), "chunk lengths", minimum=0.02, unlimited=True
    )
    left_context_s: float = schema.option(math.inf, "context before a chunk", minimum=0.0, unlimited=True)
    lookahead_s: tuple[float, ...] = schema.option((0.0,), "context after a chunk", minimum=0.0, maximum=2.0)


@dataclass(frozen=True, slots=True)
class AugmentSchedule:
    """Augmentation whose strength grows linearly from 0 at `start_step` to that of `config` at `full_step`."""

    start_step: int = 300
    full_step: int = 2500
    config: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay, on batches of `batch_s` seconds of padded audio.

    `shortest_first`: the first that many batches hold the shortest recordings. `lr_multipliers`: learning-rate factor
    of the parameters whose name begins with a key; the longest matching key wins, 0 freezes. `average_checkpoints`: the
    stage ends with the mean of that many last checkpoints. `weight_interpolation`: the weights below the head end at
    w₀ + weight_interpolation · (w − w₀), w₀ being those before the stage; below 1 the stage forgets less (Wortsman et
    al. 2022, arXiv:2109.01903).
    """

    max_steps: int = 3000
    batch_s: float = 40.0
    shortest_first: int = 300
    learning_rate: float = 1e-3
    lr_multipliers: dict[str, float] = field(default_factory=dict)
    warmup_steps: int = 400
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = 1.0
    bf16: bool = True
    seed: int = 0
    eval_steps: int = 500
    average_checkpoints: int = schema.option(1, "checkpoints that are averaged", minimum=1)
    weight_interpolation: float = schema.option(1.0, "where the weights end", minimum=0.0, maximum=1.0)


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a run. The three weights are those of the loss terms in `feature_distillation`.

    Without the CTC term, inputs are windows of `window_s`, cut from concatenated recordings. `frozen_blocks`: that many
    lower blocks, and all below them, are not trained; the teacher then continues from what they give.
    """

    name: str
    sources: tuple[Source, ...]
    dev: tuple[DevSet, ...]
    max_duration_s: float = 15.0
    window_s: float = 5.0
    ctc_weight: float = 1.0
    front_end_weight: float = 0.0
    feature_weight: float = 0.0
    frozen_blocks: int = schema.option(0, "blocks that are not trained", minimum=0)
    streaming: StreamingConfig | None = None
    augment: AugmentSchedule = field(default_factory=AugmentSchedule)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True, slots=True)
class StagedRecipe:
    """A model trained from scratch, or from a teacher's encoder, in `stages`.

    `model_config` holds keys of the transformers config of `model_type`. `teacher` is the folder of a Whisper model in
    CTranslate2 format, or a name in `teachers.KNOWN_TEACHERS`: its encoder initializes the net and gives the features
    to match. `blank_bias` is added to the bias of the blank token at the end; negative values reduce deletions.
    """

    name: str
    language: str
    alphabet: str
    stages: tuple[Stage, ...]
    model_type: str = "wav2vec2"
    teacher: str = ""
    blank_bias: float = 0.0
    model_config: dict[str, Any] = field(default_factory=dict)


def read_recipe(path: Path) -> StagedRecipe:
    """Read a recipe file. Raise RecipeError with the path of a wrong key or value, and the nearest valid key."""
    return schema.from_dict(StagedRecipe, schema.read_yaml(path), str(path))


def write_recipe(recipe: StagedRecipe, path: Path) -> None:
    """Write every key of the recipe, defaults included, as YAML."""
    schema.write_yaml(recipe, path)
