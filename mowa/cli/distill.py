"""`mowa distill`: a smaller model that says what a larger one says. A recipe of `mowa train` by its everyday knobs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from mowa.cli import recipe_options
from mowa.cli.train import launch_training
from mowa.training.config import schema
from mowa.training.config.ctc import CTCRecipe

FIXED_KEYS = ("task", "model", "train", "vocabulary", "distil.layers", "batch.layout")


@click.command(short_help="Make a smaller model of a larger one.")
@click.option("--teacher", required=True, help="The larger model: an alias, a folder or a hub id.")
@click.option("--student-layers", type=click.IntRange(min=1), required=True, help="Blocks the student keeps, evenly.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for the finished checkpoint.")
@click.option("--threads", type=click.IntRange(min=1), help="Processor threads. [default: the cores there are]")
@click.pass_context
def distill(
    context: click.Context, teacher: str, student_layers: int, out: Path, threads: int | None, **_: Any
) -> None:
    """Make a smaller model of a larger one: it begins as some of its blocks and is held to what it says and hears.

    Recordings need no texts, but some with texts have to be there to measure on (--dev). Every knob of `mowa train` can
    be turned by its path: --distil.temperature 2.
    """
    from mowa.errors import RecipeError
    from mowa.training.config import ctc

    settings = recipe_options.collect_overrides(context)
    if missing := [recipe_options.FLAG_BY_KEY[path] for path in ("data.train", "data.dev") if path not in settings]:
        raise RecipeError(f"give {' and '.join(missing)}: recordings to listen to, and some with texts to measure on")
    plan = schema.apply_overrides({}, settings | {"model": teacher, "distil.layers": student_layers})
    if launch_training(ctc.parse(plan, "command line"), out, threads) and os.environ.get("RANK", "0") == "0":
        click.echo(str(out))


_OVERRIDABLE_KEYS = {leaf.dotted for leaf in schema.iter_options(CTCRecipe)} - set(FIXED_KEYS)
distill.params.extend(
    option
    for option in recipe_options.recipe_options()
    if isinstance(option, recipe_options.RecipeOption) and option.leaf.dotted in _OVERRIDABLE_KEYS
)
