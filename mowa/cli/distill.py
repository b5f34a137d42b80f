"""`mowa distill`: distill a speech model into one with fewer layers, as a `mowa train` recipe built from options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mowa import hardware
from mowa.cli import recipe_options
from mowa.errors import RecipeError
from mowa.training.config import schema
from mowa.training.config.ctc import CTCRecipe
from mowa.training.distributed.process import is_worker_process

FIXED_KEYS = ("task", "model", "method", "vocabulary", "distillation.student_layers", "batch.packing")


@click.command(cls=recipe_options.TrainingCommand, task="ctc", short_help="Distill a model into one with fewer layers.")
@click.argument("model", metavar="TEACHER")
@click.option("--student-layers", type=click.IntRange(min=1), required=True,
              help="Number of teacher layers kept in the student, evenly spaced.")  # fmt: skip
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Output folder for the checkpoint.")
@click.option("--threads", type=click.IntRange(min=1), help="Number of CPU threads. [default: all available cores]")
@click.pass_context
def distill(context: click.Context, model: str, student_layers: int, out: Path, threads: int | None, **_: Any) -> None:
    """Distill TEACHER, an alias, a folder or a Hub id, into a model with fewer layers.

    The student is initialised from a subset of the teacher's layers and trained to match the teacher's logits and
    hidden states. Training recordings need no transcripts; the --dev set does. Every `mowa train` option is accepted,
    e.g. --distillation.temperature 2.
    """
    settings = recipe_options.collect_overrides(context)
    if missing := [recipe_options.FLAG_BY_KEY[key] for key in ("data.train", "data.dev") if key not in settings]:
        raise RecipeError(
            f"missing {' and '.join(missing)}: distillation needs training recordings (--data) and transcribed"
            " recordings to evaluate on (--dev)"
        )
    hardware.enable_huge_pages()
    import mowa

    data, dev = settings.pop("data.train"), settings.pop("data.dev")
    with recipe_options.resume_hint_on_interrupt(out):
        mowa.distill(model, student_layers, out=out, data=data, dev=dev, threads=threads, **settings)
    if not is_worker_process():
        click.echo(str(out))


_OVERRIDABLE_KEYS = {leaf.dotted for leaf in schema.iter_options(CTCRecipe)} - set(FIXED_KEYS)
distill.params.extend(
    option
    for option in recipe_options.recipe_options()
    if isinstance(option, recipe_options.RecipeOption) and option.leaf.dotted in _OVERRIDABLE_KEYS
)
