"""`mowa generate`: answer a prompt with a language model."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mowa import hardware
from mowa.cli.recipe_options import KeyValuePairs


# fmt: off
@click.command(short_help="Generate text with a language model.")
@click.argument("model")
@click.option("-p", "--prompt", "prompts", multiple=True, metavar="TEXT",
              help="Prompt, repeatable. [default: standard input]")
@click.option("--system", default="", metavar="TEXT", help="System message before the prompt.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option("--chat-template-kwargs", type=KeyValuePairs(typed=True),
              help="Variables that the chat template reads: enable_thinking=false.")
@click.option("--adapter", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Adapter folder written by `mowa train` or PEFT.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True,
              help="Maximum number of tokens of an answer.")
@click.option("--temperature", type=click.FloatRange(min=0),
              help="0: always the most probable token; higher: more varied. [default: the model's]")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True),
              help="Sample from the fewest tokens with this total probability. [default: the model's]")
@click.option("--top-k", type=click.IntRange(min=0), help="Sample from this many tokens (0 = all)."
              " [default: the model's]")
@click.option("--repetition-penalty", type=click.FloatRange(min=0, min_open=True),
              help="Penalty of tokens that occurred before (1 = none). [default: the model's]")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text, repeatable.")
@click.option("--seed", type=int, help="Seed of the sampling.")
@click.option("--json", "as_json", is_flag=True,
              help="Print one JSON object per prompt, with token counts and finish reason.")
@click.option("--engine", type=click.Choice(["auto", "pytorch", "llama_cpp"]), default="auto", show_default=True,
              help="auto: llama_cpp for GGUF files, and otherwise pytorch, which runs GGUF files dequantized.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, …")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
              show_default=True, help="Compute dtype. auto: float32 on a CPU, the checkpoint's on a GPU.")
@click.option("--threads", type=click.IntRange(min=1), help="Number of CPU threads. [default: all available cores]")
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
@click.option("--offline", is_flag=True, help="Do not contact the Hugging Face Hub; use cached files only.")
def generate(
    model: str, prompts: tuple[str, ...], system: str, raw: bool, chat_template_kwargs: dict[str, Any] | None,
    adapter: Path | None, max_new_tokens: int,
    temperature: float | None, top_p: float | None, top_k: int | None, repetition_penalty: float | None,
    stop: tuple[str, ...], seed: int | None, as_json: bool, engine: str, device: str, dtype: str, threads: int | None,
    revision: str | None, offline: bool,
) -> None:
    # fmt: on
    """Answer a prompt with MODEL: a folder, a Hub id, a GGUF file, or the folder of a fine-tuning run.

    The prompt is put into the model's chat template, if it has one. The answer is printed as it is generated.
    """
    hardware.enable_huge_pages()
    if engine != "pytorch" and (model.lower().endswith(".gguf") or any(Path(model).glob("*.gguf"))):
        hardware.set_passive_openmp()  # for llama.cpp
    texts = prompts or (sys.stdin.read().strip(),)
    import mowa
    from mowa.api.text import open_text_model

    loaded = open_text_model(
        model, engine=engine, threads=threads, adapter=adapter, device=device, dtype=dtype, revision=revision,
        offline=offline,
    )  # fmt: skip
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k,
        "repetition_penalty": repetition_penalty, "stop": stop, "seed": seed,
        "chat": False if raw else None, "system": system, "threads": threads,
        "chat_template_kwargs": chat_template_kwargs,
    }  # fmt: skip
    if as_json:
        for text, answer in zip(texts, mowa.generate(loaded, list(texts), **options), strict=True):
            click.echo(json.dumps({"prompt": text} | asdict(answer), ensure_ascii=False))
        return
    for text in texts:
        for piece in mowa.generate(loaded, text, stream=True, **options):
            click.echo(piece, nl=False)
        click.echo()
