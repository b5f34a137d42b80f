"""The recipe of a language-model fine-tuning run: a checkpoint, texts or conversations, what is trained and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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

METHODS = ("lora", "top-N", "full")


@dataclass(frozen=True, slots=True)
class CausalData:
    """Texts or conversations to train and evaluate on, and which of their tokens are trained."""

    train: tuple[DataSource, ...] = field(
        metadata={"help": "texts or conversations to train on; a path, or a list of sources"}
    )
    dev: tuple[DataSource, ...] = option((), "evaluated during training; none: `hold_out` is taken from train")
    test: tuple[DataSource, ...] = option((), "evaluated once, at the end")
    hold_out: float = option(0.05, "fraction of train to evaluate on where dev is empty", **FRACTION)
    train_on: str = option(
        "auto",
        "tokens in the loss: responses, the last response, or all; auto: responses of conversations, all of texts",
        choices=("auto", "responses", "last", "all"),
    )
    chat_template: str = option("", "chat template where the tokenizer has none: chatml, plain, or a .jinja file")
    chat_template_kwargs: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "variables that the chat template reads: {enable_thinking: false}"}
    )
    columns: dict[str, str] = field(
        default_factory=dict,
        metadata={"help": "your names of columns and of keys in turns: {messages: log, role: who, content: says}"},
    )
    roles: dict[str, str] = field(
        default_factory=dict,
        metadata={"help": "your names of roles, as system, user, assistant or tool: {agent: assistant, caller: user}"},
    )
    add_tokens: tuple[str, ...] = option(
        (),
        "tokens to add to the tokenizer; their embeddings are trained, with LoRA too",
    )
    max_length: int = option(2048, "tokens of the longest sample; at most the model's context length", minimum=8)
    on_overflow: str = option(
        "drop",
        "samples longer than max_length: drop, truncate at the end, or split (texts only)",
        choices=("drop", "truncate", "split"),
    )
    on_invalid: str = option(
        "drop",
        "rows that are invalid, too long or refused by the template: drop and count them, or stop",
        choices=("drop", "stop"),
    )
    max_eval_samples: int = option(
        300, "samples of each dev set to evaluate at most, always the same ones; 0: all", minimum=0
    )
    preview: int = option(3, "samples to print before training, with the trained tokens highlighted", minimum=0)


@dataclass(frozen=True, slots=True)
class CausalBatch:
    """Batch size and layout."""

    tokens: int = option(4096, "tokens per step and device", minimum=8)
    packing: bool = option(True, "concatenate samples without padding; false: pad")
    gradient_accumulation_steps: int = option(1, "batches whose gradients are summed before a step", minimum=1)


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    """Memory savings, and mowa's kernels."""

    accelerate: bool = option(True, "use mowa's attention, norms, MLPs, LoRA and loss instead of the stock ones")
    base_scheme: str = option(
        "auto",
        "precision of frozen weights; auto: the compute dtype",
        choices=("auto", "float32", "bf16"),
    )
    activation_offload: bool = option(
        False, "keep checkpointed block inputs in host memory (GPU, with gradient_checkpointing)"
    )
    mlp_tiles: int = option(0, "split the sequence into this many tiles in each MLP; 0: no tiling", minimum=0)


@dataclass(frozen=True, slots=True)
class CausalEvaluation:
    """When the dev sets are evaluated."""

    eval_steps: int = option(0, "steps between evaluations; 0: ten in the run, at least 20 steps apart", minimum=0)
    early_stopping_patience: int = option(
        0, "stop after this many evaluations without improvement; 0: never", minimum=0
    )
    report_to: tuple[str, ...] = option((), "also log to these trackers", choices=("tensorboard", "wandb"))


@dataclass(frozen=True, slots=True)
class CausalRecipe:
    """A fine-tuning run of a language model. `method` selects what is trained; everything else is frozen."""

    model: str = field(metadata={"help": "checkpoint to start from: a folder, or a hub id owner/name[@revision]"})
    data: CausalData
    task: str = option("causal", "task: causal (next-token prediction)", choices=("causal",))
    method: str = option("lora", "weights to train: lora | top-N (blocks, and the final norm) | full")
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
        """Number of trained blocks of method top-N, else None."""
        return parse_top_n(self.method)

    @property
    def batches_per_step(self) -> int:
        """Batches that make up one optimizer step, over all devices."""
        return self.batch.gradient_accumulation_steps * self.distributed.devices * self.distributed.nodes


def parse(tree: Any, where: str) -> CausalRecipe:
    """Build and validate a recipe from a tree of plain values; under `data` a path stands for a list of one source.

    Raises:
        RecipeError: a key or value is wrong; the message starts with `where` and its path.
    """
    recipe = schema.from_dict(CausalRecipe, expand_sources(tree), where)
    validate_common(recipe, where, METHODS)
    if recipe.batch.tokens < recipe.data.max_length:
        raise RecipeError(
            f"{where}: batch: tokens ({recipe.batch.tokens}) is less than data: max_length ({recipe.data.max_length}), "
            "so the longest samples fit into no batch; raise tokens or lower max_length"
        )
    if any(source.share for source in recipe.data.train):
        raise RecipeError(f"{where}: data: train: share is for task: ctc only; texts are used in proportion to length")
    for name in ("ema_decay", "head_lr_multiplier"):
        if getattr(recipe.optimizer, name):
            raise RecipeError(f"{where}: optimizer: {name} is for task: ctc only; leave it at 0")
    if recipe.data.add_tokens and recipe.top_n is not None:
        raise RecipeError(f"{where}: data: add_tokens: method {recipe.method} trains no embeddings; use lora or full")
    if recipe.memory.activation_offload and not recipe.optimizer.gradient_checkpointing:
        raise RecipeError(f"{where}: memory: activation_offload needs optimizer: gradient_checkpointing: true")
    return recipe
