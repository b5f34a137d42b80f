"""Choose int4, int8 or float16 for each group of linears within a size budget, by measured sensitivity.

    sensitivity = KL divergence of `models.diff`, nats per frame, of the model with this group in int4 from the model

All groups begin in int4. In the order of sensitivity per byte they are raised to int8, then to float16, as long as the
size stays within the budget. A group in int8 is assumed to have 1/64 of its int4 sensitivity (steps 1/8 as large).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from mowa.errors import ModelError
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.models.diff import compare
from mowa.quantization import calibration
from mowa.quantization.linears import LinearGroup, estimate_size_bytes, quantize_linear
from mowa.types import CTCModel, Scheme

log = logging.getLogger("mowa")

RANKING_S = 12.0  # seconds of audio that the groups are ranked on; the model runs on them once per group
NEXT_PRECISION = {"int4": ("int8", 1 / 64), "int8": ("float16", 0.0)}  # and the fraction of the sensitivity left then


def assign_schemes(
    model: CTCModel, groups: Sequence[LinearGroup], clips: Sequence[np.ndarray], on_progress: Callable[[float], object]
) -> dict[LinearGroup, Scheme]:
    """Return a scheme for each group, within `model.scheme.size_budget` of the size in float32.

    Args:
        model: its blocks not quantized yet.
        groups: from `linear_groups`.
        clips: preprocessed recordings, float32 [n] each.
        on_progress: called with the fraction done.

    Raises:
        ModelError: the budget is smaller than the model with all groups in int4.
    """
    scheme, total = model.scheme, _float32_bytes(model)
    sensitivity = measure_sensitivity(model, groups, clips, on_progress)
    numel = {
        group: sum(model.net.get_submodule(name).weight.numel() for name in group.module_names) for group in groups
    }
    bits = {"int4": 4 + (16 if scheme.symmetric else 20) / scheme.group_size, "int8": 8.0, "float16": 16.0}
    other_bytes = estimate_size_bytes(model) - sum(2 * count for count in numel.values())
    precision = dict.fromkeys(groups, "int4")

    def relative_size() -> float:
        return (other_bytes + sum(numel[group] * bits[precision[group]] / 8 for group in groups)) / total

    if relative_size() > scheme.size_budget:
        raise ModelError(
            f"{model.origin.name} with all layers in int4 has {relative_size():.1%} of its float32 size; the budget of"
            f" {scheme.size_budget:.1%} is too small"
        )
    while candidates := [group for group in groups if precision[group] in NEXT_PRECISION]:
        gains = {}
        for group in candidates:
            wider, fraction_left = NEXT_PRECISION[precision[group]]
            current = sensitivity[group] * (1 if precision[group] == "int4" else 1 / 64)
            added_bits = numel[group] * (bits[wider] - bits[precision[group]])
            gains[group] = (current - sensitivity[group] * fraction_left) / added_bits
        for group in sorted(candidates, key=gains.__getitem__, reverse=True):
            before, precision[group] = precision[group], NEXT_PRECISION[precision[group]][0]
            if relative_size() <= scheme.size_budget:
                break
            precision[group] = before
        else:
            break
    counts = {name: sum(one == name for one in precision.values()) for name in bits}
    summary = ", ".join(f"{count} groups in {name}" for name, count in counts.items())
    log.info("mixed: %s, %.1f %% of the float32 size", summary, relative_size() * 100)
    return {group: derive_scheme(scheme, precision[group]) for group in groups}


def derive_scheme(scheme: Scheme, weights: str) -> Scheme:
    """Return the scheme of one group of a `mixed` scheme, whose weights are int4, int8 or float16."""
    if weights == "int4":
        return replace(scheme, weights="int4", activations="none")
    activations = "dynamic" if weights == "int8" else "none"
    return replace(scheme, weights=weights, group_size=0, symmetric=True, activations=activations)


def measure_sensitivity(
    model: CTCModel, groups: Sequence[LinearGroup], clips: Sequence[np.ndarray], on_progress: Callable[[float], object]
) -> dict[LinearGroup, float]:
    """Return the KL divergence, nats per frame, that int4 weights (without GPTQ) in each group alone cause."""
    net, subset = model.net, _first_seconds(clips, model.preprocessing.rate_hz)
    reference = [calibration.compute_log_probs(net, clip) for clip in subset]
    int4 = replace(derive_scheme(model.scheme, "int4"), gptq=False)
    sensitivity = {}
    for index, group in enumerate(groups):
        originals = {name: net.get_submodule(name) for name in group.module_names}
        for name, linear in originals.items():
            net.set_submodule(name, quantize_linear(linear, int4))
        sensitivity[group] = compare(reference, [calibration.compute_log_probs(net, clip) for clip in subset]).kl
        for name, linear in originals.items():
            net.set_submodule(name, linear)
        on_progress((index + 1) / len(groups))
    return sensitivity


def _first_seconds(clips: Sequence[np.ndarray], rate_hz: int) -> list[np.ndarray]:
    """The first clips that together have `RANKING_S` seconds."""
    subset: list[np.ndarray] = []
    for clip in clips:
        if sum(map(len, subset)) >= RANKING_S * rate_hz:
            break
        subset.append(clip)
    return subset


def _float32_bytes(model: CTCModel) -> int:
    parameters = sum(weight.numel() for weight in model.net.parameters())
    linears = [module for module in model.net.modules() if isinstance(module, QuantizedLinear)]
    return 4 * (parameters + sum(linear.qweight.numel() + len(linear.scale) for linear in linears))
