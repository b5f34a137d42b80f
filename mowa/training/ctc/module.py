"""What the Trainer trains in a fine-tuning run: a CTC net over batches of `packs`, its loss, and how it is scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mowa.decode import ctc as decoder
from mowa.models.ctc_encoder import packing
from mowa.tasks import ctc, metrics
from mowa.training.ctc.distillation import DistillationLoss
from mowa.types import IGNORE_INDEX, Vocabulary

PAD_FRAME = -1  # the id of a frame that is padding


class CTCModule(nn.Module):
    """The net, fed packed or padded batches. Its checkpoints hold what learns and nothing else.

    attend: padded, the net is told where padding is. lessons: a teacher is listened to while it trains.
    """

    def __init__(
        self, net: Any, *, packing: bool, use_attention_mask: bool, distillation: DistillationLoss | None = None
    ) -> None:
        super().__init__()
        self.net, self.packing, self.use_attention_mask, self.distillation = (
            net,
            packing,
            use_attention_mask,
            distillation,
        )
        self.register_state_dict_post_hook(_without_frozen)
        self.register_load_state_dict_post_hook(_ignore_missing_frozen)

    def forward(
        self,
        input_values: Tensor,
        lengths: Tensor,
        batch_index: Tensor,
        mask_time_indices: Tensor | None = None,
        mask_feature_indices: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """→ logits [U, T, V], counts [U] of true frames, index [1] of the batch, and lesson [] if there are lessons."""
        samples, masks = lengths.tolist(), {"hidden": mask_time_indices, "silenced": mask_feature_indices}
        how = packing.frame_geometry(self.net.config)
        frames = [how.num_frames(length) for length in samples]
        lessons = self.distillation if self.training else None
        if self.packing:
            after = range(self.net.config.num_hidden_layers) if lessons else ()
            logits, features = packing.forward_packed(self.net, input_values, samples, hidden_layers=after, **masks)
        else:
            logits = packing.forward_padded(
                self.net, input_values, samples, use_attention_mask=self.use_attention_mask, **masks
            )
        out = {"logits": logits, "counts": torch.tensor(frames, device=logits.device), "index": batch_index}
        if lessons:
            out["lesson"] = lessons.compute(input_values, samples, logits, features, frames)
        return out


def _without_frozen(pupil: CTCModule, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A frozen weight is the base's own: it need not be written with every checkpoint."""
    for name, parameter in pupil.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(prefix + name, None)


def _ignore_missing_frozen(pupil: CTCModule, keys: Any) -> None:
    frozen = {name for name, weight in pupil.named_parameters(remove_duplicate=False) if not weight.requires_grad}
    keys.missing_keys[:] = [key for key in keys.missing_keys if key not in frozen]


def build_compute_loss(
    blank: int, on_batch: Callable[..., None] | None = None, *, ctc_weight: float = 1.0, batches_per_step: int = 1
) -> Callable[..., Tensor]:
    """For the Trainer's `compute_loss_func`: the CTC loss a letter, over all letters of a step, however it was cut up.

    `seen(losses [U], ids [F] of true frames, index)` hears of every batch in training before it is learnt from. With
    lessons, CTC has its `weight`, and a lesson counts for one of the `parts` that a step is made of.
    """

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits, counts = outputs["logits"].float(), outputs["counts"]
        written = (labels != IGNORE_INDEX).any(1)  # what has no text is there for the lesson
        each = torch.where(written, ctc.ctc_losses(logits, counts, labels, blank), 0.0)
        if on_batch is not None and torch.is_grad_enabled():
            true = torch.arange(logits.shape[1], device=logits.device) < counts[:, None]
            on_batch(each.detach(), logits.detach().argmax(-1)[true], int(outputs["index"]))
        letters = (labels != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
        total = ctc_weight * each.sum() / (letters + (letters == 0))
        return total + outputs["lesson"] / batches_per_step if "lesson" in outputs else total

    return loss


def argmax_frames(outputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """For `preprocess_logits_for_metrics`: the likeliest id of every frame [U, T], NONE where there is none."""
    logits, counts, *_ = outputs
    true = torch.arange(logits.shape[1], device=logits.device) < counts[:, None]
    return torch.where(true, logits.argmax(-1), PAD_FRAME)


def decode_frames(frame_ids: np.ndarray, vocabulary: Vocabulary) -> list[str]:
    """Frame ids [U, T] (negative: padding) → what they say."""
    said = []
    for row in frame_ids:
        path = row[row >= 0].astype(np.int32)
        said.append(
            decoder.join_words(
                decoder.path_to_words(decoder.TokenPath(path, np.ones(len(path), np.float32)), vocabulary)
            )
        )
    return said


def decode_labels(labels: Sequence[Sequence[int]] | np.ndarray, vocabulary: Vocabulary) -> list[str]:
    """Label ids (negative: padding) → texts."""
    delimiter = vocabulary.delimiter
    return ["".join(" " if i == delimiter else vocabulary.tokens[i] for i in row if i >= 0) for row in labels]


def compute_metrics(
    references: Sequence[str], hypotheses: Sequence[str], frame_ids: np.ndarray, blank: int
) -> dict[str, float]:
    """WER and CER of the greedy path, and the share of blank frames in `ids` (negative: padding)."""
    frames = int((frame_ids >= 0).sum())
    return metrics.error_rates(references, hypotheses) | {"blank": int((frame_ids == blank).sum()) / max(1, frames)}
