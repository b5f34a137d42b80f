"""The recipe of a CTC fine-tuning run: a checkpoint, recordings, what is trained and how.

Every option is declared once, here or in `shared`; the CLI, the reference page and the YAML files are generated from
these classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mowa.data.audio.augment import AugmentConfig, SpecAugmentConfig
from mowa.errors import RecipeError
from mowa.training.config import schema
from mowa.training.config.schema import option
from mowa.training.config.shared import (
    FRACTION,
    DataSource,
    DistributedConfig,
    LoraConfig,
    MonitorConfig,
    OptimizerConfig,
    expand_sources,
    parse_top_n,
    validate_common,
)

METHODS = ("head", "bottleneck", "lora", "top-N", "encoder", "full")
ADAPTER_METHODS = ("bottleneck", "lora")
MAX_CHUNK_S = 60.0  # longer chunks are full context in practice
QAT_GROUP_SIZES = (32, 64, 128)  # weights that share a scale, as in `mowa quantize`
DEFAULT_AUGMENT = AugmentConfig(reverb=0.0, equalize=0.0, telephone=0.0, noise=0.0, gaps=0.0)
NO_AUGMENT = replace(DEFAULT_AUGMENT, speed=(1.0, 1.0))


@dataclass(frozen=True, slots=True)
class CTCData:
    """Recordings to train and evaluate on, and which of them are left out."""

    train: tuple[DataSource, ...] = field(metadata={"help": "recordings to train on; a path, or a list of sources"})
    dev: tuple[DataSource, ...] = option((), "evaluated during training; none: `hold_out` is taken from train")
    test: tuple[DataSource, ...] = option((), "evaluated once, at the end")
    replay: tuple[DataSource, ...] = option(
        (), "recordings on which the checkpoint is good, evaluated to detect forgetting"
    )
    hold_out: float = option(
        0.05, "fraction of train to evaluate on where dev is empty; whole speakers, where they are named", **FRACTION
    )
    min_duration_s: float = option(0.2, "leave out shorter recordings", minimum=0.0)
    max_duration_s: float = option(20.0, "leave out longer recordings", minimum=0.0)
    max_unreadable: float = option(
        0.1,
        "recordings that are missing, cut off, empty or otherwise unreadable are left out, up to this fraction of a "
        "data set, or three; more end the run before it starts; 0: none is tolerated",
        **FRACTION,
    )
    oov: str = option(
        "map",
        "characters outside the head's vocabulary: map to similar ones, drop, or reject the recording",
        choices=("map", "drop", "reject"),
    )
    char_map: dict[str, str] = field(
        default_factory=dict, metadata={"help": "characters to replace before anything else: {ё: е}"}
    )
    max_eval_samples: int = option(
        300, "recordings of each dev set to evaluate at most, always the same ones; 0: all", minimum=0
    )


@dataclass(frozen=True, slots=True)
class CTCBatch:
    """Batch size and layout."""

    seconds: float = option(40.0, "seconds of audio per step and device", minimum=0.5)
    packing: bool = option(True, "concatenate samples without padding; false: pad (with `streaming`: default false)")
    gradient_accumulation_steps: int = option(1, "batches whose gradients are summed before a step", minimum=1)


@dataclass(frozen=True, slots=True)
class ChunkedTraining:
    """Train with chunked attention, so that the checkpoint can be used with `mowa listen` and `mowa.stream`.

    Each batch draws one chunk length and one look-ahead. Layer-norm checkpoints only; samples are padded, not packed.
    """

    chunk_s: tuple[float, ...] = option(
        (),
        "chunk lengths in seconds, one drawn per batch; full: no chunks; empty: no streaming",
        minimum=0.02,
        unlimited=True,
    )
    left_context_s: float = option(
        math.inf, "seconds before a chunk that it attends to; full: all", minimum=0.0, unlimited=True
    )
    lookahead_s: tuple[float, ...] = option(
        (0.0,), "look-ahead per chunk in seconds, one drawn per batch; adds as much latency", minimum=0.0, maximum=2.0
    )


@dataclass(frozen=True, slots=True)
class CTCEvaluation:
    """When the dev sets are evaluated, and which checkpoint is kept."""

    eval_steps: int = option(0, "steps between evaluations; 0: ten in the run, at least 20 steps apart", minimum=0)
    early_stopping_patience: int = option(
        0, "stop after this many evaluations without improvement; 0: never", minimum=0
    )
    metric_for_best_model: str = option(
        "wer", "keep the checkpoint with the lowest value of this on the first dev set", choices=("wer", "cer", "loss")
    )
    log_examples: int = option(3, "recordings whose transcripts are printed at each evaluation", minimum=0)
    report_to: tuple[str, ...] = option((), "also log to these trackers", choices=("tensorboard", "wandb"))


@dataclass(frozen=True, slots=True)
class DistillationConfig:
    """The checkpoint as a teacher: for a smaller student that keeps some of its layers, or for `qat`."""

    student_layers: int = option(
        0, "layers of the student, selected evenly; 0: no student, and a teacher only with qat", minimum=0
    )
    logit_weight: float = option(1.0, "weight of the KL divergence to the teacher's logits, per frame", minimum=0.0)
    hidden_weight: float = option(
        1.0, "weight of the distance to the teacher's hidden states after each kept layer", minimum=0.0
    )
    ctc_weight: float = option(1.0, "weight of the CTC loss, on recordings that have a text", minimum=0.0)
    temperature: float = option(1.0, "softmax temperature of the KL divergence", minimum=0.01)


@dataclass(frozen=True, slots=True)
class CTCRecipe:
    """A CTC fine-tuning run. `method` selects what is trained; everything else is frozen."""

    model: str = field(
        metadata={"help": "checkpoint to start from: an alias, a folder, or a hub id owner/name[@revision]"}
    )
    data: CTCData
    task: str = option(
        "ctc",
        "task: ctc (speech recognition) or causal (language models, which have other options)",
        choices=("ctc",),
    )
    method: str = option(
        "full",
        "weights to train: head | bottleneck | lora | top-N (blocks) | encoder (blocks) | full; always with the head",
    )
    vocabulary: str = option(
        "keep",
        "the head's vocabulary: keep, new (from the texts), extend (keep, and add the texts' characters)",
        choices=("keep", "new", "extend"),
    )
    target_lang: str = option("", "language of an MMS checkpoint to start from, such as pol; empty: its default")
    language: str = option("", "BCP 47 tag of the language, for the model card")
    batch: CTCBatch = field(default_factory=CTCBatch)
    streaming: ChunkedTraining = field(default_factory=ChunkedTraining)
    lora: LoraConfig = field(default_factory=LoraConfig)
    bottleneck_dim: int = option(64, "inner size of the adapters of method: bottleneck (arXiv:2305.13516)", minimum=1)
    qat: str = option(
        "none",
        "quantization-aware training: train with weights rounded as `mowa quantize` rounds them, to int8 or int4; the "
        "unquantized checkpoint is the teacher (distillation)",
        choices=("none", "int8", "int4"),
    )
    qat_group_size: int = option(32, "weights that share a scale (qat: int4): 32, 64 or 128", minimum=32, maximum=128)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    augment: AugmentConfig = field(default_factory=lambda: DEFAULT_AUGMENT)
    spec_augment: SpecAugmentConfig = field(default_factory=SpecAugmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: CTCEvaluation = field(default_factory=CTCEvaluation)
    monitors: MonitorConfig = field(default_factory=MonitorConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    @property
    def top_n(self) -> int | None:
        """Number of trained blocks of method top-N, else None."""
        return parse_top_n(self.method)

    @property
    def uses_teacher(self) -> bool:
        """Whether the original checkpoint is used as a teacher; recordings then need no texts."""
        config = self.distillation
        return bool(config.student_layers) or (self.qat != "none" and bool(config.logit_weight or config.hidden_weight))

    @property
    def batches_per_step(self) -> int:
        """Batches that make up one optimizer step, over all devices."""
        return self.batch.gradient_accumulation_steps * self.distributed.devices * self.distributed.nodes


def read_recipe(path: Path, overrides: dict[str, Any] | None = None) -> CTCRecipe:
    """Read a recipe file and apply `overrides` (dotted path → value). RecipeError names the path of a bad key."""
    tree = schema.read_yaml(path)
    return parse(schema.apply_overrides(tree, overrides or {}) if isinstance(tree, dict) else tree, str(path))


def parse(tree: Any, where: str) -> CTCRecipe:
    """Build and validate a recipe from a tree of plain values; under `data` a path stands for a list of one source.

    With `streaming`, `batch.packing` defaults to false.

    Raises:
        RecipeError: a key or value is wrong; the message starts with `where` and its path.
    """
    recipe = schema.from_dict(CTCRecipe, _padded_if_streaming(expand_sources(tree)), where)
    for name in ("modules_to_save", "target_parameters"):
        if getattr(recipe.lora, name):
            raise RecipeError(f"{where}: lora: {name} is for task: causal only; leave it empty")
    validate_common(recipe, where, METHODS)
    if recipe.distillation.student_layers and (
        recipe.method != "full" or recipe.vocabulary != "keep" or not recipe.batch.packing
    ):
        raise RecipeError(
            f"{where}: distillation: a student needs method: full, vocabulary: keep and batch: packing: true"
        )
    validate_streaming(recipe, f"{where}: streaming")
    if recipe.qat != "none":
        _validate_qat(recipe, f"{where}: qat")
    shares = [source.share for source in recipe.data.train]
    if any(shares) and not all(shares):
        raise RecipeError(f"{where}: data: train: some sources have a share and some do not; give all of them one")
    if "" in recipe.data.char_map:
        raise RecipeError(f"{where}: data: char_map: the empty string cannot be replaced")
    if recipe.data.max_duration_s <= recipe.data.min_duration_s:
        raise RecipeError(f"{where}: data: max_duration_s must be greater than min_duration_s; no recording passes")
    _validate_augment(recipe.augment, f"{where}: augment")
    _validate_spec_augment(recipe.spec_augment, f"{where}: spec_augment")
    return recipe


def _padded_if_streaming(tree: Any) -> Any:
    """Set `batch.packing` to false where the recipe has `streaming.chunk_s` and does not set it."""
    if (
        not isinstance(tree, dict)
        or not isinstance(tree.get("streaming"), dict)
        or not tree["streaming"].get("chunk_s")
    ):
        return tree
    batch = tree.get("batch") or {}
    return {**tree, "batch": {"packing": False} | batch} if isinstance(batch, dict) else tree


def validate_streaming(recipe: CTCRecipe, where: str) -> None:
    """Check the `streaming` section against the rest of the recipe.

    Raises:
        RecipeError: chunks would have no effect, or could not be trained by this method.
    """
    config, default = recipe.streaming, ChunkedTraining()
    if not config.chunk_s:
        if config != default:
            raise RecipeError(
                f"{where}: chunk_s is empty, so nothing is chunked; set it, for example [0.32, 0.64, full]"
            )
        return
    if longest := [seconds for seconds in config.chunk_s if MAX_CHUNK_S < seconds < math.inf]:
        raise RecipeError(f"{where}: chunk_s: {longest[0]:g} is over {MAX_CHUNK_S:g} s; use full")
    if all(map(math.isinf, config.chunk_s)):
        raise RecipeError(f"{where}: chunk_s holds only full; add at least one length in seconds")
    if not config.lookahead_s:
        raise RecipeError(f"{where}: lookahead_s: empty; use 0 for no look-ahead")
    if recipe.batch.packing:
        raise RecipeError(f"{where}: chunks are not applied to packed batches; set batch: packing: false")
    if recipe.method in (*ADAPTER_METHODS, "head"):
        raise RecipeError(
            f"{where}: method: {recipe.method} freezes the encoder, which must adapt; use full, encoder or top-N"
        )
    if recipe.uses_teacher:
        raise RecipeError(
            f"{where}: cannot be combined with distillation or qat with a teacher; train one after the other"
        )


def _validate_qat(recipe: CTCRecipe, where: str) -> None:
    if recipe.method in ADAPTER_METHODS:
        raise RecipeError(
            f"{where}: method: {recipe.method} does not train the quantized weights; merge the adapter (mowa adapter "
            "merge) and use full, encoder or top-N"
        )
    if recipe.method == "head":
        raise RecipeError(
            f"{where}: the head is not quantized, so method: head has no effect; use full, encoder or top-N"
        )
    if recipe.vocabulary != "keep":
        raise RecipeError(f"{where}: needs vocabulary: keep; train a new head first, then quantize")
    if recipe.uses_teacher and not recipe.batch.packing:
        raise RecipeError(
            f"{where}: the teacher needs packed batches; set batch: packing: true, or distillation: logit_weight "
            "and hidden_weight to 0"
        )
    if recipe.qat_group_size not in QAT_GROUP_SIZES:
        raise RecipeError(
            f"{where}_group_size is {recipe.qat_group_size}; it must be one of {', '.join(map(str, QAT_GROUP_SIZES))}"
        )


def _validate_augment(config: AugmentConfig, where: str) -> None:
    for name in ("reverb", "equalize", "telephone", "noise", "gaps"):
        _validate_fraction(getattr(config, name), f"{where}: {name}")
    for name, (low, high) in (
        ("speed", config.speed),
        ("snr_db", config.snr_db),
        ("loudness_db", config.loudness_db),
    ):
        if low > high:
            raise RecipeError(f"{where}: {name}: {low} is greater than {high}; the smaller value comes first")
    if config.speed[0] < 0.1:
        raise RecipeError(f"{where}: speed is {config.speed[0]}; it must be at least 0.1")


def _validate_spec_augment(config: SpecAugmentConfig, where: str) -> None:
    for name in ("mask_time_prob", "mask_feature_prob"):
        _validate_fraction(getattr(config, name), f"{where}: {name}")
    for name in ("mask_time_length", "mask_feature_length"):
        if getattr(config, name) < 1:
            raise RecipeError(f"{where}: {name} is {getattr(config, name)}; it must be at least 1")


def _validate_fraction(value: float, where: str) -> None:
    if not 0 <= value <= 1:
        raise RecipeError(f"{where} is {value}; it must be between 0 and 1")
