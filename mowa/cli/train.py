"""`mowa train`: a recipe in, a checkpoint out. Fine-tuning, and training from nothing, by what the recipe says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mowa import machine
from mowa.cli import knobs
from mowa.errors import RecipeError

if TYPE_CHECKING:
    from mowa.train.instruct import CausalRecipe
    from mowa.train.plans import Plan
    from mowa.train.tuning import CTCRecipe


def _list_options(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if not wanted or context.resilient_parsing:
        return
    from mowa.cli import show

    show.print_table(("knob", "in short", "default", "what it is for"), list(knobs.option_rows()))
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
    plan = _plan(recipe, knobs.collect_overrides(context))
    if dry_run:
        from mowa.train import schema

        click.echo(schema.to_yaml(plan), nl=False)
        return
    if out is None:
        raise click.MissingParameter(ctx=context, param_hint="'-o' / '--out'", param_type="option")
    here = launch_training(plan, out, threads)
    if here and os.environ.get("RANK", "0") == "0":  # of several processes, the first one says it
        click.echo(str(out))


train.params.extend(knobs.recipe_options())  # behind its own, in the help too


def _plan(recipe: Path | None, settings: dict[str, Any]) -> Plan:
    """The recipe with `settings` turned. RecipeError where there is none, or one from nothing has no such knobs."""
    from mowa.train import plans, schema

    if recipe is None:
        if missing := [knobs.FLAG_BY_KEY[path] for path in ("model", "data.train") if path not in settings]:
            raise RecipeError(f"name a recipe, or give {' and '.join(missing)}; `mowa train --knobs` lists every knob")
        return plans.parse(schema.apply_overrides({}, settings), "command line")
    if settings and plans.is_staged_recipe(schema.read_yaml(recipe)):
        flags = ", ".join(
            knobs.FLAG_BY_KEY.get(leaf.dotted, knobs.flag_name(leaf))
            for leaf in knobs.LEAVES
            if leaf.dotted in settings
        )
        raise RecipeError(f"{recipe} trains from nothing, and {flags} are for fine-tuning: say it in the recipe")
    plan = plans.read_recipe(recipe, settings)
    if "optimise.epochs" in settings and "optimise.steps" not in settings and plan.optimizer.max_steps:  # type: ignore[union-attr]
        raise RecipeError(f"{recipe} says how many steps, so --epochs would change nothing: add --steps 0")
    return plan


def launch_training(plan: Plan, out: Path, threads: int | None) -> bool:
    """Train, here or in processes of its own. → whether it was here."""
    machine.enable_huge_pages()
    from mowa.train.recipe import Recipe

    if isinstance(plan, Recipe):
        from mowa.train import run as fresh

        fresh.train(plan, out, threads=threads)
        return True
    from mowa.train import parallel, plans

    if parallel.needs_launcher(plan) and not parallel.is_worker_process():
        parallel.launch_workers(plan, out, threads=threads)
        return False
    plans.train(plan, _model(plan), out, threads=threads)
    return True


def _model(plan: CTCRecipe | CausalRecipe) -> Any:
    from mowa.loading import speech, text
    from mowa.train.instruct import CausalRecipe

    if not isinstance(plan, CausalRecipe):
        return speech.load(plan.model, require_head=plan.vocabulary != "new")
    from mowa.files import fetch_config
    from mowa.train.sft import resolve_base_dtype

    return text.load(plan.model, dtype=resolve_base_dtype(plan, fetch_config(plan.model)))
