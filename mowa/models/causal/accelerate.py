"""Accelerate one causal net, reversibly: attention, norms, MLPs, LoRA and the loss are replaced on this net alone.

Nothing in transformers, PEFT or TRL is patched; other nets in the process are not affected. `accelerate` returns what
was replaced and what was not, with reasons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from mowa.families import family_of
from mowa.models.causal import attention_interface, fused_loss, fused_modules

_UNDO: WeakKeyDictionary[nn.Module, list[Callable[[], object]]] = WeakKeyDictionary()

DESCRIPTIONS = {
    "rms_norm": "fused; the backward pass needs the input only",
    "rms_norm_plus_one": "fused; the backward pass needs the input only",
    "swiglu": "fused; the backward pass recomputes the gate",
    "geglu": "fused; the backward pass recomputes the gate",
    "lora_linear": "weight and update in one operation",
    "tiled_mlp": "MLPs over tiles of the sequence",
}
FUSED_LOSS_DESCRIPTION = "of trained tokens only, without the logits of a whole batch"


@dataclass(frozen=True, slots=True)
class Change:
    """What was replaced on how many modules, or why it was not (count 0)."""

    operation: str
    count: int
    reason: str

    def __str__(self) -> str:
        return f"{self.operation:<14} {self.count or '–':>4}  {self.reason}"


def accelerate(net: Any, *, mlp_tiles: int = 0) -> tuple[Change, ...]:
    """Replace what can be made faster on `net`, in place, and return what was and was not replaced.

    Call it after adapters are added; call `restore` before they are removed.

    Args:
        net: a transformers causal net, or a PeftModel around one.
        mlp_tiles: run MLPs over this many tiles of the sequence, to save memory; 0: no tiling.
    """
    stock = net.get_base_model() if hasattr(net, "get_base_model") else net
    restore(stock)
    family = family_of(stock)
    if reason := family.unsupported.get("acceleration"):
        return (Change("acceleration", 0, f"{family.name}: {reason}"),)
    undo: list[Callable[[], object]] = []
    _UNDO[stock] = undo
    changes = []
    if reason := attention_interface.unsupported_reason(stock):
        changes.append(Change("attention", 0, reason))
    else:
        undo.append(attention_interface.install_attention(stock))
        changes.append(Change("attention", 1, "each document separately, without a dense mask"))
    fused = fused_modules.fuse_modules(stock, family, mlp_tiles=mlp_tiles)
    undo.append(fused.restore)
    changes += [Change(_label(op), count, DESCRIPTIONS[op]) for op, count in fused.counts.items()]
    changes += [
        Change(_label(op), 0, f"{count} not replaced: {reason}") for (op, reason), count in fused.skipped.items()
    ]
    if reason := family.unsupported.get("fused_loss") or fused_loss.unsupported_reason(stock):
        changes.append(Change("loss", 0, reason))
    else:
        undo.append(fused_loss.fuse_loss(stock))
        changes.append(Change("loss", 1, FUSED_LOSS_DESCRIPTION))
    return tuple(changes)


def restore(net: Any) -> None:
    """Undo `accelerate` on `net`; does nothing if it was not accelerated."""
    stock = net.get_base_model() if hasattr(net, "get_base_model") else net
    for undo in reversed(_UNDO.pop(stock, [])):
        undo()


def _label(op: str) -> str:
    return op.replace("_plus_one", "").replace("_", " ")
