"""Replace the forward of single modules of one net by fused kernels, reversibly.

Only the attribute `forward` of a module is set; its class, weights and hooks and all other nets stay as they are. A
module is replaced only if the family names its class, the kernel gives the same numbers on a trial input, and it was
measured to be faster on this device. Copies and pickles of a net keep the replacement.

Rotary embeddings are not replaced: transformers calls a module-level function for them, which other nets share.
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

# By device: what was measured to be faster than the modules of transformers and PEFT. Forward and backward over 2048
# tokens at the sizes of SmolLM2-135M, CPU time of one thread, speed-up in float32 and bf16: RMS norms 1.6 to 2.4 and
# 1.2 to 1.6; LoRA linears 1.04 to 1.09 and 1.02 to 1.06 (equal under autocast, with less than half the saved memory);
# swiglu 1.02 and 0.80, geglu (two threads) 0.8 and 0.7: they save one tensor less but compute the activation twice.
FASTER_OPS: Mapping[str, frozenset[str]] = {"cpu": frozenset({"rms_norm", "rms_norm_plus_one", "lora_linear"})}

_GATES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": swiglu,
    "gelu_tanh": geglu,
    "gelu": partial(geglu, approximate="none"),
}
# Variants of each operation; the first that gives the module's numbers is used.
_VARIANTS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "rms_norm": ({"rounding": "before"}, {"rounding": "after"}),
    "rms_norm_plus_one": ({"rounding": "after", "plus_one": True}, {"rounding": "before", "plus_one": True}),
    "swiglu": ({"gate": "silu"},),
    "geglu": ({"gate": "gelu_tanh"}, {"gate": "gelu"}),
}


class FusedForward:
    """Replacement for the forward of a module: function(module, *args, **kwargs); it is copied with the module."""

    def __init__(self, module: nn.Module, function: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
        self.module, self.function, self.kwargs = module, function, dict(kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module, *args, **kwargs, **self.kwargs)


@dataclass(frozen=True, slots=True)
class FusedModules:
    """What `fuse_modules` did to `net`.

    Attributes:
        counts: operation → number of modules replaced.
        skipped: (operation, reason) → number of modules not replaced.
    """

    net: nn.Module
    counts: Mapping[str, int]
    skipped: Mapping[tuple[str, str], int]

    def restore(self) -> int:
        """Undo everything; returns the number of modules restored."""
        return unfuse_modules(self.net)


def fuse_modules(
    net: nn.Module, family: Family, *, ops: Collection[str] | None = None, mlp_tiles: int = 0
) -> FusedModules:
    """Replace the forward of modules that are faster as fused kernels.

    Args:
        net: changed in place.
        family: names the classes per operation.
        ops: operations to replace whether measured to be faster or not; None: those of `FASTER_OPS`.
        mlp_tiles: run the family's gated MLPs over this many tiles of the sequence; 0: no tiling.

    Raises:
        ModelError: an operation that is not in `OPS`.
    """
    if unknown := sorted(set(ops or ()) - set(OPS)):
        raise ModelError(f"unknown operation {', '.join(unknown)}; choose from {', '.join(OPS)}")
    counts: Counter[str] = Counter()
    skipped: Counter[tuple[str, str]] = Counter()
    op_by_class = {name: op for op, names in family.fused_modules.items() if op in _VARIANTS for name in names}
    for module in net.modules():
        op = "lora_linear" if _is_lora(module) else op_by_class.get(type(module).__name__)
        if op is None:
            continue
        forward, reason = _choose_forward(module, op, ops, mlp_tiles)
        if forward is not None:
            module.forward = forward
        if reason:
            skipped[op, reason] += 1
        else:
            counts[op] += 1
        if forward is not None and forward.kwargs.get("tiles"):
            counts["tiled_mlp"] += 1
    return FusedModules(net, dict(counts), dict(skipped))


def not_faster_reason(op: str, device_type: str) -> str:
    """Return why `op` is not replaced on a device of this type, or an empty string where it is."""
    if op in FASTER_OPS.get(device_type, ()):
        return ""
    return f"{'not faster' if device_type in FASTER_OPS else 'not measured to be faster'} on {device_type}"


def unfuse_modules(net: nn.Module) -> int:
    """Remove every forward that `fuse_modules` set in `net`; returns their number."""
    fused = [module for module in net.modules() if isinstance(vars(module).get("forward"), FusedForward)]
    for module in fused:
        del module.forward
    return len(fused)


def set_activation_offload(net: nn.Module, enabled: bool = True) -> int:
    """Keep the checkpointed inputs of the blocks of `net` in host memory, or no longer; return how many blocks changed.

    For a net with gradient checkpointing enabled. Only this net's blocks are changed.
    """
    blocks = [module for module in net.modules() if "_gradient_checkpointing_func" in vars(module)]
    shared: dict[int, OffloadedCheckpoint] = {}
    changed = 0
    for block in blocks:
        checkpointing: Any = block._gradient_checkpointing_func
        if enabled and not isinstance(checkpointing, OffloadedCheckpoint):
            offloaded = shared.setdefault(id(checkpointing), OffloadedCheckpoint(checkpointing))
            block._gradient_checkpointing_func = offloaded  # type: ignore[assignment]
        elif not enabled and isinstance(checkpointing, OffloadedCheckpoint):
            block._gradient_checkpointing_func = checkpointing.checkpoint_fn  # type: ignore[assignment]
        else:
            continue
        changed += 1
    return changed


def _choose_forward(
    module: nn.Module, op: str, ops: Collection[str] | None, tiles: int
) -> tuple[FusedForward | None, str]:
    """Return the forward to set on `module`, if any, and why `op` is not replaced, if it is not."""
    if "forward" in vars(module):
        return None, "its forward is replaced already"
    weight = next(module.parameters(), None)
    if weight is None or weight.is_meta or not weight.numel():
        return None, "it has no weights in memory"
    gated = op in ("swiglu", "geglu")
    plain = FusedForward(module, _tiled_forward, {"tiles": tiles}) if gated and tiles else None
    if ops is not None and op not in ops:
        return plain, "not among the requested operations"
    if ops is None and (reason := not_faster_reason(op, weight.device.type)):
        return plain, reason
    if op == "lora_linear":
        reason = _unsupported_lora(module)
        return (None, reason) if reason else (FusedForward(module, _lora_forward, {}), "")
    function = _glu_forward if gated else _norm_forward
    for variant in _VARIANTS[op]:
        forward = FusedForward(module, function, variant)
        if _same_output(module, forward):
            return FusedForward(module, function, {**variant, "tiles": tiles}) if gated and tiles else forward, ""
    return plain, f"{type(module).__name__} computes something else"


@torch.no_grad()
def _same_output(module: nn.Module, forward: FusedForward) -> bool:
    """Whether both give the same for three rows of numbers, without using random numbers or changing `module`."""
    weight = next(module.parameters())
    inputs = vars(module)["_parameters"].get("weight")
    width = weight.shape[-1] if inputs is None else inputs.shape[-1]
    rows = torch.linspace(-3, 3, 3 * width, dtype=torch.float64).cos().mul(2).reshape(1, 3, width)
    rows = rows.to(weight.device, weight.dtype)
    with _eval_mode(module):
        try:
            expected, fused = type(module).forward(module, rows), forward(rows)
        except (AttributeError, RuntimeError, TypeError):  # other submodules or shapes: another kind of module
            return False
    tolerance = 4 * torch.finfo(weight.dtype).eps * float(expected.abs().max())
    return expected.dtype == fused.dtype and bool((expected - fused).abs().max() <= tolerance)


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Put `module` in eval mode, and restore the mode of each submodule afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _norm_forward(module: Any, x: Tensor, *, rounding: Any, plus_one: bool = False) -> Tensor:
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return rms_norm(x, module.weight, eps, plus_one=plus_one, rounding=rounding)


def _glu_forward(module: Any, x: Tensor, *, gate: str, tiles: int = 0) -> Tensor:
    if tiles:
        return apply_tiled(partial(_glu_forward, module, gate=gate), x, _tile_size(x, tiles))
    out: Tensor = module.down_proj(_gated(module, x, gate))
    return out


def _gated(module: Any, x: Tensor, gate: str) -> Tensor:
    if hasattr(module, "gate_up_proj"):
        gates, up = module.gate_up_proj(x).chunk(2, dim=-1)
        return _GATES[gate](gates, up)
    return _GATES[gate](module.gate_proj(x), module.up_proj(x))


def _tiled_forward(module: Any, x: Tensor, *, tiles: int) -> Tensor:
    return apply_tiled(partial(type(module).forward, module), x, _tile_size(x, tiles))


def _tile_size(x: Tensor, tiles: int) -> int:
    return max(1, -(-x.shape[-2] // tiles))


def _is_lora(module: nn.Module) -> bool:
    """Whether `module` is PEFT's LoRA linear; does not import PEFT."""
    return type(module).__module__ == "peft.tuners.lora.layer" and type(module).__name__ == "Linear"


