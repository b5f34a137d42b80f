"""How the weights of a fine-tuning run move: AdamW with a rate for the head and for each block, over a schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from mowa.nouns import Family
from mowa.train.tuning import Optimise, Tuning

GENTLE, BOLD = 3e-5, 5e-4  # for weights that were trained already, and for new ones
BLOCK = re.compile(r"\.layers\.(\d+)\.")
LAST = 0.05  # of the full rate, where tri-stage ends (arXiv:1904.08779 ends at a hundredth, wav2vec 2.0 at 0.05)


def rate(plan: Tuning) -> float:
    """The learning rate below the head, as given or as suits what learns."""
    gentle = plan.train in ("all", "encoder") or plan.top is not None
    return plan.optimise.learning_rate or (GENTLE if gentle and not plan.distil.layers else BOLD)


def groups(
    net: nn.Module, family: Family, how: Optimise, base: float, *, new_head: bool = False
) -> list[dict[str, Any]]:
    """Parameter groups of what learns in `net`: matrices are decayed and vectors not, and each group has its rate.

    base: the learning rate below the head.
    """
    head = how.head_times or (10.0 if new_head and base <= 1e-4 else 1.0)
    blocks = 1 + max((int(found[1]) for name, _ in net.named_parameters() if (found := BLOCK.search(name))), default=-1)
    members: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        if f"{family.head}." in f"{name}.":
            times = head
        else:
            block = BLOCK.search(name)
            depth = blocks - 1 - int(block[1]) if block else blocks
            times = how.layer_decay**depth
        members.setdefault((times, parameter.ndim > 1), []).append(parameter)
    return [
        {"params": group, "lr": base * times, "weight_decay": how.weight_decay if decayed else 0.0}
        for (times, decayed), group in members.items()
    ]


def schedule(how: Optimise, steps: int) -> Callable[[int], float]:
    """Step → share of the full rate. Tri-stage: up, hold, and down exponentially to LAST (arXiv:1904.08779)."""
    rising = max(1, round(how.warmup * steps))
    held = rising + round(how.hold * steps)

    def share(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        gone = (step - rising) / max(1, steps - rising)
        if how.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, gone)))
        if how.schedule == "linear":
            return max(0.0, 1 - gone)
        if how.schedule == "tri-stage" and step > held:
            return math.exp(math.log(LAST) * min(1.0, (step - held) / max(1, steps - held)))
        return 1.0

    return share


def scheduler(optimizer: torch.optim.Optimizer, how: Optimise, steps: int) -> LambdaLR:
    return LambdaLR(optimizer, schedule(how, steps))


class OwnOptimiser:
    """What a stock Trainer is given besides: our optimiser, made when (and over the parameters) the strategy wants it.

    Stands before the Trainer among a class's bases, which says in `groups` what learns how fast.
    """

    tuning: Any  # a recipe with `optimise`
    groups: Callable[[nn.Module], list[dict[str, Any]]]

    def __init__(self, **settings: Any) -> None:
        from accelerate.utils import AutocastKwargs

        super().__init__(**settings)
        # every weight is used once a pass: a cache of their casts would hold memory and save nothing
        self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)  # type: ignore[attr-defined]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        trainer: Any = self
        if trainer.optimizer is None:
            groups = self.groups(trainer.model if model is None else model)
            fused = not trainer.is_deepspeed_enabled  # one pass over the weights instead of ten
            trainer.optimizer = torch.optim.AdamW(groups, betas=self.tuning.optimise.betas, fused=fused)
        optimizer: torch.optim.Optimizer = trainer.optimizer
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        trainer: Any = self
        if trainer.lr_scheduler is None:
            moved = optimizer or trainer.optimizer
            trainer.lr_scheduler = scheduler(moved, self.tuning.optimise, num_training_steps)
        return trainer.lr_scheduler
