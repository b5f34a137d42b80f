"""Low-rank updates beside a net's linears (LoRA, arXiv:2106.09685), by PEFT, put into the net where it stands.

    y = W x + b + alpha / rank · B A x,     A random, B = 0: at first the net says what it said

The net stays the transformers module it was: `net.config`, `net.lm_head` and every block are where they were. The head
is no part of the updates; it learns as it is, and `store` keeps it whole (PEFT's `modules_to_save`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mowa.errors import MissingPart, RecipeError
from mowa.nouns import Family

NAME = "default"  # PEFT's for an adapter that needs no other


def package() -> Any:
    """PEFT; MissingPart where it is not installed."""
    try:
        import peft
    except ImportError:
        raise MissingPart("LoRA needs peft: pip install 'mowa[train]'") from None
    return peft


def has(net: Any) -> bool:
    """Whether `add`, or an adapter that was loaded, put updates into `net`."""
    return bool(getattr(net, "peft_config", None))


def add(
    net: Any, family: Family, *, rank: int, alpha: float, dropout: float = 0.0, where: Sequence[str] = ("attention",)
) -> Any:
    """Put updates of `rank`, scaled by alpha / rank, on the linears `where` (attention, mlp) of every block. → net.

    In place; everything but the updates is frozen (`freeze.learn` lets the head learn too). A is drawn from torch's
    generator. `dropout` is that of the updates' input while training.

    Raises RecipeError: linears that are not there, or that this family does not call; updates on a net that has some.
    MissingPart without PEFT.
    """
    targets = _linears(family, where)
    if has(net):
        raise RecipeError("lora: this net has low-rank updates already: merge them first, or start from its base")
    peft = package()
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=sorted(targets), bias="none"
    )
    net = peft.inject_adapter_in_model(config, net, NAME)
    for module in net.modules():
        if hasattr(module, "cast_input_dtype_enabled"):  # autocast casts what has to be cast, and to fewer bits
            module.cast_input_dtype_enabled = False
    return net


def _linears(family: Family, where: Sequence[str]) -> set[str]:
    if not where:
        raise RecipeError(f"lora: where: at least one is needed ({', '.join(family.linears)})")
    for place in where:
        if place in family.linears:
            continue
        if place == "attention":
            raise RecipeError(
                f"lora: where: attention: {family.name} hands the bare weights of its attention to a function of"
                f" torch, so an update there would never be asked; use where: [{', '.join(family.linears)}]"
            )
        raise RecipeError(f"lora: where: {place!r}: {family.name} has {', '.join(family.linears)}")
    return {name for place in where for name in family.linears[place]}
