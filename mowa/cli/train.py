"""`mowa train`: a recipe in, a checkpoint out. Fine-tuning, and training from nothing, by what the recipe says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mowa import hardware
from mowa.cli import recipe_options
from mowa.errors import RecipeError

if TYPE_CHECKING:
    from mowa.training.config.causal import CausalRecipe
    from mowa.training.config.ctc import CTCRecipe
    from mowa.training.config.dispatch import Plan


def _list_options(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if not wanted or context.resilient_parsing:
        return
    from mowa.cli import output

    output.print_table(("knob", "in short", "default", "what it is for"), list(recipe_options.option_rows()))
    context.exit()


@click.command(short_help="Train a model as a recipe says.")
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder for the finished checkpoint.  [required]")
@click.option("--dry-run", is_flag=True, help="Print the whole recipe, every knob spelt out, and train nothing.")
@click.option(
    *("--knobs", "listed"),
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_options,
    help="List every knob of the recipe, and train nothing.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Processor threads. [default: the cores there are]")
@click.pass_context
def train(
    context: click.Context, recipe: Path | None, out: Path | None, dry_run: bool, threads: int | None, **_: Any
) -> None:
    """Train a model as RECIPE (YAML) says: tune one on your recordings or texts, or make one from nothing.

    RECIPE may be left out where --model and --data are given. What is said here goes before what it says, and every
    knob of fine-tuning can be turned by its path: --optimise.weight-decay 0.1. Started again, a run goes on from its
    last checkpoint.
    """
    plan = _plan(recipe, recipe_options.collect_overrides(context))
    if dry_run:
        from mowa.training.config import schema

        click.echo(schema.to_yaml(plan), nl=False)
        return
    if out is None:
        raise click.MissingParameter(ctx=context, param_hint="'-o' / '--out'", param_type="option")
    here = launch_training(plan, out, threads)
    if here and os.environ.get("RANK", "0") == "0":  # of several processes, the first one says it
        click.echo(str(out))


train.params.extend(recipe_options.recipe_options())  # behind its own, in the help too


def _plan(recipe: Path | None, settings: dict[str, Any]) -> Plan:
    """The recipe with `settings` turned. RecipeError where there is none, or one from nothing has no such knobs."""
    from mowa.training.config import dispatch, schema

    if recipe is None:
        if missing := [recipe_options.FLAG_BY_KEY[path] for path in ("model", "data.train") if path not in settings]:
            raise RecipeError(f"name a recipe, or give {' and '.join(missing)}; `mowa train --knobs` lists every knob")
        return dispatch.parse(schema.apply_overrides({}, settings), "command line")
    if settings and dispatch.is_staged_recipe(schema.read_yaml(recipe)):
        flags = ", ".join(
            recipe_options.FLAG_BY_KEY.get(leaf.dotted, recipe_options.flag_name(leaf))
            for leaf in recipe_options.LEAVES
            if leaf.dotted in settings
        )
        raise RecipeError(f"{recipe} trains from nothing, and {flags} are for fine-tuning: say it in the recipe")
    plan = dispatch.read_recipe(recipe, settings)
    if "optimise.epochs" in settings and "optimise.steps" not in settings and plan.optimizer.max_steps:  # type: ignore[union-attr]
        raise RecipeError(f"{recipe} says how many steps, so --epochs would change nothing: add --steps 0")
    return plan


def launch_training(plan: Plan, out: Path, threads: int | None) -> bool:
    """Train, here or in processes of its own. → whether it was here."""
    hardware.enable_huge_pages()
    from projects.pl_tiny.recipe import Recipe

    if isinstance(plan, Recipe):
        from projects.pl_tiny import pretrain as fresh

        fresh.train(plan, out, threads=threads)
        return True
    from mowa.training.config import dispatch
    from mowa.training.distributed import launch

    if launch.needs_launcher(plan) and not launch.is_worker_process():
        launch.launch_workers(plan, out, threads=threads)
        return False
    dispatch.train(plan, _model(plan), out, threads=threads)
    return True


def _model(plan: CTCRecipe | CausalRecipe) -> Any:
    from mowa.loading import causal, ctc
    from mowa.training.config.causal import CausalRecipe

    if not isinstance(plan, CausalRecipe):
        return ctc.load(plan.model, require_head=plan.vocabulary != "new")
    from mowa.io.hub import fetch_config
    from mowa.training.causal.trainer import resolve_base_dtype

    return causal.load(plan.model, dtype=resolve_base_dtype(plan, fetch_config(plan.model)))
