"""CTC speech recognition: vocabularies, labels, collation and losses; the blank is the pad token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

from mowa.data.text.spelling import vocabulary_speller
from mowa.errors import DataError
from mowa.types import IGNORE_INDEX, Preprocessing, Vocabulary

SPECIAL_TOKENS = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>"}
WORD_DELIMITER = "|"


def build_vocabulary(alphabet: str) -> Vocabulary:
    """Return the vocabulary of a new head: special tokens, the word delimiter, then the characters of `alphabet`."""
    tokens = (*SPECIAL_TOKENS.values(), WORD_DELIMITER, *alphabet)
    return Vocabulary(tokens, blank=0, delimiter=tokens.index(WORD_DELIMITER), specials=frozenset({1, 2, 3}))


def encode_labels(text: str, vocabulary: Vocabulary) -> list[int]:
    """Return the token ids of a transcript: the longest tokens that match, or phonemes; spaces become the delimiter.

    Raises:
        DataError: the text has a character, or a phoneme, outside the vocabulary.
    """
    ids, unknown = vocabulary_speller(vocabulary).spell(text)
    if unknown:
        raise DataError(
            f"{text[:40]!r}: {' '.join(sorted(set(unknown)))} not in the model's vocabulary; map or drop such"
            " characters first"
        )
    return ids


def collate(
    clips: Sequence[np.ndarray],
    targets: Sequence[Sequence[int]],
    preprocessing: Preprocessing,
    *,
    pad_to_multiple_of: int = 1,
) -> dict[str, torch.Tensor]:
    """Pad normalized clips, float32 [n] each, and label ids to a batch.

    Returns:
        input_values float32 [B, N], N a multiple of `pad_to_multiple_of`; attention_mask int64 [B, N]; labels int64
        [B, L], padded with IGNORE_INDEX.
    """
    samples = -(-max(map(len, clips)) // pad_to_multiple_of) * pad_to_multiple_of
    values = np.full((len(clips), samples), preprocessing.padding_value, np.float32)
    mask = np.zeros((len(clips), samples), np.int64)
    ids = np.full((len(clips), max(1, *map(len, targets))), IGNORE_INDEX, np.int64)
    for row, (clip, target) in enumerate(zip(clips, targets, strict=True)):
        values[row, : len(clip)], mask[row, : len(clip)], ids[row, : len(target)] = clip, 1, target
    return {
        "input_values": torch.from_numpy(values),
        "attention_mask": torch.from_numpy(mask),
        "labels": torch.from_numpy(ids),
    }


def mean_ctc_loss(logits: torch.Tensor, num_frames: torch.Tensor, labels: torch.Tensor, blank: int) -> torch.Tensor:
    """Return the mean CTC loss per token over the clips that have labels, in nats: float32 [].

    A clip with fewer frames than its labels need counts as zero.

    Args:
        logits: [B, T, V].
        num_frames: [B], frames of each clip without padding.
        labels: [B, L], padded with IGNORE_INDEX.
        blank: id of the blank.

    Source: Graves et al., "Connectionist Temporal Classification", ICML 2006.
    """
    lengths = (labels != IGNORE_INDEX).sum(1)
    rows = lengths > 0
    if not rows.any():
        return logits.float().sum() * 0
    log_probs = logits[rows].float().log_softmax(-1).transpose(0, 1)
    targets = labels[rows].clamp(min=0)
    return F.ctc_loss(log_probs, targets, num_frames[rows], lengths[rows], blank, reduction="mean", zero_infinity=True)


def ctc_losses(logits: torch.Tensor, num_frames: torch.Tensor, labels: torch.Tensor, blank: int) -> torch.Tensor:
    """Return −log p(labels) of each clip, in nats: float32 [B]; infinite where a clip has fewer than `min_frames`.

    Args:
        logits: [B, T, V].
        num_frames: [B], frames of each clip without padding.
        labels: [B, L], padded with IGNORE_INDEX.
        blank: id of the blank.

    Source: Graves et al., "Connectionist Temporal Classification", ICML 2006.
    """
    log_probs = logits.float().log_softmax(-1).transpose(0, 1)
    lengths = (labels != IGNORE_INDEX).sum(1)
    return F.ctc_loss(log_probs, labels.clamp(min=0), num_frames, lengths, blank, reduction="none")


def min_frames(ids: Sequence[int]) -> int:
    """Return the fewest frames that can output these labels: one each, and a blank between two equal ones."""
    return len(ids) + sum(a == b for a, b in pairwise(ids))
