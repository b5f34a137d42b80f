"""Next-token prediction: collate token ids to packed or padded batches, and evaluate the loss over trained tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mowa.models.causal import token_logits
from mowa.types import IGNORE_INDEX, CausalModel

PAD_MULTIPLE = 64  # batches are padded to multiples of this, so that a CPU sees few shapes


class TokenizedExample(Protocol):
    """One sample. input_ids int [n]; loss_mask bool [n]: whether the token is predicted from those before it."""

    @property
    def input_ids(self) -> Any: ...

    @property
    def loss_mask(self) -> Any: ...

    def __len__(self) -> int: ...


def pack(examples: Sequence[TokenizedExample]) -> dict[str, Tensor]:
    """Concatenate samples to input_ids, labels, position_ids, int64 [1, T], T the sum of their lengths.

    Positions restart with each sample. The first token of a sample has no prediction, so its label is IGNORE_INDEX.
    """
    ids = np.concatenate([example.input_ids for example in examples])
    return {
        "input_ids": _batch_of_one(ids),
        "labels": _batch_of_one(np.concatenate([_labels(example) for example in examples])),
        "position_ids": _batch_of_one(np.concatenate([np.arange(len(example)) for example in examples])),
    }


def pad(
    examples: Sequence[TokenizedExample], pad_token_id: int, *, pad_to_multiple_of: int = PAD_MULTIPLE
) -> dict[str, Tensor]:
    """Pad samples to input_ids, labels, attention_mask, int64 [B, N], N a multiple of `pad_to_multiple_of`."""
    longest = -(-max(map(len, examples)) // pad_to_multiple_of) * pad_to_multiple_of
    shape = (len(examples), longest)
    ids, labels, mask = np.full(shape, pad_token_id), np.full(shape, IGNORE_INDEX), np.zeros(shape, np.int64)
    for row, example in enumerate(examples):
        length = len(example)
        ids[row, :length], labels[row, :length], mask[row, :length] = example.input_ids, _labels(example), 1
    arrays = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return {name: torch.from_numpy(values.astype(np.int64)) for name, values in arrays.items()}


def _labels(example: TokenizedExample) -> np.ndarray:
    labels = np.where(example.loss_mask, example.input_ids, IGNORE_INDEX)
    labels[:1] = IGNORE_INDEX
    return labels


def _batch_of_one(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))[None]


def count_trained_tokens(examples: Iterable[TokenizedExample]) -> int:
    """Return the number of tokens in the loss: those with a label after the first token of their sample."""
    return sum(int(np.asarray(example.loss_mask)[1:].sum()) for example in examples)


@dataclass(frozen=True, slots=True)
class SampleLosses:
    """Sums over the trained tokens of each sample, [N] each: −log p (nats), correct top tokens, tokens."""

    nll: np.ndarray
    correct: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """Some trained tokens of a batch: row of each int64 [n], logits float32 [n, V] that predict it, label int64 [n]."""

    rows: Tensor
    logits: Tensor
    labels: Tensor

    def losses(self) -> Tensor:
        """Return row, −log p (nats) and whether the top token is correct, float64 [3, n]."""
        nll = torch.nn.functional.cross_entropy(self.logits, self.labels, reduction="none")
        return torch.stack([part.double() for part in (self.rows, nll, self.logits.argmax(-1) == self.labels)])


def score_tokens(net: Any, batch: dict[str, Tensor]) -> Iterator[ScoredTokens]:
    """Yield the trained tokens of a batch (see `pad` and `pack`), in chunks, by the net's own forward pass."""
    device = next(net.parameters()).device
    targets = batch["labels"][:, 1:]
    kept = targets != IGNORE_INDEX
    chosen = torch.nn.functional.pad(kept, (0, 1))
    rows, labels = kept.nonzero()[:, 0].to(device), targets[kept].to(device)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    start = 0
    for logits in token_logits.iter_token_logits(net, inputs, chosen):
        part = slice(start, start + len(logits))
        start = part.stop
        yield ScoredTokens(rows[part], logits.float(), labels[part])


def sum_losses(losses: Iterable[Tensor], num_rows: int) -> SampleLosses:
    """Return the sums of each of `num_rows` rows over `ScoredTokens.losses`, float64 [3, n] each."""
    rows, nll, correct = torch.cat([torch.zeros(3, 0), *(one.cpu() for one in losses)], dim=1).numpy()
    index = rows.astype(np.int64)
    sums = (np.bincount(index, weights, minlength=num_rows) for weights in (nll, correct, np.ones_like(nll)))
    return SampleLosses(*sums)


def concat_losses(parts: Sequence[SampleLosses]) -> SampleLosses:
    """Return the samples of several batches as one."""
    columns = ([one.nll for one in parts], [one.correct for one in parts], [one.tokens for one in parts])
    return SampleLosses(*(np.concatenate([np.zeros(0), *column]) for column in columns))


def sample_losses(net: Any, batches: Iterable[dict[str, Tensor]]) -> SampleLosses:
    """Evaluate `net` on every row of `batches` (see `pad`), in their order, by its own forward pass.

    The logits of a few tokens are in memory at a time.
    """
    return concat_losses(
        [sum_losses([one.losses() for one in score_tokens(net, batch)], len(batch["labels"])) for batch in batches]
    )


def evaluate(net: Any, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
    """Return loss (mean −log p, nats), accuracy (of the top token) and tokens (their number) over all of `batches`."""
    found = sample_losses(net, batches)
    count = int(found.tokens.sum())
    return {"loss": found.nll.sum() / max(1, count), "accuracy": found.correct.sum() / max(1, count), "tokens": count}


def context_length(config: Any) -> int | None:
    """Return how many tokens a net takes by its transformers config; None if it does not say."""
    length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length


def eos_token_ids(model: CausalModel) -> tuple[int, ...]:
    """Return the tokens that end an answer, by the generation config and the tokenizer."""
    configured = getattr(model.net.generation_config, "eos_token_id", None)
    several = list(configured) if isinstance(configured, list | tuple) else [configured]
    return tuple({one for one in (*several, model.tokenizer.eos_token_id) if one is not None})


def pad_token_id(tokenizer: Any) -> int:
    """Return a token id for padding; any would do, since padding is masked."""
    found = tokenizer.pad_token_id
    return int(found if found is not None else tokenizer.eos_token_id or 0)
