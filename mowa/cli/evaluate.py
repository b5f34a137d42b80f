"""`mowa evaluate`: measure models on data with known answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mowa import hardware
from mowa.cli import output
from mowa.cli.recipe_options import KeyValuePairs

if TYPE_CHECKING:
    from mowa.evaluation.scoring import Evaluation


# fmt: off
@click.command(short_help="Measure a model on data with known answers.")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--data", "sources", multiple=True, required=True, metavar="SOURCE",
              help="Recordings with transcripts, conversations or texts; repeatable.")
@click.option("--split", default="", help="Split of --data.")
@click.option("--max-samples", type=click.IntRange(min=0), default=0, help="Maximum number of samples (0 = all).")
@click.option("--adapter", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Adapter folder written by `mowa train` or PEFT.")
@click.option("--engine", default="auto", show_default=True, help="Speech: inference engine, as in `mowa transcribe`.")
@click.option("--train-on", type=click.Choice(["auto", "responses", "last", "all"]), default="auto", show_default=True,
              help="Language models: tokens that count, as in recipes. auto: answers of conversations, all of texts.")
@click.option("--max-length", type=click.IntRange(min=2),
              help="Language models: longer samples are cut, in tokens. [default: 2048, or the model's context]")
@click.option("--chat-template-kwargs", type=KeyValuePairs(typed=True),
              help="Language models: variables that the chat template reads: enable_thinking=false.")
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="FILE.json", help="Write the results as JSON.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, …")
@click.option("--dtype", default="auto", show_default=True, help="Compute dtype: float32, bfloat16, float16 or auto.")
@click.option("--threads", type=click.IntRange(min=1), help="Number of CPU threads. [default: all available cores]")
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
@click.option("--offline", is_flag=True, help="Do not contact the Hugging Face Hub; use cached files only.")
def evaluate(
    models: tuple[str, ...], sources: tuple[str, ...], split: str, max_samples: int, adapter: Path | None, engine: str,
    train_on: str, max_length: int | None, chat_template_kwargs: dict[str, Any] | None,
    out: Path | None, device: str, dtype: str, threads: int | None,
    revision: str | None, offline: bool,
) -> int:
    # fmt: on
    """Measure each MODEL on each SOURCE, with 95 % confidence intervals.

    Speech: word and character error rate. Language models: loss in nats per token, perplexity, and the accuracy of the
    most probable token. Exports and the folders of training runs are models too. The exit code is 2 if a recording
    could not be read; it is then not in the error rates.
    """
    hardware.enable_huge_pages()
    import mowa
    from mowa.io.atomic import atomic_write

    results: list[Evaluation] = []
    for model in models:
        for source in sources:
            with output.count_progress(f"{Path(model).name} on {Path(source).name}") as on_progress:
                found = mowa.evaluate(
                    model, source, split=split, max_samples=max_samples, adapter=adapter, engine=engine,
                    device=device, dtype=dtype, threads=threads, revision=revision, offline=offline,
                    train_on=train_on, max_length=max_length, chat_template_kwargs=chat_template_kwargs,
                    on_progress=on_progress,
                )  # fmt: skip
            results.append(found)
            click.echo(f"{'' if len(results) == 1 else chr(10)}{found}")
            if out is not None:  # after each, so that a later failure loses nothing
                rows = [one.to_dict() for one in results]
                atomic_write(out, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
    return 2 if any(one.failures for one in results) else 0
