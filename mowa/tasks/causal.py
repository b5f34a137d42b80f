"""The next token: rows of token ids as batches, packed end to end or padded, and the loss over those that are learnt.

What a row says, and why some of it is not learnt, is not known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mowa.types import IGNORE_INDEX

PAD_MULTIPLE = 64  # rows are padded to multiples of this, so that a processor meets few shapes


class TokenizedExample(Protocol):
    """One example. ids int [n]; learnt bool [n]: whether the token is to be said after those before it."""

    @property
    def input_ids(self) -> Any: ...

    @property
    def loss_mask(self) -> Any: ...

    def __len__(self) -> int: ...


def pack(examples: Sequence[TokenizedExample]) -> dict[str, Tensor]:
    """Rows end to end: input_ids, labels, position_ids, int64 [1, T], T the sum of their lengths.

    Positions begin anew with each row. The first token of a row is nobody's to say, so its label is IGNORED.
    """
    ids = np.concatenate([row.input_ids for row in examples])
    return {
        "input_ids": _whole(ids),
        "labels": _whole(np.concatenate([_labels(row) for row in examples])),
        "position_ids": _whole(np.concatenate([np.arange(len(row)) for row in examples])),
    }


def pad(
    examples: Sequence[TokenizedExample], pad_token_id: int, *, pad_to_multiple_of: int = PAD_MULTIPLE
) -> dict[str, Tensor]:
    """Rows side by side: input_ids, labels, attention_mask, int64 [B, N], N the longest, in multiples of `grid`."""
    longest = -(-max(map(len, examples)) // pad_to_multiple_of) * pad_to_multiple_of
    shape = (len(examples), longest)
    ids, labels, mask = np.full(shape, pad_token_id), np.full(shape, IGNORE_INDEX), np.zeros(shape, np.int64)
    for place, row in enumerate(examples):
        ids[place, : len(row)], labels[place, : len(row)], mask[place, : len(row)] = row.input_ids, _labels(row), 1
    named = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return {name: torch.from_numpy(values.astype(np.int64)) for name, values in named.items()}


def _labels(row: TokenizedExample) -> np.ndarray:
    labels = np.where(row.loss_mask, row.input_ids, IGNORE_INDEX)
    labels[:1] = IGNORE_INDEX
    return labels


def _whole(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))[None]


def count_trained_tokens(examples: Iterable[TokenizedExample]) -> int:
    """How many tokens are learnt: those with a label after the first of their row."""
    return sum(int(np.asarray(row.loss_mask)[1:].sum()) for row in examples)


@torch.inference_mode()
def evaluate(net: Any, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
    """Over every learnt token of the batches: `loss` (mean −log p, nats), `accuracy` (it was the likeliest), `tokens`.

    The stock forward is asked for logits, so this says what anybody's inference would see.
    """
    device = next(net.parameters()).device
    lost, right, count = 0.0, 0, 0
    for batch in batches:
        inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
        targets = batch["labels"][:, 1:].to(device)
        known = targets != IGNORE_INDEX
        logits = net(**inputs, use_cache=False).logits[:, :-1][known].float()
        lost += float(torch.nn.functional.cross_entropy(logits, targets[known], reduction="sum"))
        right += int((logits.argmax(-1) == targets[known]).sum())
        count += int(known.sum())
    return {"loss": lost / max(1, count), "accuracy": right / max(1, count), "tokens": count}
