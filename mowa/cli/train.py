"""`mowa train`: fine-tune a model from a recipe file, from command-line options, or from both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mowa import hardware
from mowa.cli import recipe_options
from mowa.errors import RecipeError
from mowa.training.distributed.process import is_worker_process


def _list_options(task: str | None) -> None:
    """Print the options of a task, or of every task (None), one table after the other."""
    from mowa.cli import output

    for index, name in enumerate([task] if task else recipe_options.RECIPES):
        if task is None:
            click.echo(f"{chr(10) * min(index, 1)}task: {name} ({recipe_options.TASK_TITLES[name]})\n")
        output.print_table(("key", "flag", "default", "description"), list(recipe_options.option_rows(name)))


# fmt: off
@click.command(cls=recipe_options.TrainingCommand, short_help="Fine-tune a model from a recipe.")
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path),
              help="Output folder for the checkpoint or adapter.  [required]")
@click.option("--dry-run", is_flag=True, help="Print the complete recipe, defaults included, and exit.")
@click.option("--list-options", is_flag=True,
              help="List every recipe option of the task (--task, or RECIPE's) and exit; without either, of each task.")
@click.option("--threads", type=click.IntRange(min=1), help="Number of CPU threads. [default: all available cores]")
@click.pass_context
def train(
    context: click.Context, recipe: Path | None, out: Path | None, dry_run: bool, list_options: bool,
    threads: int | None, **_: Any,
) -> None:
    # fmt: on
    """Fine-tune a model from RECIPE (YAML).

    RECIPE may be omitted if --model and --data are given. Options on the command line override the recipe; every recipe
    key is an option: --optimizer.weight-decay 0.1, or --weight-decay 0.1 where the last part is unique. An interrupted
    run resumes from its last checkpoint.
    """
    settings = recipe_options.collect_overrides(context)
    if list_options:
        _list_options(recipe_options.set_task(context, settings.get("task"), recipe))
        return
    needed = [] if recipe else [key for key in ("model", "data.train") if key not in settings]
    if needed:
        flags = " and ".join(recipe_options.FLAG_BY_KEY[key] for key in needed)
        raise RecipeError(f"name a recipe, or give {flags}; `mowa train --list-options` lists all options")
    hardware.enable_huge_pages()
    import mowa
    from mowa.api.training import read_recipe
    from mowa.training.config import schema

    if dry_run:
        click.echo(schema.to_yaml(read_recipe(recipe, **settings)), nl=False)
        return
    if out is None:
        raise click.MissingParameter(ctx=context, param_hint="'-o' / '--out'", param_type="option")
    with recipe_options.resume_hint_on_interrupt(out):
        mowa.train(recipe, out=out, threads=threads, **settings)
    if not is_worker_process():
        click.echo(str(out))


train.params.extend(recipe_options.recipe_options())
