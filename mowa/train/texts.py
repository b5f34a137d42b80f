"""What a language model learns from and is measured on: read, told apart, turned into tokens, and shown."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mowa.data import chat, dialogues
from mowa.data.chat import Tokens
from mowa.errors import DataError
from mowa.nouns import LanguageModel
from mowa.tasks import causal
from mowa.train import bins
from mowa.train.gather import named, some
from mowa.train.instruct import Instruction, TextData
from mowa.train.sentinels import Finding
from mowa.train.tuning import Part

FEW = 1024  # tokens whose logits are there at once, where a set is measured by the stock net


@dataclass(frozen=True, slots=True)
class Texts:
    """Tokenised examples. `dev` and `test` by name; `notes` say what was left out and why; `shown` is a few of them,
    with the learnt words marked; `findings` are what the first sentinels saw."""

    train: list[Tokens]
    dev: dict[str, list[Tokens]]
    test: dict[str, list[Tokens]]
    notes: tuple[str, ...]
    shown: str
    findings: tuple[Finding, ...]


def gather(plan: Instruction, model: LanguageModel) -> Texts:
    """Everything that `plan.data` names, as `model`'s tokenizer has it, which takes the template that `data` names.

    DataError where nothing is left to learn from or to measure on, or a check of the tokens says that it would be
    learnt wrongly.
    """
    data = plan.data
    if data.template:
        model.tokenizer.chat_template = template(data.template)
    notes: list[str] = []
    findings: list[Finding] = []

    def tokens(name: str, part: Part) -> list[Tokens]:
        items = dialogues.read(part.path, part.split, bad=data.bad)
        found, report = _encoded(items, data, model)
        notes.append(f"{name}: {report.text()}")
        findings.extend(Finding(f"{name}: {one.name}", 0, one.seen, one.advice) for one in report.findings)
        if not found:
            raise DataError(f"{name}: nothing is left to learn from\n{report.text()}")
        return found

    train = [row for part in data.train for row in tokens(part.path, part)]
    dev = {name: tokens(name, part) for name, part in named(data.dev, "dev").items()}
    test = {name: tokens(name, part) for name, part in named(data.test, "test").items()}
    if not dev:
        train, held_out = _held_out(train, data.hold_out, plan.optimise.seed)
        dev = {"dev": held_out}
    dev = {name: some(rows, data.measured) for name, rows in dev.items()}
    shown = "\n\n".join(chat.show(row, model.tokenizer, color=sys.stderr.isatty()) for row in train[: data.shown])
    if leak := leakage(train, dev | test):
        findings.append(leak)
    return Texts(train, dev, test, tuple(notes), shown, tuple(findings))


def _encoded(items: Any, data: TextData, model: LanguageModel) -> Any:
    config = model.net.config.get_text_config()
    reads = getattr(config, "max_position_embeddings", None) or data.length
    return chat.encode(
        items,
        model.tokenizer,
        learn=data.learn,
        long=data.long,
        length=min(data.length, reads),
        eos_ids=end_ids(model),
        vocab_size=model.net.get_input_embeddings().num_embeddings,
    )


def template(name: str) -> str:
    """The text of a chat template: one of ours by its name, or a file's."""
    if name in chat.TEMPLATES:
        return chat.TEMPLATES[name]
    if Path(name).is_file():
        return Path(name).read_text(encoding="utf-8")
    raise DataError(f"data: template: {name} is no file, and none of {', '.join(chat.TEMPLATES)}")


def end_ids(model: LanguageModel) -> tuple[int, ...]:
    """The tokens that end an answer, as the model's generation settings and its tokenizer have them."""
    said = getattr(model.net.generation_config, "eos_token_id", None)
    several = list(said) if isinstance(said, list | tuple) else [said]
    return tuple({one for one in (*several, model.tokenizer.eos_token_id) if one is not None})


def _held_out(rows: list[Tokens], share: float, seed: int) -> tuple[list[Tokens], list[Tokens]]:
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


def _conversation(row: Tokens) -> str:
    return row.id.partition("#")[0]


def leakage(train: Sequence[Tokens], unseen: dict[str, list[Tokens]]) -> Finding | None:
    """Texts that are measured and learnt from too, word for word: losses on them will look better than they are."""
    known = {np.asarray(row.ids).tobytes() for row in train}
    shared = [row.id for rows in unseen.values() for row in rows if np.asarray(row.ids).tobytes() in known]
    if not shared:
        return None
    some = ", ".join(shared[:3]) + (", …" if len(shared) > 3 else "")
    return Finding(
        "leakage",
        0,
        f"{len(shared)} of {sum(map(len, unseen.values()))} examples to measure on are learnt from too ({some})",
        "Losses will look better than they are: take them out of train, or measure on others",
    )


def measure(net: Any, rows: Sequence[Tokens]) -> dict[str, float]:
    """Loss and accuracy over the learnt tokens of `rows`, by the stock forward."""
    training = net.training
    net.eval()
    groups = bins.rows([len(row) for row in rows], range(len(rows)), FEW)
    found = causal.measure(net, (causal.pad([rows[index] for index in group], 0, grid=1) for group in groups))
    net.train(training)
    return found
