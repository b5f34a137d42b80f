"""Check tokenized samples for mistakes in training data, such as missing EOS tokens or a wrong vocabulary size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

_MAX_PADDING = 0.05  # embedding tables are rounded up by at most this ratio, or by 1000 rows


class Tokenized(Protocol):
    """A tokenized sample: input_ids int32 [n], loss_mask bool [n]."""

    @property
    def id(self) -> str: ...

    @property
    def input_ids(self) -> np.ndarray: ...

    @property
    def loss_mask(self) -> np.ndarray: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class TokenizationIssue:
    """A likely mistake with its numbers and advice. After a fatal one the data cannot be trained on."""

    name: str
    detail: str
    advice: str
    fatal: bool = False

    def __str__(self) -> str:
        return f"{'error' if self.fatal else 'warning'}: {self.name}: {self.detail}. {self.advice}"


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
    """Return all issues of tokenized samples.

    eos_token_ids  tokens that end the model's answers
    vocab_size     rows of the model's embeddings
    document_ids   ids of the samples that are plain texts
    truncated_ids  ids of the samples that were cut at the maximum length
    documents_with_specials, conversations_with_specials  how many spell special tokens that were tokenized as such
    num_dropped    number of samples that were read, if none is left; else 0
    """
    if num_dropped:
        detail = f"no trained tokens in any of {num_dropped} samples"
        advice = "See why each was dropped; check data.train_on, data.max_length and the chat template"
        return [TokenizationIssue("all labels masked", detail, advice, fatal=True)]
    conversations = [sample for sample in samples if sample.id not in document_ids]
    issues = [
        *_check_vocabulary(samples, tokenizer, vocab_size),
        *_check_bos(samples, tokenizer),
        *_check_unknown(samples, tokenizer),
        *_check_eos([one for one in conversations if one.id not in truncated_ids], tokenizer, eos_token_ids),
    ]
    if conversations and tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        detail = f"the tokenizer pads with its EOS token ({tokenizer.eos_token})"
        advice = "mowa masks padding by position, so EOS is trained; other trainers may not"
        issues.append(TokenizationIssue("pad is EOS", detail, advice))
    if documents_with_specials:
        detail = f"{documents_with_specials} texts spell special tokens, which are tokenized as such"
        issues.append(
            TokenizationIssue("special tokens in texts", detail, "If they are conversations, store them as messages")
        )
    if conversations_with_specials:
        detail = (
            f"{conversations_with_specials} conversations spell special tokens in a message, and this tokenizer "
            "cannot tokenize them as text"
        )
        issues.append(TokenizationIssue("special tokens in turns", detail, "Remove them from the messages"))
    return issues


def _check_vocabulary(
    samples: Sequence[Tokenized], tokenizer: Any, vocab_size: int | None
) -> Iterator[TokenizationIssue]:
    if vocab_size is None:
        return
    highest = max((int(sample.input_ids.max()) for sample in samples), default=0)
    advice = "The tokenizer is of another model or has added tokens: load the model's own, or resize the embeddings"
    if highest >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(highest)
        detail = f"token {highest} ({token}) is outside the model's {vocab_size} embeddings"
        yield TokenizationIssue("vocabulary", detail, advice, fatal=True)
    elif len(tokenizer) > vocab_size or vocab_size - len(tokenizer) > max(1_000, _MAX_PADDING * vocab_size):
        detail = f"the tokenizer has {len(tokenizer)} tokens, the model {vocab_size} embeddings"
        yield TokenizationIssue("vocabulary", detail, advice)


def _check_bos(samples: Sequence[Tokenized], tokenizer: Any) -> Iterator[TokenizationIssue]:
    bos = tokenizer.bos_token_id
    doubled = [one.id for one in samples if bos is not None and len(one) > 1 and (one.input_ids[:2] == bos).all()]
    if doubled:
        detail = f"{len(doubled)} samples begin with BOS twice ({doubled[0]})"
        advice = "Correct the chat template, which is the only source of BOS"
        yield TokenizationIssue("double BOS", detail, advice, fatal=True)


def _check_unknown(samples: Sequence[Tokenized], tokenizer: Any) -> Iterator[TokenizationIssue]:
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown == tokenizer.eos_token_id:
        return
    counts = {sample.id: int((sample.input_ids == unknown).sum()) for sample in samples}
    if total := sum(counts.values()):
        ratio, first = total / sum(map(len, samples)), next(name for name, count in counts.items() if count)
        detail = f"{total} tokens ({ratio:.1%}) are {tokenizer.unk_token} (first in {first})"
        yield TokenizationIssue("unknown tokens", detail, "Use another checkpoint, or remove those texts")


def _check_eos(samples: Sequence[Tokenized], tokenizer: Any, eos_token_ids: set[int]) -> Iterator[TokenizationIssue]:
    """Find trained spans whose last token does not stop generation."""
    last: Counter[int] = Counter()
    for sample in samples:
        mask = sample.loss_mask
        if not mask.all():
            last.update(sample.input_ids[mask & ~np.append(mask[1:], False)].tolist())
    others = Counter({token: count for token, count in last.items() if token not in eos_token_ids})
    if not others:
        return
    token_id, _ = others.most_common(1)[0]
    token = tokenizer.convert_ids_to_tokens(token_id)
    detail = f"{others.total()} of {last.total()} answers end with {token!r}, which does not stop generation"
    if token_id in tokenizer.all_special_ids or token_id in tokenizer.added_tokens_decoder:
        advice = f"Add {token_id} to eos_token_id in generation_config.json, or generation will not stop"
    else:
        advice = (
            "The model will not learn to stop: use a template that ends answers with EOS (data.chat_template: plain)"
        )
    yield TokenizationIssue("EOS is not trained", detail, advice)
