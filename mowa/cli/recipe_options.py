"""The recipe of fine-tuning as flags: one for each knob of `Tuning`, made from the schema; and everyday names for some.

What a knob means is not known here: its default, its words and its help are read from the schema.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Iterator
from typing import Any

import click

from mowa.training.config import schema
from mowa.training.config.causal import CausalRecipe
from mowa.training.config.ctc import CTCRecipe
from mowa.training.config.schema import OptionSpec

KEY_BY_FLAG = {
    "task": "task",
    "model": "model",
    "data": "data.train",
    "dev": "data.dev",
    "test": "data.test",
    "train": "train",
    "vocabulary": "vocabulary",
    "qat": "qat",
    "epochs": "optimise.epochs",
    "steps": "optimise.steps",
    "learning-rate": "optimise.learning_rate",
    "seed": "optimise.seed",
    "layout": "batch.layout",
    "devices": "parallel.devices",
    "nodes": "parallel.nodes",
    "strategy": "parallel.strategy",
}
"""Flag → the knob it stands for. `--help` shows these; `mowa train --knobs` and docs/recipes.md show all."""


def _all() -> tuple[OptionSpec, ...]:
    """The knobs of every kind of tuning; one that several have, as recordings have it, with all the words it takes."""
    found: dict[str, OptionSpec] = {}
    for leaf in (leaf for kind in (CTCRecipe, CausalRecipe) for leaf in schema.iter_options(kind)):
        known = found.setdefault(leaf.dotted, leaf)
        found[leaf.dotted] = dataclasses.replace(known, choices=tuple(dict.fromkeys(known.choices + leaf.choices)))
    return tuple(found.values())


LEAVES = _all()
FLAG_BY_KEY = {dotted: f"--{name}" for name, dotted in KEY_BY_FLAG.items()}


class DataSourceParam(click.ParamType):
    """`path`, or `path@split`. Behind an @ that is the path's own stand a / or a dot; or else it ends in another @."""

    name = "path[@split]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str) or not value:
            return value
        path, at, split = value.rpartition("@")
        return {"path": path, "split": split} if at and path and not set("/.") & set(split) else {"path": value}


class CommaSeparated(click.ParamType):
    """`a,b,c`; numbers are made of them where the schema wants numbers."""

    name = "a,b,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value


class KeyValuePairs(click.ParamType):
    r"""`from=to,from=to`; a backslash before a comma or an equals sign that is meant as itself."""

    name = "k=v,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        found = {}
        for piece in re.findall(r"(?:\\.|[^,])+", value, re.DOTALL):
            pair = re.fullmatch(r"((?:\\.|[^=\\])+)=(.*)", piece, re.DOTALL)
            if pair is None:
                self.fail(f"{piece!r} is no pair: write from=to", param, ctx)
            key = pair[1].lstrip(" ") or pair[1]  # a space behind the comma is the writer's, not the letter's
            found[_bare(key)] = _bare(pair[2])
        return found


def _bare(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)


class RecipeOption(click.Option):
    """A flag that turns one knob of the recipe, and does nothing unless it is given."""

    def __init__(self, leaf: OptionSpec, flag: str, **settings: Any) -> None:
        name = flag.lstrip("-").replace(".", "__").replace("-", "_") + "_knob"
        flags = f"{flag}/--no-{flag.lstrip('-')}" if leaf.hint is bool else flag
        super().__init__([name, flags], default=None, **_type(leaf), **settings)
        self.leaf = leaf


def recipe_options() -> list[click.Parameter]:
    """Every knob's flag for a command: `--group.knob`, hidden from its help, and the everyday ones, which are not."""
    leaf_of = {leaf.dotted: leaf for leaf in LEAVES}
    shown: list[click.Parameter] = []
    for name, dotted in KEY_BY_FLAG.items():
        leaf = leaf_of[dotted]
        path = "" if dotted == name else dotted
        default = "" if leaf.default in (dataclasses.MISSING, (), "") else f"default: {format_default(leaf)}"
        notes = "; ".join(part for part in (path, default) if part)
        words = f"{leaf.help[0].upper()}{leaf.help[1:]}."
        words += " Say it again for more." if _type(leaf).get("multiple") else ""
        shown.append(RecipeOption(leaf, f"--{name}", help=f"{words}  [{notes}]" if notes else words))
    rest = [leaf for leaf in LEAVES if flag_name(leaf) != FLAG_BY_KEY.get(leaf.dotted)]
    return [*shown, *(RecipeOption(leaf, flag_name(leaf), hidden=True, help=leaf.help) for leaf in rest)]


