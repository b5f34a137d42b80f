"""`mowa train`: fine-tune a model from a recipe file, from command-line options, or from both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mowa import hardware
from mowa.cli import recipe_options
from mowa.errors import RecipeError
from mowa.training.distributed.process import is_main_process, is_worker_process

if TYPE_CHECKING:
    from mowa.training.config.dispatch import Recipe


def _list_options(task: str | None) -> None:
    """Print the options of a task; None: of every task, one table after the other."""
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
    loaded = _read_recipe(recipe, settings)
    if dry_run:
        from mowa.training.config import schema

        click.echo(schema.to_yaml(loaded), nl=False)
        return
    if out is None:
        raise click.MissingParameter(ctx=context, param_hint="'-o' / '--out'", param_type="option")
    in_this_process = launch_training(loaded, out, threads)
    if in_this_process and is_main_process():
        click.echo(str(out))


train.params.extend(recipe_options.recipe_options())


def _read_recipe(path: Path | None, settings: dict[str, Any]) -> Recipe:
    """Return the recipe with `settings` applied.

    Raises RecipeError for a missing recipe, and for --epochs without effect.
    """
    from mowa.training.config import dispatch, schema

    if path is None:
        if missing := [recipe_options.FLAG_BY_KEY[path] for path in ("model", "data.train") if path not in settings]:
            raise RecipeError(
                f"name a recipe, or give {' and '.join(missing)}; `mowa train --list-options` lists all options"
            )
        return dispatch.parse(schema.apply_overrides({}, settings), "command line")
    recipe = dispatch.read_recipe(path, settings)
    if "optimizer.epochs" in settings and "optimizer.max_steps" not in settings and recipe.optimizer.max_steps:
        raise RecipeError(f"{path} sets max_steps, so --epochs would have no effect: add --max-steps 0")
    return recipe


def launch_training(recipe: Recipe, out: Path, threads: int | None) -> bool:
    """Train in this process, or in worker processes where the recipe needs several. Return whether it was this one."""
    hardware.enable_huge_pages()
    from mowa.training.config import dispatch
    from mowa.training.distributed import launch

    if launch.needs_launcher(recipe) and not is_worker_process():
        launch.launch_workers(recipe, out, threads=threads)
        return False
    dispatch.train(recipe, _load_model(recipe), out, threads=threads)
    return True


def _load_model(recipe: Recipe) -> Any:
    from mowa.loading import causal, ctc
    from mowa.training.config.causal import CausalRecipe

    if not isinstance(recipe, CausalRecipe):
        return ctc.load(recipe.model, require_head=recipe.vocabulary != "new")
    from mowa.io.hub import fetch_config
    from mowa.training.causal.setup import resolve_base_dtype

    return causal.load(recipe.model, dtype=resolve_base_dtype(recipe, fetch_config(recipe.model)))
