"""The module that the Trainer trains: a CTC net over batches of `batches`, its loss and its metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mowa.decode import ctc as decoder
from mowa.models.ctc_encoder import packing
from mowa.models.ctc_encoder.chunk_mask import apply_chunk_mask
from mowa.models.ctc_encoder.geometry import frame_geometry
from mowa.tasks import ctc, metrics
from mowa.training.ctc.distillation import DistillationLoss
from mowa.training.ctc.streaming import ChunkSchedule
from mowa.types import IGNORE_INDEX, Vocabulary

PAD_FRAME = -1  # frame id of padding


class CTCModule(nn.Module):
    """The net on packed or padded batches. Its state dict holds the trainable parameters only.

    Args:
        net: the CTC net.
        packing: whether batches are packed.
        use_attention_mask: whether the net gets an attention mask for padding.
        distillation: a teacher to match in training; needs packed batches.
        chunks: chunk lengths of batches that have `chunk_frames`; needs padded batches.
    """

    def __init__(
        self,
        net: Any,
        *,
        packing: bool,
        use_attention_mask: bool,
        distillation: DistillationLoss | None = None,
        chunks: ChunkSchedule | None = None,
    ) -> None:
        super().__init__()
        if packing and chunks is not None:
            raise ValueError("the chunk mask is not applied to packed batches")
        self.net, self.packing, self.use_attention_mask = net, packing, use_attention_mask
        self.distillation, self.chunks, self._chunk_mask = distillation, chunks, ExitStack()
        self.register_state_dict_post_hook(_drop_frozen)
        self.register_load_state_dict_post_hook(_ignore_missing_frozen)

    def forward(
        self,
        input_values: Tensor,
        lengths: Tensor,
        batch_index: Tensor,
        mask_time_indices: Tensor | None = None,
        mask_feature_indices: Tensor | None = None,
        chunk_frames: Tensor | None = None,
        lookahead_frames: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Encode a batch as `BatchDataset` collates it.

        Returns:
            logits [U, T, V], num_frames [U], batch_index [1]; with a teacher in training, distillation_loss [].
        """
        samples = lengths.tolist()
        masks = {"mask_time_indices": mask_time_indices, "mask_feature_indices": mask_feature_indices}
        geometry = frame_geometry(self.net.config)
        frames = [geometry.num_frames(length) for length in samples]
        teacher = self.distillation if self.training else None
        if self.packing:
            layers = range(self.net.config.num_hidden_layers) if teacher else ()
            logits, states = packing.forward_packed(self.net, input_values, samples, hidden_layers=layers, **masks)
        else:
            self._apply_chunks(chunk_frames, lookahead_frames)
            logits = packing.forward_padded(
                self.net, input_values, samples, use_attention_mask=self.use_attention_mask, **masks
            )
            if not self.training:
                self.remove_chunk_mask()
        out = {
            "logits": logits,
            "num_frames": torch.tensor(frames, device=logits.device),
            "batch_index": batch_index,
        }
        if teacher:
            out["distillation_loss"] = teacher.compute(input_values, samples, logits, states, frames)
        return out

    def _apply_chunks(self, chunk_frames: Tensor | None, lookahead_frames: Tensor | None) -> None:
        """Install the chunk mask of this batch.

        In training it stays until the next batch: gradient checkpointing runs blocks again in the backward pass.
        """
        self.remove_chunk_mask()
        if self.chunks is None or chunk_frames is None or lookahead_frames is None:
            return
        self._chunk_mask.enter_context(
            apply_chunk_mask(self.net, self.chunks.config(int(chunk_frames), int(lookahead_frames)))
        )

    def remove_chunk_mask(self) -> None:
        """Remove the chunk mask of the last batch from the net."""
        self._chunk_mask.close()


def _drop_frozen(module: CTCModule, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Leave frozen weights out of checkpoints; they are those of the base."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(prefix + name, None)


def _ignore_missing_frozen(module: CTCModule, keys: Any) -> None:
    frozen = {name for name, weight in module.named_parameters(remove_duplicate=False) if not weight.requires_grad}
    keys.missing_keys[:] = [key for key in keys.missing_keys if key not in frozen]


def build_compute_loss(
    blank: int, on_batch: Callable[..., None] | None = None, *, ctc_weight: float = 1.0, batches_per_step: int = 1
) -> Callable[..., Tensor]:
    """Return a `compute_loss_func` for the Trainer: CTC loss per token over all tokens of a step, in nats.

    Args:
        blank: id of the blank.
        on_batch: called in training, before the backward pass, with the losses [U], the predicted ids [F] of all frames
            without padding, and the index of the batch.
        ctc_weight: weight of the CTC loss; the distillation loss is added with weight 1 / batches_per_step.
        batches_per_step: batches in an optimizer step, over all devices.
    """

    def compute_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits, counts = outputs["logits"].float(), outputs["num_frames"]
        transcribed = (labels != IGNORE_INDEX).any(1)
        losses = torch.where(transcribed, ctc.ctc_losses(logits, counts, labels, blank), 0.0)
        if on_batch is not None and torch.is_grad_enabled():
            valid = torch.arange(logits.shape[1], device=logits.device) < counts[:, None]
            on_batch(losses.detach(), logits.detach().argmax(-1)[valid], int(outputs["batch_index"]))
        tokens = (labels != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
        total = ctc_weight * losses.sum() / (tokens + (tokens == 0))
        if "distillation_loss" in outputs:
            return total + outputs["distillation_loss"] / batches_per_step
        return total

    return compute_loss


def argmax_frames(outputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Return the predicted id of every frame [U, T], PAD_FRAME in padding; a `preprocess_logits_for_metrics`."""
    logits, counts, *_ = outputs
    valid = torch.arange(logits.shape[1], device=logits.device) < counts[:, None]
    return torch.where(valid, logits.argmax(-1), PAD_FRAME)


def decode_frames(frame_ids: np.ndarray, vocabulary: Vocabulary) -> list[str]:
    """Decode frame ids [U, T] (negative: padding) to texts by the greedy CTC path."""
    texts = []
    for row in frame_ids:
        ids = row[row >= 0].astype(np.int32)
        path = decoder.TokenPath(ids, np.ones(len(ids), np.float32))
        texts.append(decoder.join_words(decoder.path_to_words(path, vocabulary)))
    return texts


def decode_labels(labels: Sequence[Sequence[int]] | np.ndarray, vocabulary: Vocabulary) -> list[str]:
    """Decode label ids (negative: padding) to texts."""
    texts = (" ".join("".join(vocabulary.text(i) for i in row if i >= 0).split()) for row in labels)
    return [text.lower() if vocabulary.lower_case else text for text in texts]


def compute_metrics(
    references: Sequence[str], hypotheses: Sequence[str], frame_ids: np.ndarray, blank: int
) -> dict[str, float]:
    """Return wer, cer and blank_ratio, the fraction of blank frames in `frame_ids` [U, T] (negative: padding)."""
    frames = int((frame_ids >= 0).sum())
    blank_ratio = int((frame_ids == blank).sum()) / max(1, frames)
    return metrics.error_rates(references, hypotheses) | {"blank_ratio": blank_ratio}
