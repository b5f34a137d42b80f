"""Fine-tuning as one value: a checkpoint, recordings, what of it learns, and how. From nothing: `recipe`.

Every knob is stated once, here: the command line, the reference page and the YAML files read it from these classes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mowa.data.augment import Masks, Roughness
from mowa.errors import RecipeError
from mowa.train import schema
from mowa.train.schema import knob

LEARNT = ("head", "adapters", "lora", "top-N", "encoder", "all")
GROUPS = (32, 64, 128)  # columns that share a step, as `mowa shrink` knows them
SHARE: dict[str, Any] = {"least": 0.0, "most": 1.0}
MILD = Roughness(room=0.0, equalise=0.0, telephone=0.0, noise=0.0, gaps=0.0)
PLAIN = replace(MILD, speed=(1.0, 1.0))  # as recorded


@dataclass(frozen=True, slots=True)
class Part:
    """Recordings and their texts, from one place; `data.sources` says what it may be."""

    path: str = field(
        metadata={"help": "a .jsonl, .csv, .tsv or .parquet file, a Common Voice or other folder, or hub:owner/name"}
    )
    split: str = knob("", "split of a Common Voice folder or a data set: train, dev, test, …")
    share: float = knob(0.0, "share of the seconds of every batch; 0: as long as it is", **SHARE)


@dataclass(frozen=True, slots=True)
class Data:
    """What is learnt from, what is measured on, and what is left out."""

    train: tuple[Part, ...] = field(metadata={"help": "recordings to learn from; one path, or a list of parts"})
    dev: tuple[Part, ...] = knob((), "measured during training; none: `hold_out` is taken from train")
    test: tuple[Part, ...] = knob((), "measured once, in the end")
    replay: tuple[Part, ...] = knob((), "recordings the checkpoint was good at, to watch what it forgets")
    hold_out: float = knob(
        0.05, "share of train to measure on where dev is empty; whole speakers, if they are named", **SHARE
    )
    shortest_s: float = knob(0.2, "shorter recordings are left out", least=0.0)
    longest_s: float = knob(20.0, "longer recordings are left out", least=0.0)
    strange: str = knob(
        "map",
        "letters the head lacks: map to near ones, drop, or reject the recording",
        choices=("map", "drop", "reject"),
    )
    letters: dict[str, str] = field(
        default_factory=dict, metadata={"help": "letters to write otherwise, before anything else: {ё: е}"}
    )
    measured: int = knob(300, "at most so many recordings of each dev set, the same each time; 0: all", least=0)


@dataclass(frozen=True, slots=True)
class Batch:
    """How recordings are put together."""

    seconds: float = knob(40.0, "seconds of sound a step and device", least=0.5)
    layout: str = knob("packed", "packed: end to end, no padding; padded: one row each", choices=("packed", "padded"))
    accumulate: int = knob(1, "batches whose gradients are summed before a step", least=1)


@dataclass(frozen=True, slots=True)
class Lora:
    """Low-rank updates (arXiv:2106.09685), in PEFT's format."""

    rank: int = knob(16, "rank of the updates", least=1)
    alpha: float = knob(32.0, "they are scaled by alpha / rank")
    dropout: float = knob(0.0, "dropout on their input", **SHARE)
    where: tuple[str, ...] = knob(("attention", "mlp"), "linears they sit on", choices=("attention", "mlp"))
    kind: str = knob(
        "lora",
        "lora; rslora: scaled by alpha / √rank (arXiv:2312.03732); dora: with a length of their own (arXiv:2402.09353)",
        choices=("lora", "rslora", "dora"),
    )


@dataclass(frozen=True, slots=True)
class Adapters:
    """Bottlenecks after each block, as MMS has them (arXiv:2305.13516): LayerNorm, down, ReLU, up, added."""

    width: int = knob(64, "width of the bottleneck", least=1)


@dataclass(frozen=True, slots=True)
class Optimise:
    """How weights move (AdamW)."""

    epochs: float = knob(10.0, "passes over the training recordings; ignored where steps are given", least=0.0)
    steps: int = knob(0, "steps of the optimiser; 0: as many as the epochs have", least=0)
    learning_rate: float = knob(
        0.0,
        "of what learns below the head; 0: 3e-5 for all, encoder and top-N, 5e-4 for the rest and for a student; of a "
        "language model 2e-4 for lora, 1e-5 for the rest",
        least=0.0,
    )
    head_times: float = knob(
        0.0, "the head learns so many times faster; 0: 10 for a new head, 1 for an old one", least=0.0
    )
    layer_decay: float = knob(
        1.0, "each block learns so many times as fast as the one above it (1: all alike)", **SHARE
    )
    schedule: str = knob("tri-stage", "learning rate over time", choices=("tri-stage", "cosine", "linear", "constant"))
    warmup: float = knob(0.1, "share of the steps in which the learning rate rises", **SHARE)
    hold: float = knob(0.4, "share of the steps at the full rate (tri-stage)", **SHARE)
    weight_decay: float = knob(0.01, "of matrices", least=0.0)
    betas: tuple[float, float] = knob((0.9, 0.98), "of AdamW", least=0.0, most=0.99999)
    clip: float = knob(1.0, "longest gradient", least=0.0)
    precision: str = knob(
        "auto", "auto: bf16 where the machine is fast at it, else float32", choices=("auto", "float32", "bf16", "fp16")
    )
    checkpointing: bool = knob(False, "recompute blocks in the backward pass: less memory, a third more time")
    ema: float = knob(
        0.0, "keep a moving average of the weights with this decay (0.999), and end with it", least=0.0, most=0.99999
    )
    seed: int = knob(0, "of everything that is drawn", least=0, most=2**31 - 1)


