"""Next-token prediction: collate token ids to packed or padded batches, and evaluate the loss over trained tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

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


@torch.inference_mode()
def sample_losses(net: Any, batches: Iterable[dict[str, Tensor]]) -> SampleLosses:
    """Evaluate `net` on every sample of `batches` (see `pad`), in their order, by its stock forward pass."""
    return sum_losses(scored for batch in batches for scored in trained_logits(net, batch))


@torch.inference_mode()
def trained_logits(net: Any, batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return, for each sample of a batch (see `pad`), logits float32 [n, V] and labels int64 [n] of trained tokens."""
    device = next(net.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    targets = batch["labels"][:, 1:].to(device)
    logits = net(**inputs, use_cache=False).logits[:, :-1]
    kept = targets != IGNORE_INDEX
    return [(row[mask].float(), labels[mask]) for row, labels, mask in zip(logits, targets, kept, strict=True)]


def sum_losses(scored: Iterable[tuple[Tensor, Tensor]]) -> SampleLosses:
    """Return the sums over logits and labels of each sample, as `trained_logits` returns them."""
    sums: list[Tensor] = []
    for logits, labels in scored:
        nll = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        correct = (logits.argmax(-1) == labels).sum()
        sums.append(torch.tensor([float(nll), int(correct), len(labels)], dtype=torch.float64))
    columns = torch.stack(sums).numpy().T if sums else np.zeros((3, 0))
    return SampleLosses(*columns)


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
