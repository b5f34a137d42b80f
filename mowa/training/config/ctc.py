"""Fine-tuning as one value: a checkpoint, recordings, what of it learns, and how. From nothing: `recipe`.

Every knob is stated once, here: the command line, the reference page and the YAML files read it from these classes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mowa.data.audio.augment import AugmentConfig, SpecAugmentConfig
from mowa.errors import RecipeError
from mowa.training.config import schema
from mowa.training.config.schema import option

METHODS = ("head", "bottleneck", "lora", "top-N", "encoder", "full")
QAT_GROUP_SIZES = (32, 64, 128)  # columns that share a step, as `mowa shrink` knows them
FRACTION: dict[str, Any] = {"minimum": 0.0, "maximum": 1.0}
DEFAULT_AUGMENT = AugmentConfig(reverb=0.0, equalize=0.0, telephone=0.0, noise=0.0, gaps=0.0)
NO_AUGMENT = replace(DEFAULT_AUGMENT, speed=(1.0, 1.0))  # as recorded


@dataclass(frozen=True, slots=True)
class DataSource:
    """Recordings and their texts, from one place; `data.sources` says what it may be."""

    path: str = field(
        metadata={"help": "a .jsonl, .csv, .tsv or .parquet file, a Common Voice or other folder, or hub:owner/name"}
    )
    split: str = option("", "split of a Common Voice folder or a data set: train, dev, test, …")
    share: float = option(0.0, "share of the seconds of every batch; 0: as long as it is", **FRACTION)


@dataclass(frozen=True, slots=True)
class CTCData:
    """What is learnt from, what is measured on, and what is left out."""

    train: tuple[DataSource, ...] = field(metadata={"help": "recordings to learn from; one path, or a list of parts"})
    dev: tuple[DataSource, ...] = option((), "measured during training; none: `hold_out` is taken from train")
    test: tuple[DataSource, ...] = option((), "measured once, in the end")
    replay: tuple[DataSource, ...] = option((), "recordings the checkpoint was good at, to watch what it forgets")
    hold_out: float = option(
        0.05, "share of train to measure on where dev is empty; whole speakers, if they are named", **FRACTION
    )
    min_duration_s: float = option(0.2, "shorter recordings are left out", minimum=0.0)
    max_duration_s: float = option(20.0, "longer recordings are left out", minimum=0.0)
    oov: str = option(
        "map",
        "letters the head lacks: map to near ones, drop, or reject the recording",
        choices=("map", "drop", "reject"),
    )
    char_map: dict[str, str] = field(
        default_factory=dict, metadata={"help": "letters to write otherwise, before anything else: {ё: е}"}
    )
    max_eval_samples: int = option(
        300, "at most so many recordings of each dev set, the same each time; 0: all", minimum=0
    )


@dataclass(frozen=True, slots=True)
class CTCBatch:
    """How recordings are put together."""

    seconds: float = option(40.0, "seconds of sound a step and device", minimum=0.5)
    packing: bool = option(True, "concatenate samples without padding")
    gradient_accumulation_steps: int = option(1, "batches whose gradients are summed before a step", minimum=1)


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Low-rank updates (arXiv:2106.09685), in PEFT's format."""

    rank: int = option(16, "rank of the updates", minimum=1)
    alpha: float = option(32.0, "they are scaled by alpha / rank")
    dropout: float = option(0.0, "dropout on their input", **FRACTION)
    target_modules: tuple[str, ...] = option(("attention", "mlp"), "linears they sit on", choices=("attention", "mlp"))
    variant: str = option(
        "lora",
        "lora; rslora: scaled by alpha / √rank (arXiv:2312.03732); dora: with a length of their own (arXiv:2402.09353)",
        choices=("lora", "rslora", "dora"),
    )


