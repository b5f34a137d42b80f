"""What `mowa adapt` does with the adapter of a language model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mowa.adapt.language import Updates
    from mowa.nouns import LanguageModel

MOST = 64  # examples that a merged model is compared over
QUESTIONS = (
    "What is the capital of Poland?",
    "Write a short poem about the sea.",
    "Explain in one sentence why the sky is blue.",
    "List three fruits that are red.",
    "How do I boil an egg?",
    "Translate to French: Good morning, how are you?",
    "What is 17 plus 25?",
    "Name a famous composer and one of his works.",
)


def show(found: Updates) -> None:
    """Say what an adapter is, of which base, and how well it did."""
    from mowa.adapt.language import WEIGHTS
    from mowa.cli.show import size, table

    base, weights = found.base, found.folder / WEIGHTS
    rows = [
        ["kind", "low-rank updates (LoRA) of a language model"],
        ["base", base.where if base.where == base.name else f"{base.name} ({base.where})"],
        ["base's weights", f"sha256 {base.sha256}"],
        ["parameters", f"{found.parameters:,}"],
        ["file", f"{weights.name}, {size(weights.stat().st_size) if weights.is_file() else 'missing'}"],
        ["made by", ", ".join(f"{name} {version}" for name, version in found.made_by.items())],
        *([name, f"loss {row['loss']:.3f}, right {row['accuracy']:.1%}"] for name, row in found.metrics.items()),
    ]
    table(["adapter", str(found.folder)], rows)


def merge(adapter: Path, out: Path, model: str | None, data: tuple[str, ...], dtype: str, offline: bool) -> None:
    """Write `adapter` and its base as one checkpoint in `dtype`; it is read again and compared before it is there."""
    from mowa.adapt import language
    from mowa.loading import text

    found = language.read(adapter)
    name = model or found.base.where
    base = text.load(name, offline=offline)
    dtype = str(language.stored_dtype(base.origin.folder)).removeprefix("torch.") if dtype == "auto" else dtype
    adapted = language.load(base, adapter)
    rows, of = _compared(adapter, adapted, data)
    rounded = None
    if dtype != "float32":
        rounded = language.compare(base, text.load(name, dtype=dtype, offline=offline), _batches(rows))
        click.echo(f"base → base in {dtype}, {of}: {rounded}", err=True)
    with language.written(language.merge(adapted, dtype), out) as folder:
        agreement = language.compare(adapted, text.load(str(folder), dtype=dtype), _batches(rows))
        click.echo(f"base with adapter → merged in {dtype}, {of}: {agreement}", err=True)
        language.refuse_drift(agreement, rounded)
    click.echo(str(out))


def _compared(adapter: Path, model: LanguageModel, data: tuple[str, ...]) -> tuple[list[Any], str]:
    """What a merged model is compared over, and what that is: data that was named, what the run held out, questions."""
    from mowa.data import chat, dialogues
    from mowa.errors import DataError
    from mowa.train import plans, texts

    encode: Any = {"learn": "all", "long": "truncate", "length": texts.FEW}
    if data:
        items = [item for path in data for item in dialogues.read(path)]
        return chat.encode(items, model.tokenizer, **encode)[0][:MOST], ", ".join(data)
    try:
        plan: Any = plans.read(adapter / "recipe.yaml")
        held_out = texts.gather(plan, model)
        return [row for rows in (held_out.test | held_out.dev).values() for row in rows][:MOST], "what the run held out"
    except DataError:  # moved since
        items = [dialogues.Conversation(str(n), (dialogues.Message("user", said),)) for n, said in enumerate(QUESTIONS)]
        return chat.encode(items, model.tokenizer, **encode)[0], "eight questions"


def _batches(rows: list[Any]) -> Any:
    from mowa.tasks import causal
    from mowa.train import bins, texts

    groups = bins.rows([len(row) for row in rows], range(len(rows)), texts.FEW)
    return (causal.pad([rows[index] for index in group], 0, grid=1) for group in groups)
