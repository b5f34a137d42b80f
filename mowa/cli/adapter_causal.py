"""What `mowa adapt` does with the adapter of a language model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mowa.adapters.causal import CausalAdapter
    from mowa.types import LanguageModel

MAX_EXAMPLES = 64  # examples that a merged model is compared over
FALLBACK_PROMPTS = (
    "What is the capital of Poland?",
    "Write a short poem about the sea.",
    "Explain in one sentence why the sky is blue.",
    "List three fruits that are red.",
    "How do I boil an egg?",
    "Translate to French: Good morning, how are you?",
    "What is 17 plus 25?",
    "Name a famous composer and one of his works.",
)


def show_causal(found: CausalAdapter) -> None:
    """Say what an adapter is, of which base, and how well it did."""
    from mowa.adapters.causal import WEIGHTS_FILE
    from mowa.cli.output import format_size, print_table

    base, weights = found.base, found.folder / WEIGHTS_FILE
    rows = [
        ["kind", "low-rank updates (LoRA) of a language model"],
        ["base", base.load_name if base.load_name == base.name else f"{base.name} ({base.load_name})"],
        ["base's weights", f"sha256 {base.sha256}"],
        ["parameters", f"{found.parameters:,}"],
        ["file", f"{weights.name}, {format_size(weights.stat().st_size) if weights.is_file() else 'missing'}"],
        ["made by", ", ".join(f"{name} {version}" for name, version in found.package_versions.items())],
        *([name, f"loss {row['loss']:.3f}, right {row['accuracy']:.1%}"] for name, row in found.metrics.items()),
    ]
    print_table(["adapter", str(found.folder)], rows)


def merge_causal(adapter: Path, out: Path, model: str | None, data: tuple[str, ...], dtype: str, offline: bool) -> None:
    """Write `adapter` and its base as one checkpoint in `dtype`; it is read again and compared before it is there."""
    from mowa.adapters import causal as language
    from mowa.loading import causal as text

    found = language.read_adapter(adapter)
    name = model or found.base.load_name
    base = text.load(name, offline=offline)
    dtype = str(language.stored_dtype(base.origin.folder)).removeprefix("torch.") if dtype == "auto" else dtype
    adapted = language.load_adapter(base, adapter)
    rows, of = _compared(adapter, adapted, data)
    rounded = None
    if dtype != "float32":
        rounded = language.compare_logits(base, text.load(name, dtype=dtype, offline=offline), _batches(rows))
        click.echo(f"base → base in {dtype}, {of}: {rounded}", err=True)
    with language.atomic_checkpoint(language.merge_adapter(adapted, dtype), out) as folder:
        agreement = language.compare_logits(adapted, text.load(str(folder), dtype=dtype), _batches(rows))
        click.echo(f"base with adapter → merged in {dtype}, {of}: {agreement}", err=True)
        language.verify_merge(agreement, rounded)
    click.echo(str(out))


def _compared(adapter: Path, model: LanguageModel, data: tuple[str, ...]) -> tuple[list[Any], str]:
    """What a merged model is compared over, and what that is: data that was named, what the run held out, questions."""
    from mowa.data.chat import conversations, tokenize
    from mowa.errors import DataError
    from mowa.training.causal import dataset
    from mowa.training.config import dispatch

    encode: Any = {"learn": "all", "long": "truncate", "length": dataset.EVAL_BATCH_TOKENS}
    if data:
        items = [item for path in data for item in conversations.read_conversations(path)]
        return tokenize.tokenize_conversations(items, model.tokenizer, **encode)[0][:MAX_EXAMPLES], ", ".join(data)
    try:
        plan: Any = dispatch.read_recipe(adapter / "recipe.yaml")
        held_out = dataset.load_splits(plan, model)
        return [row for rows in (held_out.test | held_out.dev).values() for row in rows][
            :MAX_EXAMPLES
        ], "what the run held out"
    except DataError:  # moved since
        items = [
            conversations.Conversation(str(n), (conversations.Message("user", said),))
            for n, said in enumerate(FALLBACK_PROMPTS)
        ]
        return tokenize.tokenize_conversations(items, model.tokenizer, **encode)[0], "eight questions"


def _batches(rows: list[Any]) -> Any:
    from mowa.tasks import causal
    from mowa.training.causal import batches, dataset

    groups = batches.group_by_length([len(row) for row in rows], range(len(rows)), dataset.EVAL_BATCH_TOKENS)
    return (causal.pad([rows[index] for index in group], 0, pad_to_multiple_of=1) for group in groups)