@dataclass(frozen=True, slots=True)
class Adapters:
    """Bottlenecks after each block, as MMS has them (arXiv:2305.13516): LayerNorm, down, ReLU, up, added."""

    width: int = option(64, "width of the bottleneck", minimum=1)


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """How weights move (AdamW)."""

    epochs: float = option(10.0, "passes over the training recordings; ignored where steps are given", minimum=0.0)
    max_steps: int = option(0, "steps of the optimiser; 0: as many as the epochs have", minimum=0)
    learning_rate: float = option(
        0.0,
        "of what learns below the head; 0: 3e-5 for all, encoder and top-N, 5e-4 for the rest and for a student; of a "
        "language model 2e-4 for lora, 1e-5 for the rest",
        minimum=0.0,
    )
    head_lr_multiplier: float = option(
        0.0, "the head learns so many times faster; 0: 10 for a new head, 1 for an old one", minimum=0.0
    )
    layerwise_lr_decay: float = option(
        1.0, "each block learns so many times as fast as the one above it (1: all alike)", **FRACTION
    )
    lr_scheduler: str = option(
        "tri-stage", "learning rate over time", choices=("tri-stage", "cosine", "linear", "constant")
    )
    warmup_ratio: float = option(0.1, "share of the steps in which the learning rate rises", **FRACTION)
    hold_ratio: float = option(0.4, "share of the steps at the full rate (tri-stage)", **FRACTION)
    weight_decay: float = option(0.01, "of matrices", minimum=0.0)
    betas: tuple[float, float] = option((0.9, 0.98), "of AdamW", minimum=0.0, maximum=0.99999)
    max_grad_norm: float = option(1.0, "longest gradient", minimum=0.0)
    precision: str = option(
        "auto", "auto: bf16 where the machine is fast at it, else float32", choices=("auto", "float32", "bf16", "fp16")
    )
    gradient_checkpointing: bool = option(
        False, "recompute blocks in the backward pass: less memory, a third more time"
    )
    ema_decay: float = option(
        0.0,
        "keep a moving average of the weights with this decay (0.999), and end with it",
        minimum=0.0,
        maximum=0.99999,
    )
    seed: int = option(0, "of everything that is drawn", minimum=0, maximum=2**31 - 1)


@dataclass(frozen=True, slots=True)
class CTCEvaluation:
    """When the dev sets are measured, and what for."""

    eval_steps: int = option(0, "steps between measurements; 0: ten in the run, at least 20 steps apart", minimum=0)
    early_stopping_patience: int = option(
        0, "stop after so many measurements without a better one; 0: never", minimum=0
    )
    metric_for_best_model: str = option(
        "wer", "the checkpoint that is kept has the lowest of these", choices=("wer", "cer", "loss")
    )
    log_examples: int = option(3, "recordings whose text is shown at each measurement", minimum=0)
    report_to: tuple[str, ...] = option((), "also write to these", choices=("tensorboard", "wandb"))


@dataclass(frozen=True, slots=True)
class MonitorConfig:
    """Sentinels, which stop a run that would waste a night. Each is off at 0."""

    blank_ratio: float = option(0.99, "share of blank frames that counts as collapse", **FRACTION)
    collapse_patience: int = option(400, "steps that a collapse, or no learning at all, may last", minimum=0)
    divergence_factor: float = option(4.0, "times the best loss so far that counts as divergence", minimum=0.0)
    forgetting_factor: float = option(
        1.5, "times its error rate at the start, on replay, that counts as forgetting", minimum=0.0
    )
    check_frozen: bool = option(True, "check that nothing frozen moves and that everything else gets a gradient")


@dataclass(frozen=True, slots=True)
class DistributedConfig:
    """Across devices and machines."""

    devices: int = option(1, "processes on each machine, one for each GPU", minimum=1)
    nodes: int = option(1, "machines; each is told its number by the usual environment variables", minimum=1)
    strategy: str = option("auto", "how weights are shared out", choices=("auto", "ddp", "zero2", "zero3", "fsdp"))


