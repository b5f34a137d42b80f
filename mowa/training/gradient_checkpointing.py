"""Recompute a net's blocks in the backward pass instead of storing their activations."""

from __future__ import annotations

from typing import Any


def set_gradient_checkpointing(net: Any, enabled: bool = True) -> None:
    """Recompute the blocks of `net` in the backward pass, or no longer: less memory, more time."""
    renamed = hasattr(net, "activation_checkpointing_enable")  # since transformers 5.2x
    verb = "activation_checkpointing" if renamed else "gradient_checkpointing"
    if enabled:
        getattr(net, f"{verb}_enable")({"use_reentrant": False})
    else:
        getattr(net, f"{verb}_disable")()
