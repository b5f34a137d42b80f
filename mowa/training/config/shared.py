"""Recipe sections and checks that every task has: data sources, LoRA, optimizer, monitors, devices."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from mowa.errors import RecipeError
from mowa.training.config.schema import option

FRACTION: dict[str, Any] = {"minimum": 0.0, "maximum": 1.0}


@dataclass(frozen=True, slots=True)
class DataSource:
    """Samples from one place: a manifest, a folder or a data set on the hub."""

    path: str = field(
        metadata={"help": "a .jsonl, .csv, .tsv or .parquet file, a Common Voice or other folder, or hub:owner/name"}
    )
    split: str = option("", "split of a Common Voice folder or a data set: train, dev, test, …")
    share: float = option(
        0.0, "fraction of the seconds of every batch (CTC only); 0: proportional to its length", **FRACTION
    )


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Low-rank adapters (arXiv:2106.09685), saved in PEFT's format."""

    rank: int = option(16, "rank of the update matrices", minimum=1)
    alpha: float = option(32.0, "the update is scaled by alpha / rank")
    dropout: float = option(0.0, "dropout on the input of the update", **FRACTION)
    target_modules: tuple[str, ...] = option(
        ("all-linear",),
        "groups of linear layers that get an update; all-linear: all that the model's family has",
        choices=("all-linear", "attention", "mlp"),
    )
    variant: str = option(
        "lora",
        "lora; rslora: scaled by alpha / √rank (arXiv:2312.03732); dora: with a trained magnitude (arXiv:2402.09353)",
        choices=("lora", "rslora", "dora"),
    )
    modules_to_save: tuple[str, ...] = option(
        (), "modules trained in full beside LoRA and saved with it, such as embed_tokens and lm_head (causal only)"
    )
    target_parameters: tuple[str, ...] = option(
        (), "tensors of experts that get an update too, such as experts.gate_up_proj (causal only)"
    )


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    epochs: float = option(10.0, "passes over the training data; ignored where max_steps is set", minimum=0.0)
    max_steps: int = option(0, "optimizer steps; 0: as many as the epochs have", minimum=0)
    learning_rate: float = option(
        0.0,
        "peak learning rate of everything below the head; 0 = auto. CTC: 3e-5 for full, encoder and top-N, 5e-4 for "
        "other methods and for a student. Causal: 2e-4 for lora, 1e-5 for other methods",
        minimum=0.0,
    )
    head_lr_multiplier: float = option(
        0.0, "learning-rate multiplier of the CTC head; 0 = auto: 10 for a new head, else 1", minimum=0.0
    )
    layerwise_lr_decay: float = option(
        1.0, "learning rate of each block relative to the block above it; 1: the same for all", **FRACTION
    )
    lr_scheduler: str = option(
        "tri-stage", "learning-rate schedule", choices=("tri-stage", "cosine", "linear", "constant")
    )
    warmup_ratio: float = option(0.1, "fraction of the steps with linear warmup", **FRACTION)
    hold_ratio: float = option(0.4, "fraction of the steps at the peak learning rate (tri-stage)", **FRACTION)
    weight_decay: float = option(0.01, "weight decay of matrices; vectors have none", minimum=0.0)
    betas: tuple[float, float] = option((0.9, 0.98), "betas of AdamW", minimum=0.0, maximum=0.99999)
    max_grad_norm: float = option(1.0, "clip gradients to this norm", minimum=0.0)
    precision: str = option(
        "auto",
        "compute dtype; auto: bf16 where this machine is fast at it, else float32",
        choices=("auto", "float32", "bf16", "fp16"),
    )
    gradient_checkpointing: bool = option(
        False, "recompute blocks in the backward pass: less memory, about a third more time"
    )
    ema_decay: float = option(
        0.0,
        "decay of an exponential moving average of the weights, which is what the run saves (0.999); 0: off (CTC only)",
        minimum=0.0,
        maximum=0.99999,
    )
    seed: int = option(0, "random seed", minimum=0, maximum=2**31 - 1)


@dataclass(frozen=True, slots=True)
class MonitorConfig:
    """Checks that stop a run which cannot succeed. 0 turns a check off."""

    blank_ratio: float = option(0.99, "fraction of blank frames that counts as collapse (CTC only)", **FRACTION)
    collapse_patience: int = option(
        400, "steps for which a collapse, or a loss that does not decrease, is tolerated", minimum=0
    )
    divergence_factor: float = option(4.0, "a loss above this multiple of the best one is divergence", minimum=0.0)
    forgetting_factor: float = option(
        1.5, "an error rate on replay above this multiple of the initial one is forgetting (CTC only)", minimum=0.0
    )
    check_frozen: bool = option(True, "check that frozen weights do not change and all others get a gradient")


@dataclass(frozen=True, slots=True)
class DistributedConfig:
    """Devices and machines."""

    devices: int = option(1, "processes on each machine, one per GPU", minimum=1)
    nodes: int = option(1, "machines; each reads its rank from the usual environment variables", minimum=1)
    strategy: str = option("auto", "how weights are sharded", choices=("auto", "ddp", "zero2", "zero3", "fsdp"))


def parse_top_n(method: str) -> int | None:
    """Return N of a method `top-N`, None for other methods."""
    found = re.fullmatch(r"top-([1-9]\d{0,5})", method)  # int() rejects thousands of digits
    return int(found[1]) if found else None


def expand_sources(tree: Any) -> Any:
    """Return the recipe `tree` with each data key (train, dev, test, replay) as a list of `DataSource` trees."""
    if not isinstance(tree, dict) or not isinstance(tree.get("data"), dict):
        return tree
    named = {key: as_sources(value) for key, value in tree["data"].items() if key in ("train", "dev", "test", "replay")}
    return {**tree, "data": {**tree["data"], **named}}


def as_sources(value: Any) -> Any:
    """Return the value of a data key as a list of `DataSource` trees; a path or a single source becomes a list."""
    if value is None:  # `dev:` without a value
        return []
    values = value if isinstance(value, list | tuple) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in values]


def validate_common(recipe: Any, where: str, methods: tuple[str, ...]) -> None:
    """Check what holds for every task.

    Raises:
        RecipeError: the method is none of `methods`, or the schedule or LoRA targets make no sense.
    """
    if recipe.method == "top-N" or (recipe.method not in methods and recipe.top_n is None):
        raise RecipeError(
            f"{where}: method: {recipe.method!r} is not one of {', '.join(methods)} (N: a number of blocks)"
        )
    config = recipe.optimizer
    if config.warmup_ratio + (config.hold_ratio if config.lr_scheduler == "tri-stage" else 0) > 1 + 1e-9:
        raise RecipeError(
            f"{where}: optimizer: warmup_ratio and hold_ratio add up to more than 1; they are fractions of the steps"
        )
    if not config.max_steps and not config.epochs:
        raise RecipeError(f"{where}: optimizer: max_steps and epochs are both 0; set one of them")
    if not recipe.lora.target_modules:
        raise RecipeError(f"{where}: lora: target_modules: empty; at least one is required")
