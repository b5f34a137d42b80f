"""What a language model learns from and is measured on: read, told apart, turned into tokens, and shown."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mowa.data.chat import conversations, tokenize
from mowa.data.chat.tokenize import TokenizedSample
from mowa.errors import DataError
from mowa.tasks import causal
from mowa.training.causal import batches
from mowa.training.config.causal import CausalData, CausalRecipe
from mowa.training.config.ctc import DataSource
from mowa.training.ctc.dataset import name_sources, subsample
from mowa.training.monitor.sentinels import Finding
from mowa.types import LanguageModel

EVAL_BATCH_TOKENS = 1024  # tokens whose logits are there at once, where a set is measured by the stock net


@dataclass(frozen=True, slots=True)
class CausalSplits:
    """Tokenised examples. `dev` and `test` by name; `notes` say what was left out and why; `shown` is a few of them,
    with the learnt words marked; `findings` are what the first sentinels saw."""

    train: list[TokenizedSample]
    dev: dict[str, list[TokenizedSample]]
    test: dict[str, list[TokenizedSample]]
    notes: tuple[str, ...]
    preview: str
    findings: tuple[Finding, ...]


def load_splits(recipe: CausalRecipe, model: LanguageModel) -> CausalSplits:
    """Everything that `plan.data` names, as `model`'s tokenizer has it, which takes the template that `data` names.

    DataError where nothing is left to learn from or to measure on, or a check of the tokens says that it would be
    learnt wrongly.
    """
    data = recipe.data
    if data.chat_template:
        model.tokenizer.chat_template = load_chat_template(data.chat_template)
    notes: list[str] = []
    findings: list[Finding] = []

    def tokens(name: str, part: DataSource) -> list[TokenizedSample]:
        items = conversations.read_conversations(part.path, part.split, on_invalid=data.on_invalid)
        found, report = _encoded(items, data, model)
        notes.append(f"{name}: {report.text()}")
        findings.extend(Finding(f"{name}: {one.name}", 0, one.seen, one.advice) for one in report.findings)
        if not found:
            raise DataError(f"{name}: nothing is left to learn from\n{report.text()}")
        return found

    train = [row for part in data.train for row in tokens(part.path, part)]
    dev = {name: tokens(name, part) for name, part in name_sources(data.dev, "dev").items()}
    test = {name: tokens(name, part) for name, part in name_sources(data.test, "test").items()}
    if not dev:
        train, held_out = _held_out(train, data.hold_out, recipe.optimizer.seed)
        dev = {"dev": held_out}
    dev = {name: subsample(rows, data.max_eval_samples) for name, rows in dev.items()}
    shown = "\n\n".join(
        tokenize.format_sample(row, model.tokenizer, color=sys.stderr.isatty()) for row in train[: data.preview]
    )
    if leak := find_leakage(train, dev | test):
        findings.append(leak)
    return CausalSplits(train, dev, test, tuple(notes), shown, tuple(findings))


def _encoded(items: Any, data: CausalData, model: LanguageModel) -> Any:
    config = model.net.config.get_text_config()
    reads = getattr(config, "max_position_embeddings", None) or data.max_length
    return tokenize.tokenize_conversations(
        items,
        model.tokenizer,
        train_on=data.train_on,
        on_overflow=data.on_overflow,
        max_length=min(data.max_length, reads),
        eos_token_ids=eos_token_ids(model),
        vocab_size=model.net.get_input_embeddings().num_embeddings,
    )


def load_chat_template(name: str) -> str:
    """The text of a chat template: one of ours by its name, or a file's."""
    if name in tokenize.BUILTIN_TEMPLATES:
        return tokenize.BUILTIN_TEMPLATES[name]
    if Path(name).is_file():
        return Path(name).read_text(encoding="utf-8")
    raise DataError(f"data: template: {name} is no file, and none of {', '.join(tokenize.BUILTIN_TEMPLATES)}")


def eos_token_ids(model: LanguageModel) -> tuple[int, ...]:
    """The tokens that end an answer, as the model's generation settings and its tokenizer have them."""
    said = getattr(model.net.generation_config, "eos_token_id", None)
    several = list(said) if isinstance(said, list | tuple) else [said]
    return tuple({one for one in (*several, model.tokenizer.eos_token_id) if one is not None})


def _held_out(
    rows: list[TokenizedSample], share: float, seed: int
) -> tuple[list[TokenizedSample], list[TokenizedSample]]:
    """Whole conversations: of one that became several examples, all are on the same side."""
    names = list(dict.fromkeys(_conversation(row) for row in rows))
    count = round(share * len(names))
    if not 0 < count < len(names):
        raise DataError(
            f"no texts to measure on: {share:.0%} of {len(names)} held out leave nothing on one side; give data.dev, "
            "or another data.hold_out"
        )
    taken = {names[index] for index in np.random.default_rng(seed).permutation(len(names))[:count]}
    kept = [row for row in rows if _conversation(row) not in taken]
    return kept, [row for row in rows if _conversation(row) in taken]


def _conversation(row: TokenizedSample) -> str:
    return row.id.partition("#")[0]


def find_leakage(train: Sequence[TokenizedSample], unseen: dict[str, list[TokenizedSample]]) -> Finding | None:
    """Texts that are measured and learnt from too, word for word: losses on them will look better than they are."""
    known = {np.asarray(row.input_ids).tobytes() for row in train}
    shared = [row.id for rows in unseen.values() for row in rows if np.asarray(row.input_ids).tobytes() in known]
    if not shared:
        return None
    some = ", ".join(shared[:3]) + (", …" if len(shared) > 3 else "")
    return Finding(
        "leakage",
        0,
        f"{len(shared)} of {sum(map(len, unseen.values()))} examples to measure on are learnt from too ({some})",
        "Losses will look better than they are: take them out of train, or measure on others",
    )


def evaluate(net: Any, samples: Sequence[TokenizedSample]) -> dict[str, float]:
    """Loss and accuracy over the learnt tokens of `rows`, by the stock forward."""
    training = net.training
    net.eval()
    groups = batches.group_by_length([len(row) for row in samples], range(len(samples)), EVAL_BATCH_TOKENS)
    found = causal.evaluate(
        net, (causal.pad([samples[index] for index in group], 0, pad_to_multiple_of=1) for group in groups)
    )
    net.train(training)
    return found
