"""Letters from sound with CTC: what a batch looks like and how a hypothesis is scored.

The loss is the net's own (`Wav2Vec2ForCTC` and its siblings, blank = pad id). This room refuses to know where clips
come from and how a training run is arranged.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mowa.data.text import plain
from mowa.errors import DataError, MissingPart
from mowa.nouns import Preprocessing, Vocabulary

IGNORED = -100


def labels(text: str, vocabulary: Vocabulary) -> list[int]:
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
    clips: Sequence[np.ndarray], targets: Sequence[Sequence[int]], preprocessing: Preprocessing
) -> dict[str, torch.Tensor]:
    """Normalised clips (float32 [n]) and label ids → input_values [B, N], attention_mask [B, N], labels [B, L]."""
    longest, widest = max(map(len, clips)), max(map(len, targets))
    values = np.full((len(clips), longest), preprocessing.padding_value, np.float32)
    mask = np.zeros((len(clips), longest), np.int64)
    ids = np.full((len(clips), widest), IGNORED, np.int64)
    for row, (clip, target) in enumerate(zip(clips, targets, strict=True)):
        values[row, : len(clip)], mask[row, : len(clip)], ids[row, : len(target)] = clip, 1, target
    return {
        "input_values": torch.from_numpy(values),
        "attention_mask": torch.from_numpy(mask),
        "labels": torch.from_numpy(ids),
    }


def error_rates(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, float]:
    """Word and character error rate (jiwer), lower-cased, punctuation stripped: {"wer", "cer"}, 1.0 = all wrong."""
    try:
        import jiwer
    except ImportError:
        raise MissingPart("jiwer is needed to measure error rates: pip install 'mowa[evaluate]'") from None
    said, heard = [plain(text) for text in references], [plain(text) for text in hypotheses]
    return {"wer": jiwer.wer(said, heard), "cer": jiwer.cer(said, heard)}