def _lora_forward(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or _unsupported_lora(module):
        out: Tensor = type(module).forward(module, x, *args, **kwargs)
        return out
    (name,) = [name for name in module.active_adapters if name in module.lora_A]
    base = module.base_layer
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    return lora_linear(x, base.weight, base.bias, a, b, module.scaling[name])


def _unsupported_lora(module: Any) -> str:
    """Why the layer in its current state cannot be one operation; empty where it can. Checked in every call."""
    if module.disable_adapters or module.merged:
        return "its update is disabled or merged"
    active = [name for name in module.active_adapters if name in module.lora_A]
    if len(active) != 1:
        return f"{len(active)} adapters are active, not one"
    name, base = active[0], module.base_layer
    parts = (base, module.lora_A[name], module.lora_B[name])
    if any(type(part) is not nn.Linear for part in parts):
        return "its parts are not plain nn.Linear modules"
    if name in module.lora_variant or parts[2].bias is not None:
        return "its update is not plain LoRA"
    if getattr(module.lora_dropout[name], "p", 0.0):
        return "its update has dropout"
    if base.weight.requires_grad:
        return "its weight is trainable"
    if any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks for part in parts):
        return "its parts have hooks, which would not be called"  # such as those by which ZeRO-3 gathers weights
    return ""
