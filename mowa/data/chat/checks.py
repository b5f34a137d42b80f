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


class Tokenized(Protocol):
    @property
    def id(self) -> str: ...

    @property
    def input_ids(self) -> np.ndarray: ...

    @property
    def loss_mask(self) -> np.ndarray: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class TokenizationIssue:
    """What was seen, with its numbers, and what to do. A fatal one leaves nothing sensible to learn."""

    name: str
    detail: str
    advice: str
    fatal: bool = False

    def __str__(self) -> str:
        return f"{'wrong' if self.fatal else 'warning'}: {self.name}: {self.detail}. {self.advice}"


def check_samples(
    samples: Sequence[Tokenized],
    tokenizer: Any,
    *,
    eos_token_ids: set[int],
    vocab_size: int | None,
    document_ids: set[str],
    truncated_ids: set[str],
    documents_with_specials: int,
    conversations_with_specials: int,
    num_dropped: int,
) -> list[TokenizationIssue]:
    """Everything there is to say of `rows`.

    stops: tokens that end an answer; vocab_size: rows of the embeddings; passages: ids of plain texts; cut: ids of rows
    that end where they had to; spelt, unguarded: how many texts, how many conversations hold words that were read as
    special tokens; empty: how many items there were, where none is left.
    """
    if num_dropped:
        advice = "Look at why each was left out, at data.learn, data.length and the chat template"
        return [
            TokenizationIssue(
                "all labels masked", f"no token is learnt in any of {num_dropped} examples", advice, fatal=True
            )
        ]
    asked = [row for row in samples if row.id not in document_ids]
    found = [*_sizes(samples, tokenizer, vocab_size), *_twice(samples, tokenizer), *_unknown(samples, tokenizer)]
    found += _ends([row for row in asked if row.id not in truncated_ids], tokenizer, eos_token_ids)
    if asked and tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        seen = f"the tokenizer pads with its EOS ({tokenizer.eos_token})"
        found.append(
            TokenizationIssue("pad is EOS", seen, "Here labels are masked by place, so EOS is learnt; others may not")
        )
    if documents_with_specials:
        seen = f"{documents_with_specials} texts spell special tokens, which are read as such"
        found.append(
            TokenizationIssue("special tokens in texts", seen, "If these are conversations, give them as messages")
        )
    if conversations_with_specials:
        seen = f"in {conversations_with_specials} conversations somebody spells a special token, and this tokenizer reads it as one"
        found.append(TokenizationIssue("special tokens in turns", seen, "Take them out of the texts"))
    return found


def _sizes(rows: Sequence[Tokenized], tokenizer: Any, vocab_size: int | None) -> Iterator[TokenizationIssue]:
    if vocab_size is None:
        return
    highest = max((int(row.input_ids.max()) for row in rows), default=0)
    advice = "Another model's tokenizer, or one that tokens were added to: load the model's own, or resize the model"
    if highest >= vocab_size:
        seen = (
            f"token {highest} ({tokenizer.convert_ids_to_tokens(highest)}), and the model has {vocab_size} embeddings"
        )
        yield TokenizationIssue("vocabulary", seen, advice, fatal=True)
    elif len(tokenizer) > vocab_size or vocab_size - len(tokenizer) > max(1_000, _SLACK * vocab_size):
        seen = f"the tokenizer has {len(tokenizer)} tokens, the model {vocab_size} embeddings"
        yield TokenizationIssue("vocabulary", seen, advice)


def _twice(rows: Sequence[Tokenized], tokenizer: Any) -> Iterator[TokenizationIssue]:
    bos = tokenizer.bos_token_id
    twice = [row.id for row in rows if bos is not None and len(row) > 1 and row.input_ids[0] == row.input_ids[1] == bos]
    if twice:
        advice = "Mend the chat template: nothing but it writes BOS here"
        yield TokenizationIssue(
            "double BOS", f"{len(twice)} examples begin with BOS twice ({twice[0]})", advice, fatal=True
        )


def _unknown(rows: Sequence[Tokenized], tokenizer: Any) -> Iterator[TokenizationIssue]:
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown == tokenizer.eos_token_id:
        return
    counts = {row.id: int((row.input_ids == unknown).sum()) for row in rows}
    if total := sum(counts.values()):
        share, first = total / sum(map(len, rows)), next(name for name, count in counts.items() if count)
        seen = f"{total} tokens ({share:.1%}) are {tokenizer.unk_token}, which stands for anything ({first})"
        yield TokenizationIssue("unknown tokens", seen, "Take another checkpoint, or leave those texts out")


def _ends(rows: Sequence[Tokenized], tokenizer: Any, stops: set[int]) -> Iterator[TokenizationIssue]:
    """Of the learnt stretches, those that do not end with a token that stops generation."""
    last: Counter[int] = Counter()
    for row in rows:
        if not row.loss_mask.all():
            last.update(row.input_ids[row.loss_mask & ~np.append(row.loss_mask[1:], False)].tolist())
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
    yield TokenizationIssue("EOS is not learnt", seen, advice)
