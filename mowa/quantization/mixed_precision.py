"""Which linears are worth more bits: each is tried narrow alone, and what that does to the emissions is its damage.

    damage = mean over frames of Σ p (log p - log q),  p the net's probabilities, q those with this unit in int4

All begin in int4. Units are widened, first to int8 and then to float16, in the order of damage by byte, while the size
is within the budget. A unit in int8 is taken to do none that matters: an eighth of int4's steps, a 64th of its damage.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from mowa.errors import ModelError
from mowa.quantization import calibration, ptq
from mowa.quantization.ptq import LinearGroup
from mowa.types import Model, Scheme

log = logging.getLogger("mowa")

RANKING_S = 12.0  # that units are ranked on: each of them has to be heard anew
NEXT_PRECISION = {"int4": ("int8", 1 / 64), "int8": ("float16", 0.0)}  # and the share of the damage that is left


def assign_schemes(
    model: Model, groups: Sequence[LinearGroup], clips: Sequence[np.ndarray], on_progress: Callable[[float], object]
) -> dict[LinearGroup, Scheme]:
    """Unit → scheme, within `model.scheme.budget` of the size in float32. `model` is wide in its blocks yet.

    ModelError where int4 everywhere is larger than that.
    """
    scheme, whole = model.scheme, _whole(model)
    damage = measure_sensitivity(model, groups, clips, on_progress)
    weights = {unit: sum(model.net.get_submodule(name).weight.numel() for name in unit.module_names) for unit in groups}
    bits = {"int4": 4 + (16 if scheme.symmetric else 20) / scheme.group_size, "int8": 8.0, "float16": 16.0}
    others = ptq.estimate_size_bytes(model) - sum(2 * count for count in weights.values())
    width = dict.fromkeys(groups, "int4")

    def used() -> float:
        return (others + sum(weights[unit] * bits[width[unit]] / 8 for unit in groups)) / whole

    if used() > scheme.size_budget:
        raise ModelError(
            f"{model.origin.name} in int4 everywhere is {used():.1%} of its size in float32, and the budget is"
            f" {scheme.size_budget:.1%}: allow at least as much"
        )
    while steps := [unit for unit in groups if width[unit] in NEXT_PRECISION]:
        gains = {}
        for unit in steps:
            wider, left = NEXT_PRECISION[width[unit]]
            now = damage[unit] * (1 if width[unit] == "int4" else 1 / 64)
            gains[unit] = (now - damage[unit] * left) / (weights[unit] * (bits[wider] - bits[width[unit]]))
        for unit in sorted(steps, key=gains.__getitem__, reverse=True):
            before, width[unit] = width[unit], NEXT_PRECISION[width[unit]][0]
            if used() <= scheme.size_budget:
                break
            width[unit] = before
        else:
            break
    counted = {name: sum(one == name for one in width.values()) for name in bits}
    log.info("mixed: %s, %.1f %% of the size", ", ".join(f"{n} in {w}" for w, n in counted.items()), used() * 100)
    return {unit: derive_scheme(scheme, width[unit]) for unit in groups}


def derive_scheme(scheme: Scheme, weights: str) -> Scheme:
    if weights == "int4":
        return replace(scheme, weights="int4", activations="none")
    return replace(
        scheme, weights=weights, group_size=0, symmetric=True, activations="dynamic" if weights == "int8" else "none"
    )


def measure_sensitivity(
    model: Model, groups: Sequence[LinearGroup], clips: Sequence[np.ndarray], on_progress: Callable[[float], object]
) -> dict[LinearGroup, float]:
    """Unit → what int4 in it alone does, in nats a frame."""
    net, few = model.net, _few(clips, model.preprocessing.rate_hz)
    truth = [calibration.compute_log_probs(net, sound) for sound in few]
    found = {}
    for index, unit in enumerate(groups):
        wide = {name: net.get_submodule(name) for name in unit.module_names}
        plain = replace(derive_scheme(model.scheme, "int4"), gptq=False)
        for name, linear in wide.items():
            net.set_submodule(name, ptq.quantize_linear(linear, plain))
        apart = [
            (p.exp() * (p - calibration.compute_log_probs(net, one))).sum(-1) for p, one in zip(truth, few, strict=True)
        ]
        found[unit] = float(sum(one.sum() for one in apart) / sum(len(one) for one in apart))
        for name, linear in wide.items():
            net.set_submodule(name, linear)
        on_progress((index + 1) / len(groups))
    return found


def _few(sounds: Sequence[np.ndarray], rate_hz: int) -> list[np.ndarray]:
    few: list[np.ndarray] = []
    for sound in sounds:
        if sum(map(len, few)) >= RANKING_S * rate_hz:
            break
        few.append(sound)
    return few


def _whole(model: Model) -> int:
    """Bytes in float32."""
    params = sum(weight.numel() for weight in model.net.parameters())
    buffers = sum(one.codes.numel() + len(one.scales) for one in model.net.modules() if hasattr(one, "codes"))
    return 4 * (params + buffers)
