"""A smaller net that says what a larger one says: fewer blocks, begun from some of the larger one's, and held to it.

    loss = letters · CTC + emissions · τ² KL(teacher ‖ student) + hidden · mean over pairs of blocks of d(h, h′)
    d(a, b) = mean over frames of |a − b|² / (variance of b),   b the teacher's features after the paired block

KL is over frames and at temperature τ (Hinton et al. 2015, arXiv:1503.02531); blocks as DistilHuBERT and
DistilBERT take them, evenly (arXiv:2110.01900, arXiv:1910.01108). No transcript is needed for the last two terms.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mowa.errors import RecipeError
from mowa.families.patch import positions_by_table
from mowa.nouns import Model
from mowa.tasks import packing


def chosen(teacher: int, student: int) -> tuple[int, ...]:
    """Which of the teacher's blocks the student's begin from: evenly, the first and the last among them."""
    if not 1 <= student <= teacher:
        raise RecipeError(f"distil: layers is {student}; the teacher has {teacher} blocks")
    if student == 1:
        return (teacher - 1,)
    return tuple(round(index * (teacher - 1) / (student - 1)) for index in range(student))


def student(teacher: Model, layers: int) -> Model:
    """A net of `layers` blocks that begins as those blocks of the teacher, with its front end and its head."""
    kept = chosen(teacher.net.config.num_hidden_layers, layers)
    blocks = teacher.net.base_model.encoder.layers
    spare, teacher.net.base_model.encoder.layers = blocks, nn.ModuleList()
    try:
        net = copy.deepcopy(teacher.net)
    finally:
        teacher.net.base_model.encoder.layers = spare
    shared = {id(teacher.net.config): net.config}  # blocks look things up in it, and it is one for the whole net
    net.base_model.encoder.layers = nn.ModuleList(copy.deepcopy(blocks[index], shared) for index in kept)
    net.config.num_hidden_layers = layers
    return replace(teacher, net=net)


def apart(ours: Tensor, theirs: Tensor, counts: Sequence[int], temperature: float) -> Tensor:
    """τ² KL(teacher ‖ student) a frame, in nats: logits [U, T, V] of both, true frames of each recording → []."""
    true = torch.arange(ours.shape[1], device=ours.device) < torch.tensor(counts, device=ours.device)[:, None]
    said = (ours[true].float() / temperature).log_softmax(-1)
    taught = (theirs[true].float() / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(said, taught, log_target=True, reduction="batchmean")


def unlike(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """d of the loss: the mean over pairs of features [F, width] → []; 1 is as far as the teacher's frames differ."""
    distances = [
        (a.float() - b.float()).square().mean() / b.float().var(0, unbiased=False).mean().clamp(min=1e-8)
        for a, b in zip(ours, theirs, strict=True)
    ]
    return torch.stack(distances).mean()


class Lessons:
    """A teacher that listens to the student's batches. It is given up to that, and no part of the checkpoints."""

    def __init__(self, teacher: Any, layers: int, *, emissions: float, hidden: float, temperature: float) -> None:
        self.net = teacher.eval().requires_grad_(False)
        self.net.set_attn_implementation(packing.NAME)
        positions_by_table(self.net, training=True)
        self.after = chosen(teacher.config.num_hidden_layers, layers)
        self.emissions, self.hidden, self.temperature = emissions, hidden, temperature

    def loss(
        self, values: Tensor, lengths: Sequence[int], logits: Tensor, features: Sequence[Tensor], counts: Sequence[int]
    ) -> Tensor:
        """The last two terms, over one packed batch [1, N] that the student has heard (with its masks)."""
        self.net.to(values.device)
        with torch.no_grad():
            theirs, taught = packing.emit(self.net, values, lengths, after=self.after)
        return self.emissions * apart(logits, theirs, counts, self.temperature) + self.hidden * unlike(features, taught)
