"""Command-line options generated from the recipe classes: one option per recipe key, plus short flags for common keys.

Types, defaults, choices and help texts come from the schema (`mowa.training.config`); nothing is stated twice.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import typing
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from mowa.errors import MowaError
from mowa.training.config import schema
from mowa.training.config.dispatch import NO_LEAF_NAME, RECIPES
from mowa.training.config.schema import OptionSpec
from mowa.training.distributed.process import is_worker_process
from mowa.training.run_dir import resume_hint

KEY_BY_FLAG = {
    "task": "task",
    "model": "model",
    "data": "data.train",
    "dev": "data.dev",
    "test": "data.test",
    "method": "method",
    "vocabulary": "vocabulary",
    "qat": "qat",
    "epochs": "optimizer.epochs",
    "max-steps": "optimizer.max_steps",
    "learning-rate": "optimizer.learning_rate",
    "seed": "optimizer.seed",
    "packing": "batch.packing",
    "devices": "distributed.devices",
    "nodes": "distributed.nodes",
    "strategy": "distributed.strategy",
}
"""Flag → recipe key, for the options that `--help` shows. `mowa train --list-options` and docs/recipes.md show all."""

ONE_LETTER_FLAGS = {"model": "-m"}
TASK_TITLES = {"ctc": "speech recognition, the default", "causal": "language models"}
TASK_META = "mowa.task"  # key of a click context's `meta`: the task of the command line, where it names one
LEAVES_BY_TASK = {task: {leaf.dotted: leaf for leaf in schema.iter_options(kind)} for task, kind in RECIPES.items()}


def _all_leaves() -> tuple[OptionSpec, ...]:
    """Return the options of all recipe classes; an option that several share has the choices of all of them."""
    found: dict[str, OptionSpec] = {}
    for leaf in (leaf for leaves in LEAVES_BY_TASK.values() for leaf in leaves.values()):
        known = found.setdefault(leaf.dotted, leaf)
        found[leaf.dotted] = dataclasses.replace(known, choices=tuple(dict.fromkeys(known.choices + leaf.choices)))
    return tuple(found.values())


LEAVES = _all_leaves()
FLAG_BY_KEY = {dotted: f"--{name}" for name, dotted in KEY_BY_FLAG.items()}


class DataSourceParam(click.ParamType):
    """`path`, or `path@split`. An @ that belongs to the path must be followed by a slash, a dot or another @."""

    name = "path[@split]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str) or not value:
            return value
        path, at, split = value.rpartition("@")
        return {"path": path, "split": split} if at and path and not set("/.") & set(split) else {"path": value}


class CommaSeparated(click.ParamType):
    """`a,b,c` as a list of strings; the schema converts them to numbers where it wants numbers."""

    name = "a,b,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value


class KeyValuePairs(click.ParamType):
    r"""`key=value,key=value` as a dict. A backslash escapes a comma or an equals sign."""

    name = "k=v,…"

    def __init__(self, *, typed: bool = False) -> None:
        self.typed = typed  # numbers, true and false are values of their own, not texts

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        found = {}
        for piece in re.findall(r"(?:\\.|[^,])+", value, re.DOTALL):
            pair = re.fullmatch(r"((?:\\.|[^=\\])+)=(.*)", piece, re.DOTALL)
            if pair is None:
                self.fail(f"{piece!r} is not a pair; write from=to", param, ctx)
            key = pair[1].lstrip(" ") or pair[1]  # a space after the comma is not part of the key
            text = _unescape(pair[2])
            found[_unescape(key)] = _parse_scalar(text) if self.typed else text
        return found


class NumberParam(click.types.FloatParamType):
    """A float, or the schema's word for infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return math.inf if value == schema.UNLIMITED else super().convert(value, param, ctx)


def _parse_scalar(text: str) -> Any:
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except json.JSONDecodeError:
        return text


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)