@dataclass(frozen=True, slots=True)
class Evaluate:
    """When the dev sets are measured, and what for."""

    every: int = knob(0, "steps between measurements; 0: ten in the run, at least 20 steps apart", least=0)
    patience: int = knob(0, "stop after so many measurements without a better one; 0: never", least=0)
    best: str = knob("wer", "the checkpoint that is kept has the lowest of these", choices=("wer", "cer", "loss"))
    examples: int = knob(3, "recordings whose text is shown at each measurement", least=0)
    trackers: tuple[str, ...] = knob((), "also write to these", choices=("tensorboard", "wandb"))


@dataclass(frozen=True, slots=True)
class Watch:
    """Sentinels, which stop a run that would waste a night. Each is off at 0."""

    blank: float = knob(0.99, "share of blank frames that counts as collapse", **SHARE)
    patience: int = knob(400, "steps that a collapse, or no learning at all, may last", least=0)
    divergence: float = knob(4.0, "times the best loss so far that counts as divergence", least=0.0)
    forgetting: float = knob(1.5, "times its error rate at the start, on replay, that counts as forgetting", least=0.0)
    frozen: bool = knob(True, "check that nothing frozen moves and that everything else gets a gradient")


@dataclass(frozen=True, slots=True)
class Parallel:
    """Across devices and machines."""

    devices: int = knob(1, "processes on each machine, one for each GPU", least=1)
    nodes: int = knob(1, "machines; each is told its number by the usual environment variables", least=1)
    strategy: str = knob("auto", "how weights are shared out", choices=("auto", "ddp", "zero2", "zero3", "fsdp"))


@dataclass(frozen=True, slots=True)
class Distil:
    """A teacher, the whole checkpoint as it was: for a smaller net that keeps some of its blocks, or for `qat`."""

    layers: int = knob(0, "blocks that the student keeps, chosen evenly; 0: all, and a teacher with qat only", least=0)
    emissions: float = knob(1.0, "weight of the difference to what the teacher says, frame by frame (KL)", least=0.0)
    hidden: float = knob(1.0, "weight of the difference to what the teacher hears, after each kept block", least=0.0)
    letters: float = knob(1.0, "weight of the loss on texts, where there are any", least=0.0)
    temperature: float = knob(1.0, "above 1, unlikely letters count more in emissions", least=0.01)


@dataclass(frozen=True, slots=True)
class Tuning:
    """A fine-tuning run. `train` says what learns; everything else is frozen."""

    model: str = field(
        metadata={"help": "checkpoint to start from: an alias, a folder, or a hub id owner/name[@revision]"}
    )
    data: Data
    task: str = knob("ctc", "what is learnt: ctc (letters from sound); causal has knobs of its own", choices=("ctc",))
    train: str = knob(
        "all", "what learns: head | adapters | lora | top-N (blocks) | encoder (blocks) | all; always the head too"
    )
    vocabulary: str = knob(
        "keep",
        "the head's letters: keep, new (from the texts), extend (keep, and add the texts')",
        choices=("keep", "new", "extend"),
    )
    language: str = knob("", "BCP 47 tag of what the model is to write, for its card")
    batch: Batch = field(default_factory=Batch)
    lora: Lora = field(default_factory=Lora)
    adapters: Adapters = field(default_factory=Adapters)
    qat: str = knob(
        "none",
        "learn with weights rounded as mowa shrink will: in int8 or int4; the checkpoint as it was teaches (distil)",
        choices=("none", "int8", "int4"),
    )
    qat_group: int = knob(32, "columns that share a step, of qat: int4: 32, 64 or 128", least=32, most=128)
    distil: Distil = field(default_factory=Distil)
    augment: Roughness = field(default_factory=lambda: MILD)
    masks: Masks = field(default_factory=Masks)
    optimise: Optimise = field(default_factory=Optimise)
    evaluate: Evaluate = field(default_factory=Evaluate)
    watch: Watch = field(default_factory=Watch)
    parallel: Parallel = field(default_factory=Parallel)

    @property
    def top(self) -> int | None:
        """How many of the topmost blocks learn, where `train` is top-N."""
        return top_of(self.train)

    @property
    def taught(self) -> bool:
        """Whether the checkpoint, as it was, is listened to: then recordings need no texts."""
        how = self.distil
        return bool(how.layers) or (self.qat != "none" and bool(how.emissions or how.hidden))


def read(path: Path, settings: dict[str, Any] | None = None) -> Tuning:
    """A recipe file → Tuning, with `settings` (dotted paths) turned. RecipeError names the wrong key's path."""
    found = schema.tree(path)
    return checked(schema.turned(found, settings or {}) if isinstance(found, dict) else found, str(path))


