"""Tuning of a language model as one value: a checkpoint, texts or conversations, what of it learns, and how.

What both kinds of tuning have (LoRA, how weights move, sentinels, devices) is `tuning`'s; here is what texts want.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mowa.errors import RecipeError
from mowa.train import schema
from mowa.train.schema import knob
from mowa.train.tuning import SHARE, Lora, Optimise, Parallel, Part, Watch, in_parts, refuse_nonsense, top_of

LEARNT = ("lora", "top-N", "all")


@dataclass(frozen=True, slots=True)
class TextData:
    """What is learnt from, which words of it, and what is measured on."""

    train: tuple[Part, ...] = field(
        metadata={"help": "texts or conversations to learn from; one path, or a list of parts"}
    )
    dev: tuple[Part, ...] = knob((), "measured during training; none: `hold_out` is taken from train")
    test: tuple[Part, ...] = knob((), "measured once, in the end")
    hold_out: float = knob(0.05, "share of train to measure on where dev is empty", **SHARE)
    learn: str = knob(
        "auto",
        "the words that are learnt: responses, the last one, or all; auto: responses of conversations, all of a text",
        choices=("auto", "responses", "last", "all"),
    )
    template: str = knob("", "chat template where the tokenizer has none: chatml, or a .jinja file")
    length: int = knob(2048, "tokens of the longest example; at most what the model reads", least=8)
    long: str = knob(
        "drop", "longer examples: drop, truncate at the end, or split texts", choices=("drop", "truncate", "split")
    )
    bad: str = knob("drop", "rows that are no conversation: drop and count them, or stop", choices=("drop", "stop"))
    measured: int = knob(300, "at most so many examples of each dev set, the same each time; 0: all", least=0)
    shown: int = knob(3, "examples whose learnt words are shown before training", least=0)


@dataclass(frozen=True, slots=True)
class TextBatch:
    """How examples are put together."""

    tokens: int = knob(4096, "tokens a step and device", least=8)
    layout: str = knob("packed", "packed: end to end, no padding; padded: one row each", choices=("packed", "padded"))
    accumulate: int = knob(1, "batches whose gradients are summed before a step", least=1)


@dataclass(frozen=True, slots=True)
class Memory:
    """What is given up for memory, or for time."""

    accelerate: bool = knob(True, "mowa's attention, norms, MLPs, LoRA and loss in place of the stock ones")
    base: str = knob(
        "auto",
        "weights that do not learn are held in this precision; auto: as the run computes",
        choices=("auto", "float32", "bf16"),
    )
    offload: bool = knob(False, "with checkpointing: what is kept of each block waits in the host's memory (GPU)")
    tiles: int = knob(0, "MLPs go over the sequence in so many pieces; 0: in one", least=0)


@dataclass(frozen=True, slots=True)
class TextEvaluate:
    """When the dev sets are measured."""

    every: int = knob(0, "steps between measurements; 0: ten in the run, at least 20 steps apart", least=0)
    patience: int = knob(0, "stop after so many measurements without a better loss; 0: never", least=0)
    trackers: tuple[str, ...] = knob((), "also write to these", choices=("tensorboard", "wandb"))


@dataclass(frozen=True, slots=True)
class Instruction:
    """A run that tunes a language model. `train` says what learns; everything else is frozen."""

    model: str = field(metadata={"help": "checkpoint to start from: a folder, or a hub id owner/name[@revision]"})
    data: TextData
    task: str = knob("causal", "what is learnt: causal (the next token)", choices=("causal",))
    train: str = knob("lora", "what learns: lora | top-N (blocks, and the final norm) | all")
    batch: TextBatch = field(default_factory=TextBatch)
    lora: Lora = field(default_factory=Lora)
    optimise: Optimise = field(default_factory=lambda: Optimise(epochs=2.0, schedule="cosine", weight_decay=0.0))
    memory: Memory = field(default_factory=Memory)
    evaluate: TextEvaluate = field(default_factory=TextEvaluate)
    watch: Watch = field(default_factory=Watch)
    parallel: Parallel = field(default_factory=Parallel)

    @property
    def top(self) -> int | None:
        """How many of the topmost blocks learn, where `train` is top-N."""
        return top_of(self.train)


def checked(tree: Any, where: str) -> Instruction:
    """A tree of plain values → Instruction. A plain path under data stands for a list of one part."""
    plan = schema.build(Instruction, in_parts(tree), where)
    refuse_nonsense(plan, where, LEARNT)
    if plan.batch.tokens < plan.data.length:
        raise RecipeError(
            f"{where}: batch: tokens is {plan.batch.tokens} and data: length {plan.data.length}: an example of that "
            "length fits into no batch; raise the one or lower the other"
        )
    shares = [part.share for part in plan.data.train]
    if any(shares):
        raise RecipeError(
            f"{where}: data: train: shares are for recordings; texts are learnt as often as they are there"
        )
    for knob_of_recordings in ("ema", "head_times"):
        if getattr(plan.optimise, knob_of_recordings):
            raise RecipeError(f"{where}: optimise: {knob_of_recordings} is for recordings; leave it at 0")
    if plan.memory.offload and not plan.optimise.checkpointing:
        raise RecipeError(f"{where}: memory: offload is of use only with optimise: checkpointing; turn that on too")
    return plan