@dataclass(frozen=True, slots=True)
class DistillationConfig:
    """A teacher, the whole checkpoint as it was: for a smaller net that keeps some of its blocks, or for `qat`."""

    student_layers: int = option(
        0, "blocks that the student keeps, chosen evenly; 0: all, and a teacher with qat only", minimum=0
    )
    logit_weight: float = option(
        1.0, "weight of the difference to what the teacher says, frame by frame (KL)", minimum=0.0
    )
    hidden_weight: float = option(
        1.0, "weight of the difference to what the teacher hears, after each kept block", minimum=0.0
    )
    ctc_weight: float = option(1.0, "weight of the loss on texts, where there are any", minimum=0.0)
    temperature: float = option(1.0, "above 1, unlikely letters count more in emissions", minimum=0.01)


@dataclass(frozen=True, slots=True)
class CTCRecipe:
    """A fine-tuning run. `train` says what learns; everything else is frozen."""

    model: str = field(
        metadata={"help": "checkpoint to start from: an alias, a folder, or a hub id owner/name[@revision]"}
    )
    data: CTCData
    task: str = option("ctc", "what is learnt: ctc (letters from sound); causal has knobs of its own", choices=("ctc",))
    method: str = option(
        "all", "what learns: head | adapters | lora | top-N (blocks) | encoder (blocks) | all; always the head too"
    )
    vocabulary: str = option(
        "keep",
        "the head's letters: keep, new (from the texts), extend (keep, and add the texts')",
        choices=("keep", "new", "extend"),
    )
    language: str = option("", "BCP 47 tag of what the model is to write, for its card")
    batch: CTCBatch = field(default_factory=CTCBatch)
    lora: LoraConfig = field(default_factory=LoraConfig)
    adapters: Adapters = field(default_factory=Adapters)
    qat: str = option(
        "none",
        "learn with weights rounded as mowa shrink will: in int8 or int4; the checkpoint as it was teaches (distil)",
        choices=("none", "int8", "int4"),
    )
    qat_group_size: int = option(32, "columns that share a step, of qat: int4: 32, 64 or 128", minimum=32, maximum=128)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    augment: AugmentConfig = field(default_factory=lambda: DEFAULT_AUGMENT)
    spec_augment: SpecAugmentConfig = field(default_factory=SpecAugmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: CTCEvaluation = field(default_factory=CTCEvaluation)
    monitors: MonitorConfig = field(default_factory=MonitorConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    @property
    def top_n(self) -> int | None:
        """How many of the topmost blocks learn, where `train` is top-N."""
        return parse_top_n(self.method)

    @property
    def uses_teacher(self) -> bool:
        """Whether the checkpoint, as it was, is listened to: then recordings need no texts."""
        how = self.distillation
        return bool(how.student_layers) or (self.qat != "none" and bool(how.logit_weight or how.hidden_weight))


def read_recipe(path: Path, overrides: dict[str, Any] | None = None) -> CTCRecipe:
    """A recipe file → Tuning, with `settings` (dotted paths) turned. RecipeError names the wrong key's path."""
    found = schema.read_yaml(path)
    return parse(schema.apply_overrides(found, overrides or {}) if isinstance(found, dict) else found, str(path))


def parse(tree: Any, where: str) -> CTCRecipe:
    """A tree of plain values → Tuning. A plain path under data stands for a list of one part."""
    tuning = schema.from_dict(CTCRecipe, expand_sources(tree), where)
    validate_common(tuning, where, METHODS)
    if tuning.distillation.student_layers and (
        tuning.method != "full" or tuning.vocabulary != "keep" or not tuning.batch.packing
    ):
        raise RecipeError(f"{where}: distil: a student learns all, keeps the vocabulary, and is fed packed batches")
    if tuning.qat != "none":
        _validate_qat(tuning, f"{where}: qat")
    shares = [part.share for part in tuning.data.train]
    if any(shares) and not all(shares):
        raise RecipeError(f"{where}: data: train: some parts have a share and some have none; give all of them one")
    if "" in tuning.data.char_map:
        raise RecipeError(f"{where}: data: letters: there is nothing to write otherwise in ''")
    if tuning.data.max_duration_s <= tuning.data.min_duration_s:
        raise RecipeError(f"{where}: data: longest_s and shortest_s leave nothing in")
    _validate_augment(tuning.augment, f"{where}: augment")
    _validate_spec_augment(tuning.spec_augment, f"{where}: masks")
    return tuning


def parse_top_n(method: str) -> int | None:
    """How many blocks the N of top-N is; None where `train` says something else."""
    found = re.fullmatch(r"top-([1-9]\d*)", method)
    return int(found[1]) if found else None


def expand_sources(tree: Any) -> Any:
    """`tree` with everything that is measured or learnt from as lists of trees of `Part`."""
    if not isinstance(tree, dict) or not isinstance(tree.get("data"), dict):
        return tree
    named = {key: as_sources(value) for key, value in tree["data"].items() if key in ("train", "dev", "test", "replay")}
    return {**tree, "data": {**tree["data"], **named}}


def validate_common(recipe: Any, where: str, methods: tuple[str, ...]) -> None:
    """RecipeError for what no kind of tuning can mean; `learnt` is what `plan.train` may be."""
    if recipe.train == "top-N" or (recipe.train not in methods and recipe.top is None):
        raise RecipeError(f"{where}: train: {recipe.train!r} is none of {', '.join(methods)} (N a number of blocks)")
    how = recipe.optimise
    if how.warmup + (how.hold if how.schedule == "tri-stage" else 0) > 1 + 1e-9:
        raise RecipeError(
            f"{where}: optimise: warmup and hold are shares of the steps and come to more than all of them"
        )
    if not how.steps and not how.epochs:
        raise RecipeError(f"{where}: optimise: steps and epochs are both 0; give one of them")
    if not recipe.lora.where:
        raise RecipeError(f"{where}: lora: where: at least one is needed, found none")


def _validate_qat(plan: CTCRecipe, where: str) -> None:
    """RecipeError for what cannot learn with rounded weights."""
    if plan.method in ("lora", "bottleneck"):
        raise RecipeError(
            f"{where}: with train: {plan.method} the checkpoint's own weights stay as they are: merge the adapter"
            " (mowa adapt merge), and let all, encoder or top-N learn"
        )
    if plan.method == "head":
        raise RecipeError(
            f"{where}: the head is not rounded, so train: head learns nothing of it: all, encoder or top-N"
        )
    if plan.vocabulary != "keep":
        raise RecipeError(f"{where}: a new head comes first, rounding after it: vocabulary: keep")
    if plan.uses_teacher and not plan.batch.packing:
        raise RecipeError(
            f"{where}: the teacher is fed packed batches: batch: layout: packed, or distil: emissions and hidden: 0"
        )
    if plan.qat_group_size not in QAT_GROUP_SIZES:
        raise RecipeError(
            f"{where}_group is {plan.qat_group_size}; it must be one of {', '.join(map(str, QAT_GROUP_SIZES))}"
        )


def _validate_augment(how: AugmentConfig, where: str) -> None:
    for name in ("room", "equalise", "telephone", "noise", "gaps"):
        _validate_fraction(getattr(how, name), f"{where}: {name}")
    for name, (low, high) in (("speed", how.speed), ("snr_db", how.snr_db), ("loudness_db", how.loudness_db)):
        if low > high:
            raise RecipeError(f"{where}: {name}: {low} is more than {high}; the smaller one comes first")
    if how.speed[0] < 0.1:
        raise RecipeError(f"{where}: speed is {how.speed[0]}; it must be at least 0.1")


def _validate_spec_augment(how: SpecAugmentConfig, where: str) -> None:
    for name in ("time", "features"):
        _validate_fraction(getattr(how, name), f"{where}: {name}")
    for name in ("time_span", "features_span"):
        if getattr(how, name) < 1:
            raise RecipeError(f"{where}: {name} is {getattr(how, name)}; it must be at least 1")


def _validate_fraction(value: float, where: str) -> None:
    if not 0 <= value <= 1:
        raise RecipeError(f"{where} is {value}; it is a share, from 0 to 1")


def as_sources(value: Any) -> Any:
    """What stands under data → a list of trees of `Part`: a path alone is a part, and a part alone a list of one."""
    if value is None:  # `dev:` with nothing behind it
        return []
    values = value if isinstance(value, list | tuple) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in values]
