"""Knowledge distillation: train a student, initialized from some of the teacher's layers, to match it.

    loss = ctc_weight · CTC + logit_weight · τ² KL(teacher ‖ student) + hidden_weight · mean over layers of d(h, h′)
    d(a, b) = mean over frames of |a − b|² / (variance of b),   b the teacher's hidden states after the paired layer

KL is per frame at temperature τ; no transcript is needed for the last two terms.

Sources: Hinton et al. 2015 (arXiv:1503.02531); evenly selected layers as in DistilBERT (arXiv:1910.01108) and
DistilHuBERT (arXiv:2110.01900).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mowa.errors import RecipeError
from mowa.models.ctc_encoder import packing
from mowa.models.ctc_encoder.anatomy import copy_with_blocks
from mowa.models.ctc_encoder.positions import precompute_absolute_positions
from mowa.types import CTCModel


def select_layers(teacher_layers: int, student_layers: int) -> tuple[int, ...]:
    """Return the teacher layers that initialize the student: evenly spaced, with the first and the last.

    Raises:
        RecipeError: the student has no layers, or more than the teacher.
    """
    if not 1 <= student_layers <= teacher_layers:
        raise RecipeError(
            f"distillation: student_layers is {student_layers}; it must be between 1 and the teacher's {teacher_layers}"
        )
    if student_layers == 1:
        return (teacher_layers - 1,)
    return tuple(round(index * (teacher_layers - 1) / (student_layers - 1)) for index in range(student_layers))


def init_student(teacher: CTCModel, student_layers: int) -> CTCModel:
    """Return a copy of `teacher` with `student_layers` of its layers, and its front end and head."""
    kept = select_layers(teacher.net.config.num_hidden_layers, student_layers)
    return replace(teacher, net=copy_with_blocks(teacher.net, kept))


def kl_loss(student_logits: Tensor, teacher_logits: Tensor, num_frames: Sequence[int], temperature: float) -> Tensor:
    """Return τ² KL(teacher ‖ student) per frame, in nats.

    Args:
        student_logits: [U, T, V].
        teacher_logits: [U, T, V].
        num_frames: frames of each recording without padding.
        temperature: τ.

    Returns:
        float32 [].
    """
    counts = torch.tensor(num_frames, device=student_logits.device)
    valid = torch.arange(student_logits.shape[1], device=student_logits.device) < counts[:, None]
    student = (student_logits[valid].float() / temperature).log_softmax(-1)
    teacher = (teacher_logits[valid].float() / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def hidden_state_loss(student_states: Sequence[Tensor], teacher_states: Sequence[Tensor]) -> Tensor:
    """Return the mean of d over pairs of hidden states [F, hidden_size], float32 []; 1 is the teacher's variance."""
    distances = [
        (a.float() - b.float()).square().mean() / b.float().var(0, unbiased=False).mean().clamp(min=1e-8)
        for a, b in zip(student_states, teacher_states, strict=True)
    ]
    return torch.stack(distances).mean()


class DistillationLoss:
    """Run a frozen teacher on the student's batches and compare. The teacher is not a submodule, so it is not saved."""

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
        """Return the last two terms of the loss, float32 [], over one packed batch [1, N] of U recordings.

        Args:
            input_values: the batch.
            lengths: samples of each recording.
            logits: the student's, [U, T, V].
            hidden_states: the student's after each of its layers, [F, hidden_size].
            num_frames: frames of each recording.
        """
        self.teacher.to(input_values.device)
        with torch.no_grad():
            teacher_logits, teacher_states = packing.forward_packed(
                self.teacher, input_values, lengths, hidden_layers=self.teacher_layers
            )
        kl = kl_loss(logits, teacher_logits, num_frames, self.temperature)
        return self.logit_weight * kl + self.hidden_weight * hidden_state_loss(hidden_states, teacher_states)
