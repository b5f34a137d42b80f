"""What the Trainer trains in a fine-tuning run: a CTC net over batches of `packs`, its loss, and how it is scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mowa.decode import ctc as decoder
from mowa.nouns import IGNORED, Vocabulary
from mowa.tasks import ctc, packing
from mowa.train.distill import Lessons

NONE = -1  # the id of a frame that is padding


class Pupil(nn.Module):
    """The net, fed packed or padded batches. Its checkpoints hold what learns and nothing else.

    attend: padded, the net is told where padding is. lessons: a teacher is listened to while it trains.
    """

    def __init__(self, net: Any, *, layout: str, attend: bool, lessons: Lessons | None = None) -> None:
        super().__init__()
        self.net, self.layout, self.attend, self.lessons = net, layout, attend, lessons
        self.register_state_dict_post_hook(_without_frozen)
        self.register_load_state_dict_post_hook(_missing_none_that_is_frozen)

    def forward(
        self,
        input_values: Tensor,
        lengths: Tensor,
        index: Tensor,
        hidden: Tensor | None = None,
        silenced: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """→ logits [U, T, V], counts [U] of true frames, index [1] of the batch, and lesson [] if there are lessons."""
        samples, masks = lengths.tolist(), {"hidden": hidden, "silenced": silenced}
        how = packing.frames(self.net.config)
        frames = [how.count(length) for length in samples]
        lessons = self.lessons if self.training else None
        if self.layout == "packed":
            after = range(self.net.config.num_hidden_layers) if lessons else ()
            logits, features = packing.emit(self.net, input_values, samples, after=after, **masks)
        else:
            logits = packing.emit_padded(self.net, input_values, samples, attend=self.attend, **masks)
        out = {"logits": logits, "counts": torch.tensor(frames, device=logits.device), "index": index}
        if lessons:
            out["lesson"] = lessons.loss(input_values, samples, logits, features, frames)
        return out


def _without_frozen(pupil: Pupil, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A frozen weight is the base's own: it need not be written with every checkpoint."""
    for name, parameter in pupil.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(prefix + name, None)


def _missing_none_that_is_frozen(pupil: Pupil, keys: Any) -> None:
    frozen = {name for name, weight in pupil.named_parameters(remove_duplicate=False) if not weight.requires_grad}
    keys.missing_keys[:] = [key for key in keys.missing_keys if key not in frozen]


def loss_function(
    blank: int, seen: Callable[..., None] | None = None, *, weight: float = 1.0, parts: int = 1
) -> Callable[..., Tensor]:
    """For the Trainer's `compute_loss_func`: the CTC loss a letter, over all letters of a step, however it was cut up.

    `seen(losses [U], ids [F] of true frames, index)` hears of every batch in training before it is learnt from. With
    lessons, CTC has its `weight`, and a lesson counts for one of the `parts` that a step is made of.
    """

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits, counts = outputs["logits"].float(), outputs["counts"]
        written = (labels != IGNORED).any(1)  # what has no text is there for the lesson
        each = torch.where(written, ctc.losses(logits, counts, labels, blank), 0.0)
        if seen is not None and torch.is_grad_enabled():
            true = torch.arange(logits.shape[1], device=logits.device) < counts[:, None]
            seen(each.detach(), logits.detach().argmax(-1)[true], int(outputs["index"]))
        letters = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        total = weight * each.sum() / (letters + (letters == 0))
        return total + outputs["lesson"] / parts if "lesson" in outputs else total

    return loss


def best(outputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """For `preprocess_logits_for_metrics`: the likeliest id of every frame [U, T], NONE where there is none."""
    logits, counts, *_ = outputs
    true = torch.arange(logits.shape[1], device=logits.device) < counts[:, None]
    return torch.where(true, logits.argmax(-1), NONE)


def texts(ids: np.ndarray, vocabulary: Vocabulary) -> list[str]:
    """Frame ids [U, T] (negative: padding) → what they say."""
    said = []
    for row in ids:
        path = row[row >= 0].astype(np.int32)
        said.append(decoder.text(decoder.read(decoder.Path(path, np.ones(len(path), np.float32)), vocabulary)))
    return said


def spelt(labels: Sequence[Sequence[int]] | np.ndarray, vocabulary: Vocabulary) -> list[str]:
    """Label ids (negative: padding) → texts."""
    delimiter = vocabulary.delimiter
    return ["".join(" " if i == delimiter else vocabulary.tokens[i] for i in row if i >= 0) for row in labels]


def score(said: Sequence[str], heard: Sequence[str], ids: np.ndarray, blank: int) -> dict[str, float]:
    """WER and CER of the greedy path, and the share of blank frames in `ids` (negative: padding)."""
    frames = int((ids >= 0).sum())
    return ctc.error_rates(said, heard) | {"blank": int((ids == blank).sum()) / max(1, frames)}
