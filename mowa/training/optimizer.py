"""How the weights of a fine-tuning run move: AdamW with a rate for the head and for each block, over a schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from mowa.training.config.ctc import CTCRecipe, OptimizerConfig
from mowa.types import Family

PRETRAINED_LR, NEW_WEIGHTS_LR = 3e-5, 5e-4  # for weights that were trained already, and for new ones
BLOCK_PATTERN = re.compile(r"\.layers\.(\d+)\.")
FINAL_LR_RATIO = (
    0.05  # of the full rate, where tri-stage ends (arXiv:1904.08779 ends at a hundredth, wav2vec 2.0 at 0.05)
)


def resolve_learning_rate(recipe: CTCRecipe) -> float:
    """The learning rate below the head, as given or as suits what learns."""
    gentle = recipe.method in ("full", "encoder") or recipe.top_n is not None
    return recipe.optimizer.learning_rate or (
        PRETRAINED_LR if gentle and not recipe.distillation.student_layers else NEW_WEIGHTS_LR
    )


def build_param_groups(
    net: nn.Module, family: Family, config: OptimizerConfig, learning_rate: float, *, new_head: bool = False
) -> list[dict[str, Any]]:
    """Parameter groups of what learns in `net`: matrices are decayed and vectors not, and each group has its rate.

    base: the learning rate below the head.
    """
    head = config.head_lr_multiplier or (10.0 if new_head and learning_rate <= 1e-4 else 1.0)
    blocks = 1 + max(
        (int(found[1]) for name, _ in net.named_parameters() if (found := BLOCK_PATTERN.search(name))), default=-1
    )
    members: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        if f"{family.head}." in f"{name}.":
            times = head
        else:
            block = BLOCK_PATTERN.search(name)
            depth = blocks - 1 - int(block[1]) if block else blocks
            times = config.layerwise_lr_decay**depth
        members.setdefault((times, parameter.ndim > 1), []).append(parameter)
    return [
        {"params": group, "lr": learning_rate * times, "weight_decay": config.weight_decay if decayed else 0.0}
        for (times, decayed), group in members.items()
    ]


def lr_lambda(config: OptimizerConfig, num_training_steps: int) -> Callable[[int], float]:
    """Step → share of the full rate. Tri-stage: up, hold, and down exponentially to LAST (arXiv:1904.08779)."""
    rising = max(1, round(config.warmup_ratio * num_training_steps))
    held = rising + round(config.hold_ratio * num_training_steps)

    def share(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        gone = (step - rising) / max(1, num_training_steps - rising)
        if config.lr_scheduler == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, gone)))
        if config.lr_scheduler == "linear":
            return max(0.0, 1 - gone)
        if config.lr_scheduler == "tri-stage" and step > held:
            return math.exp(math.log(FINAL_LR_RATIO) * min(1.0, (step - held) / max(1, num_training_steps - held)))
        return 1.0

    return share


def create_lr_scheduler(optimizer: torch.optim.Optimizer, config: OptimizerConfig, num_training_steps: int) -> LambdaLR:
    return LambdaLR(optimizer, lr_lambda(config, num_training_steps))


class OptimizerMixin:
    """What a stock Trainer is given besides: our optimiser, made when (and over the parameters) the strategy wants it.

    Stands before the Trainer among a class's bases, which says in `groups` what learns how fast.
    """

    recipe: Any  # a recipe with `optimise`
    param_groups: Callable[[nn.Module], list[dict[str, Any]]]

    def __init__(self, **settings: Any) -> None:
        from accelerate.utils import AutocastKwargs

        super().__init__(**settings)
        # every weight is used once a pass: a cache of their casts would hold memory and save nothing
        self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)  # type: ignore[attr-defined]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        trainer: Any = self
        if trainer.optimizer is None:
            groups = self.param_groups(trainer.model if model is None else model)
            fused = not trainer.is_deepspeed_enabled  # one pass over the weights instead of ten
            trainer.optimizer = torch.optim.AdamW(groups, betas=self.recipe.optimise.betas, fused=fused)
        optimizer: torch.optim.Optimizer = trainer.optimizer
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        trainer: Any = self
        if trainer.lr_scheduler is None:
            moved = optimizer or trainer.optimizer
            trainer.lr_scheduler = create_lr_scheduler(moved, self.recipe.optimise, num_training_steps)
        return trainer.lr_scheduler
