"""Pages of docs/ that are written from the code itself: `python -m mowa.cli.docs_pages docs [--check]`.

cli.md from the commands, recipes.md from the recipes' classes. Given a page instead of the folder, that one alone.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from mowa.cli import recipe_options
from mowa.cli.main import cli
from mowa.training.config import schema
from mowa.training.config.causal import CausalRecipe
from mowa.training.config.ctc import CTCRecipe
from projects.pl_tiny.recipe import Recipe

RECIPES_DIR = Path(__file__).parents[2] / "recipes"

RECIPES_INTRO = """\
# Recipes

Written by `make docs` from the recipes' classes (`mowa/train/tuning.py`, `instruct.py`, `recipe.py`); `make check`
holds it to them.

A recipe is a YAML file. `mowa train RECIPE -o FOLDER` does what it says; started again, it goes on from its last
checkpoint. What a recipe leaves out stands as the tables below say. A wrong key or value is refused before anything is
loaded, by its path and with the nearest right one:

```text
mowa: my.yaml: optimise: learning_rat is no key here; did you mean learning_rate?
```

Paths of recordings are from the folder in which `mowa` is called. A hub is asked only where a recipe names one: a model
by `owner/name[@revision]`, recordings by `hub:owner/name[@revision][:config]`.

**The same in three ways.** Every knob of fine-tuning is a line of YAML, a flag, and an attribute, each by its path:

```yaml
model: pl-tiny                  # my.yaml
data: {train: data/train.jsonl}
train: lora
optimise: {learning_rate: 1.0e-3}
```
```sh
mowa train my.yaml -o out --optimise.learning-rate 5e-4    # a flag goes before the recipe
mowa train -o out --model pl-tiny --data data/train.jsonl --train lora --learning-rate 1e-3    # and needs none
mowa train my.yaml --dry-run                               # the whole recipe, every knob spelt out
mowa train --knobs                                         # the tables below, on the terminal
```
```python
from mowa.training.config.ctc import Data, Optimise, Part, Tuning

data = Data(train=(Part("data/train.jsonl"),))
Tuning(model="pl-tiny", data=data, train="lora", optimise=Optimise(learning_rate=1e-3))
```

In a flag, underscores are dashes; true and false are `--optimise.checkpointing` and `--no-optimise.checkpointing`;
lists are `--lora.where attention,mlp`; keys and values are `--data.letters ё=е,й=и`; recordings are `--data.train path`
or `path@split`, once for each. Only their shares need YAML.

| recipe | for whom |
|---|---|
"""

CAUSAL_INTRO = """\
## Texts

With `task: causal` a language model learns from texts or conversations ([chat-data.md](chat-data.md)). Groups with the
names of those above are theirs; what stands otherwise is said.

"""

FROM_NOTHING = """\
## From nothing

A recipe with `stages` makes a model from nothing, or of a teacher's encoder ([training.md](training.md)). Its knobs are
no flags. `[]` stands for each member of a list.

"""


def render_cli_page() -> str:
    parts = [
        "# The command line\n\nWritten by `make docs` from the commands themselves; `make check` holds it to them.\n"
    ]
    root = cli.make_context("mowa", [], resilient_parsing=True, terminal_width=80)
    for name, text in _commands(root):
        parts.append(f"## `{name}`\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def _commands(context: click.Context) -> Iterator[tuple[str, str]]:
    command = context.command
    yield context.command_path, "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from _commands(click.Context(child, parent=context, info_name=name))


def render_recipes_page() -> str:
    shipped = "\n".join(
        f"| [{path.name}](../recipes/{path.name}) | {_for_whom(path)} |" for path in sorted(RECIPES_DIR.glob("*.yaml"))
    )
    tuning = f"## Recordings\n\n{_tables(CTCRecipe)}\n"
    texts = f"{CAUSAL_INTRO}{_tables(CausalRecipe)}\n"
    return f"{RECIPES_INTRO}{shipped}\n\n{tuning}{texts}{FROM_NOTHING}{_tables(Recipe)}"


def _for_whom(path: Path) -> str:
    """The first sentence of the comment that a recipe begins with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = [line for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]]
    return re.split(r"(?<=\.)\s", " ".join(line.lstrip("# ") for line in comment), maxsplit=1)[0]


def _tables(kind: type) -> str:
    """A section for each group of a recipe: where it stands, what it is, its knobs."""
    places: dict[tuple[type, str], list[str]] = {}
    groups: dict[tuple[type, str], tuple[type, Any]] = {}
    for path, group, standing in _groups(kind):
        key = (group, repr(standing))
        places.setdefault(key, []).append(f"`{path}`" if path else "At the top")
        groups[key] = group, standing
    return "\n".join(
        f"### {', '.join(places[key])}\n\n{_prose(group)}\n\n{_table(group, standing)}\n"
        for key, (group, standing) in groups.items()
    )


def _groups(kind: Any, path: str = "", standing: Any = None) -> Iterator[tuple[str, type, Any]]:
    """Every dataclass in a recipe, with the path it has there (`data.train[]` for members) and where it stands."""
    yield path, kind, standing
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint, under = hints[field.name], f"{path}.{field.name}" if path else field.name
        members = typing.get_args(hint)
        if dataclasses.is_dataclass(hint):
            value = schema.field_default(field)
            yield from _groups(hint, under, value if dataclasses.is_dataclass(value) else None)
        elif members and dataclasses.is_dataclass(members[0]):
            yield from _groups(members[0], f"{under}[]" if typing.get_origin(hint) is tuple else under)


def _prose(kind: type) -> str:
    return inspect.cleandoc(kind.__doc__ or "")


def _table(kind: type, standing: Any) -> str:
    leaves = [leaf for leaf in schema.iter_options(kind, defaults=standing) if len(leaf.path) == 1]
    told = any(leaf.help for leaf in leaves)
    rows = [("key", "takes", "default", *(["what it is for"] if told else []))]
    rows.append(tuple("---" for _ in rows[0]))
    for leaf in leaves:
        default = recipe_options.format_default(leaf)
        shown = default if default == "required" else f"`{default}`"
        rows.append(
            (
                f"`{leaf.dotted}`",
                recipe_options.describe_type(leaf),
                shown,
                *([leaf.help.replace("|", "\\|")] if told else []),
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


PAGES: dict[str, Callable[[], str]] = {"cli.md": render_cli_page, "recipes.md": render_recipes_page}


def main(arguments: list[str]) -> None:
    target = Path(next(argument for argument in arguments if not argument.startswith("-")))
    stale = []
    for path in [target / name for name in PAGES] if target.is_dir() else [target]:
        written = PAGES[path.name]()
        if "--check" not in arguments:
            path.write_text(written, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != written:
            stale.append(str(path))
    if stale:
        sys.exit(f"{' and '.join(stale)} out of date: run `make docs`")


if __name__ == "__main__":
    main(sys.argv[1:])
