"""Tuning of a language model as one value: a checkpoint, texts or conversations, what of it learns, and how.

What both kinds of tuning have (LoRA, how weights move, sentinels, devices) is `tuning`'s; here is what texts want.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mowa.errors import RecipeError
from mowa.training.config import schema
from mowa.training.config.ctc import (
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
from mowa.training.config.schema import option

METHODS = ("lora", "top-N", "full")


@dataclass(frozen=True, slots=True)
class CausalData:
    """What is learnt from, which words of it, and what is measured on."""

    train: tuple[DataSource, ...] = field(
        metadata={"help": "texts or conversations to learn from; one path, or a list of parts"}
    )
    dev: tuple[DataSource, ...] = option((), "measured during training; none: `hold_out` is taken from train")
    test: tuple[DataSource, ...] = option((), "measured once, in the end")
    hold_out: float = option(0.05, "share of train to measure on where dev is empty", **FRACTION)
    train_on: str = option(
        "auto",
        "the words that are learnt: responses, the last one, or all; auto: responses of conversations, all of a text",
        choices=("auto", "responses", "last", "all"),
    )
    chat_template: str = option("", "chat template where the tokenizer has none: chatml, or a .jinja file")
    max_length: int = option(2048, "tokens of the longest example; at most what the model reads", minimum=8)
    on_overflow: str = option(
        "drop", "longer examples: drop, truncate at the end, or split texts", choices=("drop", "truncate", "split")
    )
    on_invalid: str = option(
        "drop", "rows that are no conversation: drop and count them, or stop", choices=("drop", "stop")
    )
    max_eval_samples: int = option(
        300, "at most so many examples of each dev set, the same each time; 0: all", minimum=0
    )
    preview: int = option(3, "examples whose learnt words are shown before training", minimum=0)


@dataclass(frozen=True, slots=True)
class CausalBatch:
    """How examples are put together."""

    tokens: int = option(4096, "tokens a step and device", minimum=8)
    packing: bool = option(True, "concatenate samples without padding")
    gradient_accumulation_steps: int = option(1, "batches whose gradients are summed before a step", minimum=1)


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    """What is given up for memory, or for time."""

    accelerate: bool = option(True, "mowa's attention, norms, MLPs, LoRA and loss in place of the stock ones")
    base_scheme: str = option(
        "auto",
        "weights that do not learn are held in this precision; auto: as the run computes",
        choices=("auto", "float32", "bf16"),
    )
    activation_offload: bool = option(
        False, "with checkpointing: what is kept of each block waits in the host's memory (GPU)"
    )
    mlp_tiles: int = option(0, "MLPs go over the sequence in so many pieces; 0: in one", minimum=0)


@dataclass(frozen=True, slots=True)
class CausalEvaluation:
    """When the dev sets are measured."""

    eval_steps: int = option(0, "steps between measurements; 0: ten in the run, at least 20 steps apart", minimum=0)
    early_stopping_patience: int = option(
        0, "stop after so many measurements without a better loss; 0: never", minimum=0
    )
    report_to: tuple[str, ...] = option((), "also write to these", choices=("tensorboard", "wandb"))


@dataclass(frozen=True, slots=True)
class CausalRecipe:
    """A run that tunes a language model. `train` says what learns; everything else is frozen."""

    model: str = field(metadata={"help": "checkpoint to start from: a folder, or a hub id owner/name[@revision]"})
    data: CausalData
    task: str = option("causal", "what is learnt: causal (the next token)", choices=("causal",))
    method: str = option("lora", "what learns: lora | top-N (blocks, and the final norm) | all")
    batch: CausalBatch = field(default_factory=CausalBatch)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(epochs=2.0, lr_scheduler="cosine", weight_decay=0.0)
    )
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    evaluation: CausalEvaluation = field(default_factory=CausalEvaluation)
    monitors: MonitorConfig = field(default_factory=MonitorConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    @property
    def top_n(self) -> int | None:
        """How many of the topmost blocks learn, where `train` is top-N."""
        return parse_top_n(self.method)


def parse(tree: Any, where: str) -> CausalRecipe:
    """A tree of plain values → Instruction. A plain path under data stands for a list of one part."""
    plan = schema.from_dict(CausalRecipe, expand_sources(tree), where)
    validate_common(plan, where, METHODS)
    if plan.batch.tokens < plan.data.max_length:
        raise RecipeError(
            f"{where}: batch: tokens is {plan.batch.tokens} and data: length {plan.data.max_length}: an example of that "
            "length fits into no batch; raise the one or lower the other"
        )
    shares = [part.share for part in plan.data.train]
    if any(shares):
        raise RecipeError(
            f"{where}: data: train: shares are for recordings; texts are learnt as often as they are there"
        )
    for knob_of_recordings in ("ema", "head_times"):
        if getattr(plan.optimizer, knob_of_recordings):
            raise RecipeError(f"{where}: optimise: {knob_of_recordings} is for recordings; leave it at 0")
    if plan.memory.activation_offload and not plan.optimizer.gradient_checkpointing:
        raise RecipeError(f"{where}: memory: offload is of use only with optimise: checkpointing; turn that on too")
    return plan
