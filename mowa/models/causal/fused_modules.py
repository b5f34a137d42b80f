"""Fused kernels in the place of single modules' own forward, on one net, and back again.

A swap is one attribute, `forward`, on one module; its class, its weights, its hooks and every other net stay as they
are. A module is swapped only if its class is one the family names, it gives the same numbers on a trial input, and the
kernel was measured to be faster on its device. A copy of a swapped net, or one read from a file, is swapped as well.

Not swapped: rotary embeddings. transformers' attention calls a function of its module for them, and to replace that
would touch other nets. `kernels.rope` serves attention that is written here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mowa.errors import ModelError
from mowa.kernels.glu import geglu, swiglu
from mowa.kernels.lora_linear import lora_linear
from mowa.kernels.offload import OffloadedCheckpoint
from mowa.kernels.rms_norm import rms_norm
from mowa.kernels.tiled_mlp import apply_tiled
from mowa.types import Family

OPS = ("rms_norm", "rms_norm_plus_one", "swiglu", "geglu", "lora_linear")

# By device: what was measured to be faster than transformers' and PEFT's own modules. Forward and backward over 2048
# tokens of SmolLM2-135M's widths, processor seconds of one thread, float32 and bf16: RMS norms 1.6 to 2.4 and 1.2 to
# 1.6 times as fast, updated linears 1.04 to 1.09 and 1.02 to 1.06 (under autocast level, with less than half kept);
# swiglu 1.02 and 0.80, geglu (two threads) 0.8 and 0.7: they keep a tensor fewer, but activate twice.
FASTER_OPS: Mapping[str, frozenset[str]] = {"cpu": frozenset({"rms_norm", "rms_norm_plus_one", "lora_linear"})}

_GATES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": swiglu,
    "gelu_tanh": geglu,
    "gelu": partial(geglu, approximate="none"),
}
# What to try for an operation, in turn: the first that gives what the module gives.
_READINGS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "rms_norm": ({"rounding": "before"}, {"rounding": "after"}),
    "rms_norm_plus_one": ({"rounding": "after", "plus_one": True}, {"rounding": "before", "plus_one": True}),
    "swiglu": ({"gate": "silu"},),
    "geglu": ({"gate": "gelu_tanh"}, {"gate": "gelu"}),
}


class FusedForward:
    """What stands in for a module's `forward`: body(module, *args, **kwargs, **settings); copied with the module."""

    def __init__(self, module: nn.Module, function: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
        self.module, self.function, self.kwargs = module, function, dict(kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module, *args, **kwargs, **self.kwargs)


@dataclass(frozen=True, slots=True)
class FusedModules:
    """What `swap` did to `net`: modules by operation; and for what stayed, the reason and how many it holds for."""

    net: nn.Module
    counts: Mapping[str, int]
    skipped: Mapping[tuple[str, str], int]

    def restore(self) -> int:
        """Put everything back, as `undo(net)`."""
        return unfuse_modules(self.net)


def fuse_modules(
    net: nn.Module, family: Family, *, ops: Collection[str] | None = None, mlp_tiles: int = 0
) -> FusedModules:
    """Swap what is faster so. `ops` names operations (of OPS) to be swapped whatever was measured; none: by WORTH.

    tiles: the family's gated MLPs go over the sequence in so many pieces; all of it at once at 0.

    Raises ModelError: an operation that is not in OPS.
    """
    if unknown := sorted(set(ops or ()) - set(OPS)):
        raise ModelError(f"there is no operation {', '.join(unknown)} to swap: there are {', '.join(OPS)}")
    counts: Counter[str] = Counter()
    refused: Counter[tuple[str, str]] = Counter()
    named = {name: op for op, names in family.fused_modules.items() if op in _READINGS for name in names}
    for module in net.modules():
        op = "lora_linear" if _is_lora(module) else named.get(type(module).__name__)
        if op is None:
            continue
        chosen, why = _choose(module, op, ops, mlp_tiles)
        if chosen is not None:
            module.forward = chosen
        if why:
            refused[op, why] += 1
        else:
            counts[op] += 1
        if chosen is not None and chosen.kwargs.get("tiles"):
            counts["tiled"] += 1
    return FusedModules(net, dict(counts), dict(refused))


def unfuse_modules(net: nn.Module) -> int:
    """Take away every forward that `swap` set in `net`, whenever; how many there were."""
    swapped = [module for module in net.modules() if isinstance(vars(module).get("forward"), FusedForward)]
    for module in swapped:
        del module.forward
    return len(swapped)


def set_activation_offload(net: nn.Module, enabled: bool = True) -> int:
    """Keep the inputs of the blocks of `net` that are checkpointed in host memory, or no longer; how many blocks.

    For a net whose checkpointing is on (`patch.checkpoint_blocks`). Nothing but this net's own blocks is touched.
    """
    blocks = [module for module in net.modules() if "_gradient_checkpointing_func" in vars(module)]
    shared: dict[int, OffloadedCheckpoint] = {}
    changed = 0
    for block in blocks:
        checkpointing: Any = block._gradient_checkpointing_func
        if enabled and not isinstance(checkpointing, OffloadedCheckpoint):
            block._gradient_checkpointing_func = shared.setdefault(
                id(checkpointing), OffloadedCheckpoint(checkpointing)
            )  # type: ignore[assignment]
        elif not enabled and isinstance(checkpointing, OffloadedCheckpoint):
            block._gradient_checkpointing_func = checkpointing.checkpoint_fn  # type: ignore[assignment]
        else:
            continue
        changed += 1
    return changed


def _choose(module: nn.Module, op: str, ops: Collection[str] | None, tiles: int) -> tuple[FusedForward | None, str]:
    """The forward to set on `module`, if any, and why `op` was refused, if it was."""
    if "forward" in vars(module):
        return None, "its forward was replaced already"
    weight = next(module.parameters(), None)
    if weight is None or weight.is_meta or not weight.numel():
        return None, "it has no weights in memory"
    gated = op in ("swiglu", "geglu")
    plain = FusedForward(module, _tiled, {"tiles": tiles}) if gated and tiles else None
    if ops is not None and op not in ops:
        return plain, "it was not asked for"
    if ops is None and op not in FASTER_OPS.get(weight.device.type, ()):
        known = weight.device.type in FASTER_OPS
        return plain, f"{'no faster' if known else 'not measured to be faster'} on {weight.device.type}"
    if op == "lora_linear":
        why = _unfit(module)
        return (None, why) if why else (FusedForward(module, _lora, {}), "")
    body = _gated if gated else _norm
    for reading in _READINGS[op]:
        forward = FusedForward(module, body, reading)
        if _agrees(module, forward):
            return FusedForward(module, body, {**reading, "tiles": tiles}) if gated and tiles else forward, ""
    return plain, f"{type(module).__name__} does something else"


@torch.no_grad()
def _agrees(module: nn.Module, forward: FusedForward) -> bool:
    """Whether both give the same for three rows of numbers; without drawing any, or leaving a trace in `module`."""
    weight = next(module.parameters())
    inputs = vars(module)["_parameters"].get("weight")
    width = weight.shape[-1] if inputs is None else inputs.shape[-1]
    rows = torch.linspace(-3, 3, 3 * width, dtype=torch.float64).cos().mul(2).reshape(1, 3, width)
    rows = rows.to(weight.device, weight.dtype)
    with _still(module):
        try:
            expected, found = type(module).forward(module, rows), forward(rows)
        except (AttributeError, RuntimeError, TypeError):  # other parts, other shapes: another kind of module
            return False
    room = 4 * torch.finfo(weight.dtype).eps * float(expected.abs().max())
    return expected.dtype == found.dtype and bool((expected - found).abs().max() <= room)


@contextmanager
def _still(module: nn.Module) -> Iterator[None]:
    """`module` in eval mode, and then as it was, part by part."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _norm(module: Any, x: Tensor, *, rounding: Any, plus_one: bool = False) -> Tensor:
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return rms_norm(x, module.weight, eps, plus_one=plus_one, rounding=rounding)


def _gated(module: Any, x: Tensor, *, gate: str, tiles: int = 0) -> Tensor:
    if tiles:
        return apply_tiled(partial(_gated, module, gate=gate), x, _length(x, tiles))
    out: Tensor = module.down_proj(_inner(module, x, gate))
    return out


def _inner(module: Any, x: Tensor, gate: str) -> Tensor:
    if hasattr(module, "gate_up_proj"):
        opening, up = module.gate_up_proj(x).chunk(2, dim=-1)
        return _GATES[gate](opening, up)
    return _GATES[gate](module.gate_proj(x), module.up_proj(x))


def _tiled(module: Any, x: Tensor, *, tiles: int) -> Tensor:
    return apply_tiled(partial(type(module).forward, module), x, _length(x, tiles))


def _length(x: Tensor, tiles: int) -> int:
    return max(1, -(-x.shape[-2] // tiles))


def _is_lora(module: nn.Module) -> bool:
    """Whether `module` is PEFT's linear with low-rank updates, told without importing PEFT."""
    return type(module).__module__ == "peft.tuners.lora.layer" and type(module).__name__ == "Linear"


def _lora(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or _unfit(module):
        out: Tensor = type(module).forward(module, x, *args, **kwargs)
        return out
    (name,) = [name for name in module.active_adapters if name in module.lora_A]
    base = module.base_layer
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    return lora_linear(x, base.weight, base.bias, a, b, module.scaling[name])


def _unfit(module: Any) -> str:
    """Why the layer cannot be one operation as it is now; empty where it can. Asked at every call."""
    if module.disable_adapters or module.merged:
        return "its update is disabled or merged"
    active = [name for name in module.active_adapters if name in module.lora_A]
    if len(active) != 1:
        return f"{len(active)} updates are active, not one"
    name, base = active[0], module.base_layer
    parts = (base, module.lora_A[name], module.lora_B[name])
    if any(type(part) is not nn.Linear for part in parts):
        return "its weights are not those of plain linears"
    if name in module.lora_variant or parts[2].bias is not None:
        return "its update is of another kind than LoRA"
    if getattr(module.lora_dropout[name], "p", 0.0):
        return "its update has dropout"
    if base.weight.requires_grad:
        return "its weight learns"
    if any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks for part in parts):
        return "its parts have hooks, which would not be called"  # ZeRO-3 gathers weights by them
    return ""
