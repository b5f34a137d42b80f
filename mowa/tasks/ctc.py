"""Letters from sound with CTC: what a batch looks like and how a hypothesis is scored.

The loss is the net's own (`Wav2Vec2ForCTC` and its siblings, blank = pad id). This room refuses to know where clips
come from and how a training run is arranged.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

from mowa.errors import DataError
from mowa.types import IGNORE_INDEX, Preprocessing, Vocabulary

SPECIAL_TOKENS = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>"}
WORD_DELIMITER = "|"


def build_vocabulary(alphabet: str) -> Vocabulary:
    """The vocabulary of a new head: special tokens, the delimiter, then the letters."""
    tokens = (*SPECIAL_TOKENS.values(), WORD_DELIMITER, *alphabet)
    return Vocabulary(tokens, blank=0, delimiter=tokens.index(WORD_DELIMITER), specials=frozenset({1, 2, 3}))


def encode_labels(text: str, vocabulary: Vocabulary) -> list[int]:
    """The ids of a transcript; spaces become the delimiter. A letter outside the vocabulary is a DataError."""
    delimiter = vocabulary.tokens[vocabulary.delimiter] if vocabulary.delimiter is not None else " "
    known = {token: index for index, token in enumerate(vocabulary.tokens)}
    spelt = text.replace(" ", delimiter)
    strange = sorted(set(spelt) - known.keys())
    if strange:
        raise DataError(
            f"{text[:40]!r}: {' '.join(strange)} not in the model's alphabet; map or drop such letters first."
        )
    return [known[letter] for letter in spelt]


def collate(
    clips: Sequence[np.ndarray],
    targets: Sequence[Sequence[int]],
    preprocessing: Preprocessing,
    *,
    pad_to_multiple_of: int = 1,
) -> dict[str, torch.Tensor]:
    """Normalised clips (float32 [n]) and label ids → input_values [B, N], attention_mask [B, N], labels [B, L].

    N is a multiple of `grid`.
    """
    longest, widest = -(-max(map(len, clips)) // pad_to_multiple_of) * pad_to_multiple_of, max(1, *map(len, targets))
    values = np.full((len(clips), longest), preprocessing.padding_value, np.float32)
    mask = np.zeros((len(clips), longest), np.int64)
    ids = np.full((len(clips), widest), IGNORE_INDEX, np.int64)
    for row, (clip, target) in enumerate(zip(clips, targets, strict=True)):
        values[row, : len(clip)], mask[row, : len(clip)], ids[row, : len(target)] = clip, 1, target
    return {
        "input_values": torch.from_numpy(values),
        "attention_mask": torch.from_numpy(mask),
        "labels": torch.from_numpy(ids),
    }


def mean_ctc_loss(logits: torch.Tensor, num_frames: torch.Tensor, labels: torch.Tensor, blank: int) -> torch.Tensor:
    """The mean CTC loss a letter, over the clips that have labels (Graves et al. 2006).

    logits [B, T, V], frames [B] true ones of each clip, labels [B, L] padded with IGNORED → float32 []. A clip with
    fewer frames than its letters need counts as zero.
    """
    lengths = (labels != IGNORE_INDEX).sum(1)
    rows = lengths > 0
    if not rows.any():
        return logits.float().sum() * 0
    scores = logits[rows].float().log_softmax(-1).transpose(0, 1)
    targets = labels[rows].clamp(min=0)
    return F.ctc_loss(scores, targets, num_frames[rows], lengths[rows], blank, reduction="mean", zero_infinity=True)


def ctc_losses(logits: torch.Tensor, num_frames: torch.Tensor, labels: torch.Tensor, blank: int) -> torch.Tensor:
    """−log p(labels) of each clip (Graves et al. 2006), in nats: float32 [B].

    logits [B, T, V], frames [B] true ones of each clip, labels [B, L] padded with IGNORED. Infinite where a clip has
    fewer frames than its letters need (`needed`).
    """
    scores = logits.float().log_softmax(-1).transpose(0, 1)
    lengths = (labels != IGNORE_INDEX).sum(1)
    return F.ctc_loss(scores, labels.clamp(min=0), num_frames, lengths, blank, reduction="none")


def min_frames(ids: Sequence[int]) -> int:
    """The fewest frames that can say these labels: one each, and a blank between two of the same."""
    return len(ids) + sum(a == b for a, b in pairwise(ids))
