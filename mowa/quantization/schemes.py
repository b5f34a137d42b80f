"""Parse scheme names such as `int4-weight+gptq+64`, and say what each scheme needs and how it stores each tensor.

This module does not import torch, so that command lines and recipes can be checked without it.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any

from mowa.errors import ModelError
from mowa.types import FLOAT32, Family, Scheme

SCHEMES = {
    scheme.name: scheme
    for scheme in (
        FLOAT32,
        Scheme("fp16", "float16"),
        Scheme("bf16", "bfloat16"),
        Scheme("int8-dynamic", "int8", "dynamic"),
        Scheme("int8-static", "int8", "static"),
        Scheme("int8-weight", "int8"),
        Scheme("int4-weight", "int4", group_size=32),
        Scheme("nf4", "nf4", group_size=64),
        Scheme("mixed", "mixed", "dynamic", group_size=32, gptq=True, size_budget=0.25),
    )
}
SCHEME_ALIASES = {
    "int8": "int8-dynamic",
    "int4": "int4-weight",
    "float16": "fp16",
    "bfloat16": "bf16",
    "fp32": "float32",
}
CAUSAL_ALIASES = SCHEME_ALIASES | {"int8": "int8-weight"}
CAUSAL_SCHEMES = ("int8-weight", "int4-weight", "nf4", "fp16", "bf16")  # of language models
REPORT_SCHEMES = {
    "ctc": (
        "fp16",
        "bf16",
        "int8-dynamic",
        "int8-static",
        "int8-weight",
        "int4-weight",
        "int4-weight+gptq",
        "nf4",
        "mixed",
    ),
    "causal": CAUSAL_SCHEMES,
}
"""Task → the schemes that `mowa quantize --scheme all` compares."""
GROUP_SIZES = (32, 64, 128)
NON_BLOCK_GROUP_SIZE = 32
MIN_QUANT_NUMEL = 16_384  # tensors outside the blocks with fewer elements stay in float16
GPTQ, ASYMMETRIC = "gptq", "asym"
SCHEME_SYNTAX = (
    f"a name and modifiers: +{GPTQ} (GPTQ, needs --data), +{ASYMMETRIC} (zero points), +32, +64, +128 (group size),"
    " and for mixed +25% (size budget, relative to float32)"
)


def parse_scheme(text: str, task: str = "ctc") -> Scheme:
    """Return the scheme named `text`, such as int8, int4-weight+gptq+64 or mixed+20% (see `SCHEME_SYNTAX`).

    int8 is int8-dynamic for speech models (`task` ctc), and int8-weight for language models (causal).

    Raises:
        ModelError: the name or a modifier is unknown, or the modifier does not apply to the scheme.
    """
    name, *modifiers = text.split("+")
    name = (CAUSAL_ALIASES if task == "causal" else SCHEME_ALIASES).get(name, name)
    if name not in SCHEMES:
        near = difflib.get_close_matches(name, [*SCHEMES, *SCHEME_ALIASES], 1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(SCHEMES)}"
        raise ModelError(f"unknown scheme {name!r}; {hint}")
    scheme = SCHEMES[name]
    for modifier in modifiers:
        scheme = _apply_modifier(scheme, modifier)
    return scheme


def format_scheme(scheme: Scheme) -> str:
    """Return the text from which `parse_scheme` makes `scheme`."""
    default = SCHEMES[scheme.name]
    modifiers = [GPTQ] if scheme.gptq and not default.gptq else []
    modifiers += [] if scheme.symmetric else [ASYMMETRIC]
    modifiers += [str(scheme.group_size)] if scheme.group_size != default.group_size else []
    modifiers += [f"{scheme.size_budget * 100:g}%"] if scheme.size_budget != default.size_budget else []
    return "+".join([scheme.name, *modifiers])


def _apply_modifier(scheme: Scheme, modifier: str) -> Scheme:
    grouped = scheme.weights in ("int4", "mixed")
    if modifier == GPTQ:
        if scheme.weights not in ("int4", "int8", "mixed"):
            raise ModelError(f"+{GPTQ} applies to integer weights only, not to {scheme.name}")
        return replace(scheme, gptq=True)
    if modifier == ASYMMETRIC:
        if not grouped:
            raise ModelError(f"+{ASYMMETRIC} applies to int4-weight and mixed only: {scheme.name} has no zero points")
        return replace(scheme, symmetric=False)
    if modifier.isdigit():
        if not grouped:
            fixed = "blocks of 64" if scheme.weights == "nf4" else "one scale per row"
            raise ModelError(f"+{modifier}: group sizes apply to int4-weight and mixed; {scheme.name} has {fixed}")
        if int(modifier) not in GROUP_SIZES:
            raise ModelError(f"+{modifier}: group sizes are {', '.join(map(str, GROUP_SIZES))}")
        return replace(scheme, group_size=int(modifier))
    if modifier.endswith("%") and scheme.weights == "mixed":
        try:
            budget = float(modifier[:-1]) / 100
        except ValueError:
            budget = 0.0
        if 0 < budget <= 1:
            return replace(scheme, size_budget=budget)
    raise ModelError(f"+{modifier} is not a modifier of {scheme.name}; a scheme is {SCHEME_SYNTAX}")


def calibration_reason(scheme: Scheme) -> str:
    """Return what the scheme needs calibration recordings for, or an empty string where it needs none."""
    if scheme.weights == "mixed":
        return "to rank the layers by their sensitivity"
    if scheme.activations == "static":
        return "to measure the range of each layer's inputs"
    return "to accumulate the Hessians of GPTQ" if scheme.gptq else ""


def causal_unsupported_reason(scheme: Scheme) -> str:
    """Return why a language model cannot be stored in the scheme, and what works; empty where it can."""
    if scheme.name == FLOAT32.name or (scheme.name in CAUSAL_SCHEMES and not scheme.gptq):
        return ""
    if reason := calibration_reason(scheme):
        reason = f"it needs calibration {reason}, which mowa does for recordings only"
    else:
        reason = "one range for the inputs of a whole batch would let answers depend on what shares the batch"
    return f"{reason}; use {', '.join(CAUSAL_SCHEMES[:-1])} or {CAUSAL_SCHEMES[-1]}"


def non_block_dtype(family: Family, parameter: str, base_prefix: str) -> str:
    """Return how integer schemes store a matrix outside the blocks: float32, float16 or int8 (grouped).

    Args:
        family: its `non_block_weights` are looked up.
        parameter: name of the parameter or module in the net.
        base_prefix: the net's `base_model_prefix`.
    """
    path = parameter.removeprefix(f"{base_prefix}.")
    kinds = (kind for part, kind in family.non_block_weights.items() if path.startswith(f"{part}."))
    return next(kinds, "float32")


def non_block_group_size(weight: Any) -> int:
    """Return the group size of a weight tensor [N, ...] outside the blocks that is stored in int8; 0: it is too small.

    Errors before the blocks pass through all of them: with one scale per row, int8 there was measured to cost ten times
    what int8 in all blocks costs.
    """
    large_enough = weight[0].numel() >= NON_BLOCK_GROUP_SIZE and weight.numel() >= MIN_QUANT_NUMEL
    return NON_BLOCK_GROUP_SIZE if large_enough else 0
