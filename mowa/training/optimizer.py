"""AdamW with a learning rate per block and for the head, and learning-rate schedules."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from mowa.training.config.ctc import CTCRecipe
from mowa.training.config.shared import OptimizerConfig
from mowa.types import Family

PRETRAINED_LR, NEW_WEIGHTS_LR = 3e-5, 5e-4  # default peak rates of pretrained and of new weights
BLOCK_PATTERN = re.compile(r"\.layers\.(\d+)\.")
FINAL_LR_RATIO = 0.05  # of the peak, at the end of tri-stage; as wav2vec 2.0 (arXiv:1904.08779 ends at 0.01)


def resolve_learning_rate(recipe: CTCRecipe) -> float:
    """Return the peak learning rate below the head: the recipe's, or the default of its method."""
    pretrained = recipe.method in ("full", "encoder") or recipe.top_n is not None
    return recipe.optimizer.learning_rate or (
        PRETRAINED_LR if pretrained and not recipe.distillation.student_layers else NEW_WEIGHTS_LR
    )


def build_param_groups(
    net: nn.Module, family: Family, config: OptimizerConfig, learning_rate: float, *, new_head: bool = False
) -> list[dict[str, Any]]:
    """Group the trainable parameters of `net` by learning rate and weight decay; only matrices are decayed.

    Args:
        net: the net, with requires_grad set.
        family: its family, which names the head.
        config: multipliers and weight decay.
        learning_rate: peak learning rate below the head.
        new_head: whether the head starts from random weights, which selects the automatic multiplier.
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
            multiplier = head
        else:
            block = BLOCK_PATTERN.search(name)
            depth = blocks - 1 - int(block[1]) if block else blocks
            multiplier = config.layerwise_lr_decay**depth
        members.setdefault((multiplier, parameter.ndim > 1), []).append(parameter)
    return [
        {"params": group, "lr": learning_rate * multiplier, "weight_decay": config.weight_decay if decayed else 0.0}
        for (multiplier, decayed), group in members.items()
    ]


def lr_lambda(config: OptimizerConfig, num_training_steps: int) -> Callable[[int], float]:
    """Return the schedule as a function of the step, relative to the peak learning rate.

    Source: tri-stage (warmup, hold, exponential decay to FINAL_LR_RATIO) is from arXiv:1904.08779.
    """
    warmup = max(1, round(config.warmup_ratio * num_training_steps))
    hold_end = warmup + round(config.hold_ratio * num_training_steps)

    def ratio(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, num_training_steps - warmup)
        if config.lr_scheduler == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        if config.lr_scheduler == "linear":
            return max(0.0, 1 - progress)
        if config.lr_scheduler == "tri-stage" and step > hold_end:
            decay = min(1.0, (step - hold_end) / max(1, num_training_steps - hold_end))
            return math.exp(math.log(FINAL_LR_RATIO) * decay)
        return 1.0

    return ratio


def create_lr_scheduler(optimizer: torch.optim.Optimizer, config: OptimizerConfig, num_training_steps: int) -> LambdaLR:
    return LambdaLR(optimizer, lr_lambda(config, num_training_steps))


class OptimizerMixin:
    """Give a stock Trainer our optimizer and schedule, created when the distributed strategy asks for them.

    Put it before the Trainer among the bases; the class defines `param_groups(net)`.
    """

    recipe: Any  # a recipe with an `optimizer` section
    param_groups: Callable[[nn.Module], list[dict[str, Any]]]

    def __init__(self, **settings: Any) -> None:
        from accelerate.utils import AutocastKwargs

        super().__init__(**settings)
        # every weight is used once per pass, so a cache of their casts would hold memory and save nothing
        self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)  # type: ignore[attr-defined]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        trainer: Any = self
        if trainer.optimizer is None:
            groups = self.param_groups(trainer.model if model is None else model)
            fused = not trainer.is_deepspeed_enabled
            trainer.optimizer = torch.optim.AdamW(groups, betas=self.recipe.optimizer.betas, fused=fused)
        optimizer: torch.optim.Optimizer = trainer.optimizer
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        trainer: Any = self
        if trainer.lr_scheduler is None:
            trainer.lr_scheduler = create_lr_scheduler(
                optimizer or trainer.optimizer, self.recipe.optimizer, num_training_steps
            )
        return trainer.lr_scheduler
