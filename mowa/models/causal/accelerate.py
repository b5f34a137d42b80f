"""One causal net made faster, and put back: attention, norms, MLPs, LoRA and the loss, each swapped on this net alone.

Nothing of transformers, PEFT or TRL is assigned to; another net in the process never notices. What was swapped and what
was left, with the reason, is said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from mowa.families import get_family
from mowa.models.causal import attention_interface, fused_loss, fused_modules

_UNDO: WeakKeyDictionary[nn.Module, list[Callable[[], object]]] = WeakKeyDictionary()

DESCRIPTIONS = {
    "rms_norm": "in one operation, whose backward pass keeps its input alone",
    "rms_norm_plus_one": "in one operation, whose backward pass keeps its input alone",
    "swiglu": "in one operation, whose backward pass makes the gate again",
    "geglu": "in one operation, whose backward pass makes the gate again",
    "lora_linear": "weight and update as one operation without passing copies",
    "tiled": "MLPs a part of the sequence at a time",
}


@dataclass(frozen=True, slots=True)
class Change:
    """What was done to how many modules of a net, or why it was not (`count` 0)."""

    operation: str
    count: int
    reason: str

    def __str__(self) -> str:
        return f"{self.operation:<14} {self.count or '–':>4}  {self.reason}"


def accelerate(net: Any, *, mlp_tiles: int = 0) -> tuple[Change, ...]:
    """Swap what can be swapped on `net`, a transformers net or a PeftModel around one. → what was, and what was not.

    tiles: MLPs go over the sequence in so many pieces. Call it after adapters are in; `restore` before they go.
    """
    stock = net.get_base_model() if hasattr(net, "get_base_model") else net
    restore(stock)
    family = get_family(stock.config.model_type)
    undo: list[Callable[[], object]] = []
    _UNDO[stock] = undo
    changes = []
    if why := attention_interface.unsupported_reason(stock):
        changes.append(Change("attention", 0, why))
    else:
        undo.append(attention_interface.install_attention(stock))
        changes.append(Change("attention", 1, "each document by itself, no mask of all against all"))
    swapped = fused_modules.fuse_modules(stock, family, mlp_tiles=mlp_tiles)
    undo.append(swapped.restore)
    changes += [Change(_spoken(op), count, DESCRIPTIONS[op]) for op, count in swapped.counts.items()]
    changes += [Change(_spoken(op), 0, f"{count} stay: {why}") for (op, why), count in swapped.skipped.items()]
    if why := family.unsupported.get("fused_head") or fused_loss.unsupported_reason(stock):
        changes.append(Change("loss", 0, why))
    else:
        undo.append(fused_loss.fuse_loss(stock))
        changes.append(Change("loss", 1, "of learnt tokens only, without logits of the rest"))
    return tuple(changes)


def restore(net: Any) -> None:
    """Put back whatever `accelerate` swapped on `net`; nothing where it swapped nothing."""
    stock = net.get_base_model() if hasattr(net, "get_base_model") else net
    for one in reversed(_UNDO.pop(stock, [])):
        one()


def _spoken(op: str) -> str:
    return op.replace("_plus_one", "").replace("_", " ")