def checked(tree: Any, where: str) -> Tuning:
    """A tree of plain values → Tuning. A plain path under data stands for a list of one part."""
    tuning = schema.build(Tuning, in_parts(tree), where)
    refuse_nonsense(tuning, where, LEARNT)
    if tuning.distil.layers and (
        tuning.train != "all" or tuning.vocabulary != "keep" or tuning.batch.layout != "packed"
    ):
        raise RecipeError(f"{where}: distil: a student learns all, keeps the vocabulary, and is fed packed batches")
    if tuning.qat != "none":
        _rounded(tuning, f"{where}: qat")
    shares = [part.share for part in tuning.data.train]
    if any(shares) and not all(shares):
        raise RecipeError(f"{where}: data: train: some parts have a share and some have none; give all of them one")
    if "" in tuning.data.letters:
        raise RecipeError(f"{where}: data: letters: there is nothing to write otherwise in ''")
    if tuning.data.longest_s <= tuning.data.shortest_s:
        raise RecipeError(f"{where}: data: longest_s and shortest_s leave nothing in")
    _rough(tuning.augment, f"{where}: augment")
    _masks(tuning.masks, f"{where}: masks")
    return tuning


def top_of(train: str) -> int | None:
    """How many blocks the N of top-N is; None where `train` says something else."""
    found = re.fullmatch(r"top-([1-9]\d*)", train)
    return int(found[1]) if found else None


def in_parts(tree: Any) -> Any:
    """`tree` with everything that is measured or learnt from as lists of trees of `Part`."""
    if not isinstance(tree, dict) or not isinstance(tree.get("data"), dict):
        return tree
    named = {key: parts(value) for key, value in tree["data"].items() if key in ("train", "dev", "test", "replay")}
    return {**tree, "data": {**tree["data"], **named}}


def refuse_nonsense(plan: Any, where: str, learnt: tuple[str, ...]) -> None:
    """RecipeError for what no kind of tuning can mean; `learnt` is what `plan.train` may be."""
    if plan.train == "top-N" or (plan.train not in learnt and plan.top is None):
        raise RecipeError(f"{where}: train: {plan.train!r} is none of {', '.join(learnt)} (N a number of blocks)")
    how = plan.optimise
    if how.warmup + (how.hold if how.schedule == "tri-stage" else 0) > 1 + 1e-9:
        raise RecipeError(
            f"{where}: optimise: warmup and hold are shares of the steps and come to more than all of them"
        )
    if not how.steps and not how.epochs:
        raise RecipeError(f"{where}: optimise: steps and epochs are both 0; give one of them")
    if not plan.lora.where:
        raise RecipeError(f"{where}: lora: where: at least one is needed, found none")


def _rounded(plan: Tuning, where: str) -> None:
    """RecipeError for what cannot learn with rounded weights."""
    if plan.train in ("lora", "adapters"):
        raise RecipeError(
            f"{where}: with train: {plan.train} the checkpoint's own weights stay as they are: merge the adapter"
            " (mowa adapt merge), and let all, encoder or top-N learn"
        )
    if plan.train == "head":
        raise RecipeError(
            f"{where}: the head is not rounded, so train: head learns nothing of it: all, encoder or top-N"
        )
    if plan.vocabulary != "keep":
        raise RecipeError(f"{where}: a new head comes first, rounding after it: vocabulary: keep")
    if plan.taught and plan.batch.layout != "packed":
        raise RecipeError(
            f"{where}: the teacher is fed packed batches: batch: layout: packed, or distil: emissions and hidden: 0"
        )
    if plan.qat_group not in GROUPS:
        raise RecipeError(f"{where}_group is {plan.qat_group}; it must be one of {', '.join(map(str, GROUPS))}")


def _rough(how: Roughness, where: str) -> None:
    for name in ("room", "equalise", "telephone", "noise", "gaps"):
        _share(getattr(how, name), f"{where}: {name}")
    for name, (low, high) in (("speed", how.speed), ("snr_db", how.snr_db), ("loudness_db", how.loudness_db)):
        if low > high:
            raise RecipeError(f"{where}: {name}: {low} is more than {high}; the smaller one comes first")
    if how.speed[0] < 0.1:
        raise RecipeError(f"{where}: speed is {how.speed[0]}; it must be at least 0.1")


def _masks(how: Masks, where: str) -> None:
    for name in ("time", "features"):
        _share(getattr(how, name), f"{where}: {name}")
    for name in ("time_span", "features_span"):
        if getattr(how, name) < 1:
            raise RecipeError(f"{where}: {name} is {getattr(how, name)}; it must be at least 1")


def _share(value: float, where: str) -> None:
    if not 0 <= value <= 1:
        raise RecipeError(f"{where} is {value}; it is a share, from 0 to 1")


def parts(value: Any) -> Any:
    """What stands under data → a list of trees of `Part`: a path alone is a part, and a part alone a list of one."""
    if value is None:  # `dev:` with nothing behind it
        return []
    values = value if isinstance(value, list | tuple) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in values]
