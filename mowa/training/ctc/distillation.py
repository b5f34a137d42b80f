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
from mowa.models.ctc_encoder import packing
from mowa.models.ctc_encoder.positions import precompute_absolute_positions
from mowa.types import Model


def select_layers(teacher_layers: int, student_layers: int) -> tuple[int, ...]:
    """Which of the teacher's blocks the student's begin from: evenly, the first and the last among them."""
    if not 1 <= student_layers <= teacher_layers:
        raise RecipeError(f"distil: layers is {student_layers}; the teacher has {teacher_layers} blocks")
    if student_layers == 1:
        return (teacher_layers - 1,)
    return tuple(round(index * (teacher_layers - 1) / (student_layers - 1)) for index in range(student_layers))


def init_student(teacher: Model, student_layers: int) -> Model:
    """A net of `layers` blocks that begins as those blocks of the teacher, with its front end and its head."""
    kept = select_layers(teacher.net.config.num_hidden_layers, student_layers)
    blocks = teacher.net.base_model.encoder.layers
    spare, teacher.net.base_model.encoder.layers = blocks, nn.ModuleList()
    try:
        net = copy.deepcopy(teacher.net)
    finally:
        teacher.net.base_model.encoder.layers = spare
    shared = {id(teacher.net.config): net.config}  # blocks look things up in it, and it is one for the whole net
    net.base_model.encoder.layers = nn.ModuleList(copy.deepcopy(blocks[index], shared) for index in kept)
    net.config.num_hidden_layers = student_layers
    return replace(teacher, net=net)


def kl_loss(student_logits: Tensor, teacher_logits: Tensor, num_frames: Sequence[int], temperature: float) -> Tensor:
    """τ² KL(teacher ‖ student) a frame, in nats: logits [U, T, V] of both, true frames of each recording → []."""
    true = (
        torch.arange(student_logits.shape[1], device=student_logits.device)
        < torch.tensor(num_frames, device=student_logits.device)[:, None]
    )
    said = (student_logits[true].float() / temperature).log_softmax(-1)
    taught = (teacher_logits[true].float() / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(said, taught, log_target=True, reduction="batchmean")


def hidden_state_loss(student_states: Sequence[Tensor], teacher_states: Sequence[Tensor]) -> Tensor:
    """d of the loss: the mean over pairs of features [F, width] → []; 1 is as far as the teacher's frames differ."""
    distances = [
        (a.float() - b.float()).square().mean() / b.float().var(0, unbiased=False).mean().clamp(min=1e-8)
        for a, b in zip(student_states, teacher_states, strict=True)
    ]
    return torch.stack(distances).mean()


class DistillationLoss:
    """A teacher that listens to the student's batches. It is given up to that, and no part of the checkpoints."""

    def __init__(
        self, teacher: Any, student_layers: int, *, logit_weight: float, hidden_weight: float, temperature: float
    ) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.teacher.set_attn_implementation(packing.ATTN_IMPLEMENTATION)
        precompute_absolute_positions(self.teacher, frozen=True)
        self.teacher_layers = select_layers(teacher.config.num_hidden_layers, student_layers)
        self.logit_weight, self.hidden_weight, self.temperature = logit_weight, hidden_weight, temperature

    def compute(
        self,
        input_values: Tensor,
        lengths: Sequence[int],
        logits: Tensor,
        hidden_states: Sequence[Tensor],
        num_frames: Sequence[int],
    ) -> Tensor:
        """The last two terms, over one packed batch [1, N] that the student has heard (with its masks)."""
        self.teacher.to(input_values.device)
        with torch.no_grad():
            theirs, taught = packing.forward_packed(
                self.teacher, input_values, lengths, hidden_layers=self.teacher_layers
            )
        return self.logit_weight * kl_loss(
            logits, theirs, num_frames, self.temperature
        ) + self.hidden_weight * hidden_state_loss(hidden_states, taught)