def flag_name(leaf: OptionSpec) -> str:
    """optimise.learning_rate → --optimise.learning-rate"""
    return "--" + leaf.dotted.replace("_", "-")


def collect_overrides(context: click.Context) -> dict[str, Any]:
    """Dotted path → value, of the knobs that were turned on the command line and of no others."""
    found: dict[str, Any] = {}
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "")
        if not isinstance(option, RecipeOption) or given is not click.core.ParameterSource.COMMANDLINE:
            continue
        dotted, value = option.leaf.dotted, context.params[option.name or ""]
        if dotted in found:
            raise click.UsageError(
                f"{FLAG_BY_KEY[dotted]} and {flag_name(option.leaf)} are one knob: say one of them", context
            )
        found[dotted] = [part for part in value if part] if option.multiple else value
    return found


def option_rows() -> Iterator[tuple[str, str, str, str]]:
    """Every knob as `mowa train --knobs` shows it: path, everyday flag, default, help."""
    for leaf in LEAVES:
        yield leaf.dotted, FLAG_BY_KEY.get(leaf.dotted, ""), format_default(leaf), _sentence(leaf)


def format_default(leaf: OptionSpec) -> str:
    """Where the knob stands unless it is turned, as YAML writes it."""
    return "required" if leaf.default is dataclasses.MISSING else _yaml(leaf.default)


def describe_type(leaf: OptionSpec) -> str:
    """What the knob takes, in words."""
    origin, parts = typing.get_origin(leaf.hint), typing.get_args(leaf.hint)
    if leaf.choices:
        words = ", ".join(leaf.choices)
        return f"list of {words}" if origin is tuple else f"one of {words}"
    if origin is tuple:
        member = _PLAIN.get(parts[0]) or parts[0].__name__
        many = f"list of {member}" if parts[-1] is Ellipsis else f"[{', '.join([member] * len(parts))}]"
        return many + _range(leaf)
    if origin is dict:
        return f"keys and values ({_PLAIN.get(parts[1], 'anything')})"
    if parts and dataclasses.is_dataclass(parts[0]):
        return "keys and values (below), or nothing"
    return _PLAIN[leaf.hint] + _range(leaf)


_PLAIN = {str: "text", int: "whole number", float: "number", bool: "true or false"}


def _range(leaf: OptionSpec) -> str:
    least, most = (str(end).removesuffix(".0") for end in (leaf.minimum, leaf.maximum))
    if leaf.minimum is None:
        return ""
    return f", {least} or more" if leaf.maximum is None else f", {least} to {most}"


def _sentence(leaf: OptionSpec) -> str:
    untold = any(word not in leaf.help for word in leaf.choices)
    return f"{leaf.help} ({', '.join(leaf.choices)})" if untold else leaf.help


def _yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_yaml(key)}: {_yaml(item)}' for key, item in value.items())}}}"
    if isinstance(value, bool):
        return str(value).lower()
    if value == math.inf:
        return schema.UNLIMITED
    return str(value) if value != "" else '""'


def _type(leaf: OptionSpec) -> dict[str, Any]:
    """click's settings for what the knob takes."""
    origin, parts = typing.get_origin(leaf.hint), typing.get_args(leaf.hint)
    if origin is tuple and dataclasses.is_dataclass(parts[0]):
        return {"type": DataSourceParam(), "multiple": True}
    if origin is tuple:
        return {"type": CommaSeparated()}
    if origin is dict:
        return {"type": KeyValuePairs()}
    if leaf.choices:
        return {"type": click.Choice(list(leaf.choices))}
    return {"type": leaf.hint}