class RecipeOption(click.Option):
    """A command-line option for one recipe key. It has no effect unless it is given."""

    def __init__(self, leaf: OptionSpec, flag: str, **settings: Any) -> None:
        name = flag.lstrip("-")
        flags = f"{flag}/--no-{name}" if leaf.hint is bool else flag
        short = [ONE_LETTER_FLAGS[name]] if name in ONE_LETTER_FLAGS else []
        parameter = name.replace(".", "__").replace("-", "_") + "_option"
        super().__init__([parameter, *short, flags], default=None, **_click_type(leaf), **settings)
        self.leaf, self.flag = leaf, flag

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return flags and help text for the context's task if it has one, else for all tasks that have the key."""
        record, task = super().get_help_record(ctx), ctx.meta.get(TASK_META)
        tasks = [next(iter(RECIPES))] if self.leaf.dotted == "task" else [task] if task else list(RECIPES)
        leaves = {name: leaf for name in tasks if (leaf := LEAVES_BY_TASK[name].get(self.leaf.dotted))}
        return (record[0], _describe(leaves, self, all_tasks=len(tasks) > 1)) if record and leaves else None


def _describe(leaves: dict[str, OptionSpec], option: RecipeOption, *, all_tasks: bool) -> str:
    """Return the help text of a key from its leaf in each task; what differs from the first one is named."""
    (first_task, first), *others = leaves.items()
    words = _sentence(first.help)
    for task, leaf in others:
        words += "" if leaf.help == first.help else f" With --task {task}: {leaf.help}."
    words += " Repeatable." if option.multiple else ""
    notes = [] if f"--{first.dotted}" == option.flag else [first.dotted]
    notes += [f"--task {first_task} only"] if all_tasks and len(leaves) < len(RECIPES) else []
    if first.dotted == "task":
        notes.append(f"default: that of the model, {format_default(first)} in a recipe")
    elif first.default not in (dataclasses.MISSING, (), ""):
        notes.append(f"default: {format_default(first)}")
        notes += [
            f"with --task {task}: {format_default(leaf)}" for task, leaf in others if leaf.default != first.default
        ]
    return f"{words}  [{'; '.join(notes)}]" if notes else words


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


class TrainingCommand(click.Command):
    """A command with recipe options whose `--help` shows the defaults of the task at hand.

    Args:
        task: the task of every recipe that the command makes; None: `--task` or the recipe file names it.
    """

    def __init__(self, *arguments: Any, task: str | None = None, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.task = task

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        texts = (given.get(key) for key in ("task_option", "recipe"))
        task, recipe = (text if isinstance(text, str) else None for text in texts)
        with suppress(MowaError):  # the command reports it
            set_task(ctx, self.task or task, recipe)
        return super().parse_args(ctx, args)

    def get_help(self, ctx: click.Context) -> str:
        ctx.meta.setdefault(TASK_META, self.task)
        return super().get_help(ctx)


def set_task(context: click.Context, task: str | None, recipe: str | Path | None) -> str | None:
    """Set and return the context's task: `task`, or that of the recipe file; None if neither is given.

    Raises:
        RecipeError: the recipe cannot be read.
    """
    if task is None and recipe is not None:
        tree = schema.read_yaml(Path(recipe))
        task = tree.get("task", next(iter(RECIPES))) if isinstance(tree, dict) else None
    context.meta[TASK_META] = task if isinstance(task, str) and task in RECIPES else None
    return context.meta[TASK_META]


def recipe_options() -> list[click.Parameter]:
    """Return the options of a training command.

    The flags of KEY_BY_FLAG are shown in its help. Hidden are `--section.key` for every key, and `--key` where the last
    part of the key is unique.
    """
    leaf_of = {leaf.dotted: leaf for leaf in LEAVES}
    options: list[click.Parameter] = []
    for name, dotted in KEY_BY_FLAG.items():
        options.append(RecipeOption(leaf_of[dotted], f"--{name}", help=leaf_of[dotted].help))
    taken = set(FLAG_BY_KEY.values())
    for leaf in LEAVES:
        for flag in dict.fromkeys((flag_name(leaf), leaf_flag_name(leaf))):
            if flag and flag not in taken:
                taken.add(flag)
                options.append(RecipeOption(leaf, flag, hidden=True, help=leaf.help))
    return options


def flag_name(leaf: OptionSpec) -> str:
    """Return the full flag of a key: optimizer.learning_rate → --optimizer.learning-rate."""
    return "--" + leaf.dotted.replace("_", "-")


def leaf_flag_name(leaf: OptionSpec) -> str:
    """Return the flag of a key's last part, optimizer.learning_rate → --learning-rate; empty where it is ambiguous."""
    if leaf.dotted in NO_LEAF_NAME or _LEAF_COUNTS[leaf.path[-1]] > 1:
        return ""
    return "--" + leaf.path[-1].replace("_", "-")


_LEAF_COUNTS = Counter(leaf.path[-1] for leaf in LEAVES)


def collect_overrides(context: click.Context) -> dict[str, Any]:
    """Return recipe key → value for the options that were given on the command line.

    Raises click.UsageError when one key was given under two flags.
    """
    found: dict[str, Any] = {}
    flags: dict[str, str] = {}
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "")
        if not isinstance(option, RecipeOption) or given is not click.core.ParameterSource.COMMANDLINE:
            continue
        dotted, value = option.leaf.dotted, context.params[option.name or ""]
        if dotted in found:
            raise click.UsageError(f"{flags[dotted]} and {option.flag} are the same option: give one of them", context)
        flags[dotted] = option.flag
        found[dotted] = [part for part in value if part] if option.multiple else value
    return found


