"""Low-rank updates beside a net's linears (LoRA, arXiv:2106.09685), by PEFT, put into the net where it stands.

    y = W x + b + alpha / rank · B A x,     A random, B = 0: at first the net says what it said

The net stays the transformers module it was: `net.config`, `net.lm_head` and every block are where they were. The head
is no part of the updates; it learns as it is, and `store` keeps it whole (PEFT's `modules_to_save`).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mowa.errors import MissingDependency, RecipeError
from mowa.types import Family

ADAPTER_NAME = "default"  # PEFT's for an adapter that needs no other


def import_peft() -> Any:
    """PEFT; MissingPart where it is not installed."""
    try:
        import peft
    except ImportError:
        raise MissingDependency("LoRA needs peft: pip install 'mowa[train]'") from None
    return peft


def has(net: Any) -> bool:
    """Whether `add`, or an adapter that was loaded, put updates into `net`."""
    return bool(getattr(net, "peft_config", None))


def add(
    net: Any,
    family: Family,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: Sequence[str] = ("attention",),
    variant: str = "lora",
) -> Any:
    """Put updates of `rank`, scaled by alpha / rank, on the linears `where` (attention, mlp) of every block. → net.

    kind: lora, rslora (arXiv:2312.03732) or dora (arXiv:2402.09353).
    In place; everything but the updates is frozen (`freeze.learn` lets the head learn too). A is drawn from torch's
    generator. `dropout` is that of the updates' input while training.

    Raises RecipeError: linears that are not there, or that this family does not call; updates on a net that has some.
    MissingPart without PEFT.
    """
    settings = lora_config(
        family, rank=rank, alpha=alpha, dropout=dropout, target_modules=target_modules, variant=variant
    )
    if has(net):
        raise RecipeError("lora: this net has low-rank updates already: merge them first, or start from its base")
    net = import_peft().inject_adapter_in_model(settings, net, ADAPTER_NAME)
    for module in net.modules():
        if hasattr(module, "cast_input_dtype_enabled"):  # autocast casts what has to be cast, and to fewer bits
            module.cast_input_dtype_enabled = False
    return net


def get_peft_model(
    net: Any, family: Family, *, rank: int, alpha: float, dropout: float, target_modules: Sequence[str], variant: str
) -> Any:
    """A PeftModel around `net`, a causal one, with such updates; what of it learns are the updates alone.

    Trainers know a PeftModel: their checkpoints hold the updates and not the net. Raises as `add` does.
    """
    if has(net):
        raise RecipeError("lora: this net has low-rank updates already: merge them first, or start from its base")
    peft = import_peft()
    settings = lora_config(
        family,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        target_modules=target_modules,
        variant=variant,
        task_type="CAUSAL_LM",
    )
    with suppress_peft_warnings():
        return peft.get_peft_model(net, settings)


def load_peft_model(net: Any, folder: Path, **options: Any) -> Any:
    """A PeftModel around `net` with the updates in `folder`, as PEFT reads them."""
    with suppress_peft_warnings():
        return import_peft().PeftModel.from_pretrained(net, folder, **options)


def merge_and_unload(net: Any, dtype: Any = None) -> None:
    """Every linear of `net` with updates becomes a plain one that has them in its weights, in `dtype` (or its own).

    In place, but no tensor is written to: another net may have it too. Sums are made in float64 and rounded once.
    """
    layer = import_peft().tuners.lora.LoraLayer
    for name, module in [(name, module) for name, module in net.named_modules() if isinstance(module, layer)]:
        alone: Any = copy.deepcopy(module).double()
        alone.merge(safe_merge=True)
        kind = dtype or module.get_base_layer().weight.dtype
        net.set_submodule(name, alone.get_base_layer().to(kind).requires_grad_(False))


@contextmanager
def suppress_peft_warnings() -> Iterator[None]:
    """PEFT and TRL ask by a name that transformers has given up, and transformers tells people so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing`", FutureWarning)
        yield


def lora_config(
    family: Family,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: Sequence[str],
    variant: str,
    task_type: str | None = None,
) -> Any:
    """PEFT's LoraConfig of such updates. RecipeError: linears that are not there, or that this family does not call."""
    return import_peft().LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=sorted(_linears(family, target_modules)),
        bias="none",
        use_rslora=variant == "rslora",
        use_dora=variant == "dora",
        task_type=task_type,
    )


def _linears(family: Family, target_modules: Sequence[str]) -> set[str]:
    if not target_modules:
        raise RecipeError(f"lora: where: at least one is needed ({', '.join(family.linears)})")
    for place in target_modules:
        if place in family.linears:
            continue
        if place == "attention":
            raise RecipeError(
                f"lora: where: attention: {family.name} hands the bare weights of its attention to a function of"
                f" torch, so an update there would never be asked; use where: [{', '.join(family.linears)}]"
            )
        raise RecipeError(f"lora: where: {place!r}: {family.name} has {', '.join(family.linears)}")
    return {name for place in target_modules for name in family.linears[place]}
