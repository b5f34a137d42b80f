"""Check before a run that samples have the same loss in a batch as alone.

One batch has short samples, another the longest ones, among them some on both sides of the length above which the
net's positions depend on the length (`models.causal.document_rope`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mowa.data.chat.encode import TokenizedSample
from mowa.errors import TrainingStopped
from mowa.models.causal.document_rope import original_length
from mowa.models.tolerances import PACKED_LOSS_FLOAT32, PACKED_LOSS_HALF
from mowa.tasks import causal
from mowa.tasks.causal import SampleLosses
from mowa.training.causal.setup import CausalRun, collate


def select_batches(run: CausalRun) -> list[list[TokenizedSample]]:
    """Return the samples of the batches to check; none is larger than a batch of the run."""
    samples = sorted(run.splits.train, key=len)
    short = samples[: max(4, len(samples) // 4)][-4:]
    original = original_length(run.model.net) or 0
    above = [sample for sample in samples if len(sample) > original]
    below = samples[: len(samples) - len(above)]
    wanted = [*(above[:1] if original else ()), *below[-1:], *samples[-1:], *samples[:1]]
    long: list[TokenizedSample] = []
    for sample in wanted:
        if all(sample is not one for one in long) and sum(map(len, long)) + len(sample) <= run.recipe.batch.tokens:
            long.append(sample)
    return [short, long]


def evaluate_alone(net: Any, samples: Sequence[TokenizedSample]) -> SampleLosses:
    """Return the losses of `samples` by the stock net, one at a time."""
    training = net.training
    net.eval()
    losses = causal.sample_losses(net, (causal.pad([sample], 0, pad_to_multiple_of=1) for sample in samples))
    net.train(training)
    return losses


def verify_losses(run: CausalRun, samples: Sequence[TokenizedSample], alone: SampleLosses) -> None:
    """Compare the loss of `samples`, batched as in the run, with that of each alone.

    Samples longer than the original length of the positions are compared separately from the others.

    Raises:
        TrainingStopped: the losses differ.
    """
    net = run.model.net
    batch = collate(run, samples, run.recipe.batch.packing)
    training = net.training
    net.eval()  # the net may have dropout
    with torch.no_grad():
        out = net(**{name: value.to(net.device) for name, value in batch.items()}, fused_lm_head=True)
    net.train(training)
    log_probs = out.log_probs.double().cpu()
    start, together = 0, []
    for row, sample in enumerate(samples):
        packed = log_probs[0, start : start + len(sample) - 1]
        together.append(-float((packed if run.recipe.batch.packing else log_probs[row, : len(sample) - 1]).sum()))
        start += len(sample)
    exact = {one.dtype for one in net.parameters() if one.is_floating_point()} == {torch.float32}
    tolerance = PACKED_LOSS_FLOAT32 if exact else PACKED_LOSS_HALF
    original = original_length(net) or 0
    for part in (False, True):
        chosen = [index for index, sample in enumerate(samples) if (len(sample) > original) is part]
        tokens = max(1.0, alone.tokens[chosen].sum())
        loss, expected = sum(together[index] for index in chosen) / tokens, alone.nll[chosen].sum() / tokens
        if abs(loss - expected) > tolerance * max(1.0, expected):
            lengths = ", ".join(f"{len(sample):,}" for sample in samples)
            raise TrainingStopped(
                f"the loss computed packed and unpacked differs: {loss:.5f} and {expected:.5f} nats per token, in a "
                f"batch of samples of {lengths} tokens.\n  Try memory.accelerate: false and batch.packing: false, and "
                "report this with the name of the model"
            )
