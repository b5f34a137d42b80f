"""What would be learnt wrongly from tokenised examples, one finding a line, with what to do.

It looks at ids and at which are learnt; texts and templates are not known here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

_SLACK = 0.05  # tables of embeddings are rounded up by so much at most, or by a thousand


class Row(Protocol):
    @property
    def id(self) -> str: ...

    @property
    def ids(self) -> np.ndarray: ...

    @property
    def learnt(self) -> np.ndarray: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Finding:
    """What was seen, with its numbers, and what to do. A fatal one leaves nothing sensible to learn."""

    name: str
    seen: str
    advice: str
    fatal: bool = False

    def __str__(self) -> str:
        return f"{'wrong' if self.fatal else 'warning'}: {self.name}: {self.seen}. {self.advice}"


def findings(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    stops: set[int],
    vocab_size: int | None,
    passages: set[str],
    cut: set[str],
    spelt: int,
    unguarded: int,
    empty: int,
) -> list[Finding]:
    """Everything there is to say of `rows`.

    stops: tokens that end an answer; vocab_size: rows of the embeddings; passages: ids of plain texts; cut: ids of rows
    that end where they had to; spelt, unguarded: how many texts, how many conversations hold words that were read as
    special tokens; empty: how many items there were, where none is left.
    """
    if empty:
        advice = "Look at why each was left out, at data.learn, data.length and the chat template"
        return [Finding("all labels masked", f"no token is learnt in any of {empty} examples", advice, fatal=True)]
    asked = [row for row in rows if row.id not in passages]
    found = [*_sizes(rows, tokenizer, vocab_size), *_twice(rows, tokenizer), *_unknown(rows, tokenizer)]
    found += _ends([row for row in asked if row.id not in cut], tokenizer, stops)
    if asked and tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        seen = f"the tokenizer pads with its EOS ({tokenizer.eos_token})"
        found.append(Finding("pad is EOS", seen, "Here labels are masked by place, so EOS is learnt; others may not"))
    if spelt:
        seen = f"{spelt} texts spell special tokens, which are read as such"
        found.append(Finding("special tokens in texts", seen, "If these are conversations, give them as messages"))
    if unguarded:
        seen = f"in {unguarded} conversations somebody spells a special token, and this tokenizer reads it as one"
        found.append(Finding("special tokens in turns", seen, "Take them out of the texts"))
    return found


def _sizes(rows: Sequence[Row], tokenizer: Any, vocab_size: int | None) -> Iterator[Finding]:
    if vocab_size is None:
        return
    highest = max((int(row.ids.max()) for row in rows), default=0)
    advice = "Another model's tokenizer, or one that tokens were added to: load the model's own, or resize the model"
    if highest >= vocab_size:
        seen = (
            f"token {highest} ({tokenizer.convert_ids_to_tokens(highest)}), and the model has {vocab_size} embeddings"
        )
        yield Finding("vocabulary", seen, advice, fatal=True)
    elif len(tokenizer) > vocab_size or vocab_size - len(tokenizer) > max(1_000, _SLACK * vocab_size):
        seen = f"the tokenizer has {len(tokenizer)} tokens, the model {vocab_size} embeddings"
        yield Finding("vocabulary", seen, advice)


def _twice(rows: Sequence[Row], tokenizer: Any) -> Iterator[Finding]:
    bos = tokenizer.bos_token_id
    twice = [row.id for row in rows if bos is not None and len(row) > 1 and row.ids[0] == row.ids[1] == bos]
    if twice:
        advice = "Mend the chat template: nothing but it writes BOS here"
        yield Finding("double BOS", f"{len(twice)} examples begin with BOS twice ({twice[0]})", advice, fatal=True)


def _unknown(rows: Sequence[Row], tokenizer: Any) -> Iterator[Finding]:
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown == tokenizer.eos_token_id:
        return
    counts = {row.id: int((row.ids == unknown).sum()) for row in rows}
    if total := sum(counts.values()):
        share, first = total / sum(map(len, rows)), next(name for name, count in counts.items() if count)
        seen = f"{total} tokens ({share:.1%}) are {tokenizer.unk_token}, which stands for anything ({first})"
        yield Finding("unknown tokens", seen, "Take another checkpoint, or leave those texts out")


def _ends(rows: Sequence[Row], tokenizer: Any, stops: set[int]) -> Iterator[Finding]:
    """Of the learnt stretches, those that do not end with a token that stops generation."""
    last: Counter[int] = Counter()
    for row in rows:
        if not row.learnt.all():
            last.update(row.ids[row.learnt & ~np.append(row.learnt[1:], False)].tolist())
    others = Counter({token: count for token, count in last.items() if token not in stops})
    if not others:
        return
    token, _ = others.most_common(1)[0]
    word = tokenizer.convert_ids_to_tokens(token)
    seen = f"{others.total()} of {last.total()} answers end with {word!r}, which does not stop generation"
    if token in tokenizer.all_special_ids or token in tokenizer.added_tokens_decoder:
        advice = f"Add {token} to eos_token_id in generation_config.json, or answers will run on"
    else:
        advice = "The model will not learn to stop: take a template that ends answers with EOS (data.template: plain)"
    yield Finding("EOS is not learnt", seen, advice)
