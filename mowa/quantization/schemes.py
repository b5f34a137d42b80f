"""The schemes by name, and what each of them needs. What a scheme does to a net is `make`'s affair."""

from __future__ import annotations

import difflib
from dataclasses import replace

from mowa.errors import ModelError
from mowa.types import FLOAT32, Scheme

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
GROUP_SIZES = (32, 64, 128)
GPTQ, ASYMMETRIC = "gptq", "asym"
SCHEME_SYNTAX = (
    f"a name, and what is turned behind it: +{GPTQ} (errors made good on recordings), +{ASYMMETRIC} (groups with zeros"
    " of their own), +32, +64, +128 (columns to a group), and of mixed +25% (of the size in float32)"
)


def parse_scheme(text: str) -> Scheme:
    """The scheme that `text` says, such as int8, int4-weight+gptq+64 or mixed+20% (`HOW`). ModelError where none is."""
    name, *turns = text.split("+")
    name = SCHEME_ALIASES.get(name, name)
    if name not in SCHEMES:
        near = difflib.get_close_matches(name, [*SCHEMES, *SCHEME_ALIASES], 1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(SCHEMES)}"
        raise ModelError(f"no scheme is called {name!r}; {hint}")
    scheme = SCHEMES[name]
    for turn in turns:
        scheme = _apply_modifier(scheme, turn)
    return scheme


def format_scheme(scheme: Scheme) -> str:
    """What `named` gives it back from."""
    stock = SCHEMES[scheme.name]
    turns = [GPTQ] if scheme.gptq and not stock.gptq else []
    turns += [] if scheme.symmetric else [ASYMMETRIC]
    turns += [str(scheme.group_size)] if scheme.group_size != stock.group_size else []
    turns += [f"{scheme.size_budget * 100:g}%"] if scheme.size_budget != stock.size_budget else []
    return "+".join([scheme.name, *turns])


def _apply_modifier(scheme: Scheme, turn: str) -> Scheme:
    grouped = scheme.weights in ("int4", "mixed")
    if turn == GPTQ:
        if scheme.weights not in ("int4", "int8", "mixed"):
            raise ModelError(f"+{GPTQ} makes good the errors of integers: {scheme.name} has none")
        return replace(scheme, gptq=True)
    if turn == ASYMMETRIC:
        if not grouped:
            raise ModelError(f"+{ASYMMETRIC} is for int4-weight and mixed: {scheme.name} has no zeros of its own")
        return replace(scheme, symmetric=False)
    if turn.isdigit():
        if not grouped:
            fixed = "blocks of 64" if scheme.weights == "nf4" else "one step for each row"
            raise ModelError(f"+{turn}: groups are for int4-weight and mixed; {scheme.name} has {fixed}")
        if int(turn) not in GROUP_SIZES:
            raise ModelError(f"+{turn}: groups are of {', '.join(map(str, GROUP_SIZES))} columns")
        return replace(scheme, group_size=int(turn))
    if turn.endswith("%") and scheme.weights == "mixed":
        try:
            budget = float(turn[:-1]) / 100
        except ValueError:
            budget = 0.0
        if 0 < budget <= 1:
            return replace(scheme, size_budget=budget)
    raise ModelError(f"+{turn} is nothing that {scheme.name} has; schemes are said as {SCHEME_SYNTAX}")


def calibration_reason(scheme: Scheme) -> str:
    """What recordings are needed for; empty where none are."""
    if scheme.weights == "mixed":
        return "to rank the layers by what narrow weights do to them"
    if scheme.activations == "static":
        return "to see the range of what meets the weights"
    return "to make good the error of each column by the others" if scheme.gptq else ""
