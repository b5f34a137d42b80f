"""`mowa train`: a recipe in, a checkpoint out."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Train a model as a recipe says.")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for the finished checkpoint.")
@click.option("--threads", type=click.IntRange(min=1), help="Processor threads. [default: the cores there are]")
def train(recipe: Path, out: Path, threads: int | None) -> None:
    """Train a model from scratch as RECIPE (YAML) says. Started again, it goes on from its last checkpoint."""
    from mowa.train import recipe as recipes

    plan = recipes.read(recipe)
    from mowa.train import run

    run.train(plan, out, threads=threads)
    click.echo(str(out))