def option_rows(task: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield the rows of `mowa train --list-options` for a task: recipe key, flag, default, description."""
    for leaf in LEAVES_BY_TASK[task].values():
        flag = FLAG_BY_KEY.get(leaf.dotted) or leaf_flag_name(leaf) or flag_name(leaf)
        yield leaf.dotted, flag, format_default(leaf), _description(leaf)


def format_default(leaf: OptionSpec) -> str:
    """Return the default of a key as YAML, or "required"."""
    return "required" if leaf.default is dataclasses.MISSING else _yaml(leaf.default)


def describe_type(leaf: OptionSpec) -> str:
    """Return the type of a key in words."""
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


_PLAIN = {str: "string", int: "integer", float: "number", bool: "true or false"}


def _range(leaf: OptionSpec) -> str:
    minimum, maximum = (str(end).removesuffix(".0") for end in (leaf.minimum, leaf.maximum))
    if leaf.minimum is None:
        return ""
    return f", {minimum} or more" if leaf.maximum is None else f", {minimum} to {maximum}"


def _description(leaf: OptionSpec) -> str:
    """Return the help text, with the choices where it does not name them all."""
    incomplete = any(word not in leaf.help for word in leaf.choices)
    return f"{leaf.help} ({', '.join(leaf.choices)})" if incomplete else leaf.help


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


def _click_type(leaf: OptionSpec) -> dict[str, Any]:
    """Return click's keyword arguments for the type of a key."""
    origin, parts = typing.get_origin(leaf.hint), typing.get_args(leaf.hint)
    if origin is tuple and dataclasses.is_dataclass(parts[0]):
        return {"type": DataSourceParam(), "multiple": True}
    if origin is tuple:
        return {"type": CommaSeparated()}
    if origin is dict:
        return {"type": KeyValuePairs(typed=parts[1] is Any)}
    if leaf.choices:
        return {"type": click.Choice(list(leaf.choices))}
    return {"type": NumberParam() if leaf.hint is float else leaf.hint}


@contextmanager
def resume_hint_on_interrupt(out: Path) -> Iterator[None]:
    """Print how to resume the run in `out` if Ctrl-C stops it."""
    try:
        yield
    except KeyboardInterrupt:
        if not is_worker_process():
            click.echo(f"mowa: {resume_hint(out)}", err=True)
        raise
