"""The numbers of a CTC head, read as words with times and confidence.

It knows frames, ids and a vocabulary; it refuses to know which net or engine made the numbers, and how a long recording
was cut into windows. numpy only.

Times. A character that holds the frames a..b, both included, lasts from a · frame_s to (b + 1) · frame_s. CTC peaks are
narrow and late: against a forced alignment these bounds are off by 20 to 60 ms. Nothing is rounded here.

Confidence. Of a character: the mean probability of its frames. Of a word: the geometric mean of its characters, so that
one doubtful letter shows and a long word is not punished for its length. Of a segment: the mean of its words.

A. Graves, S. Fernández, F. Gomez, J. Schmidhuber, "Connectionist Temporal Classification", ICML 2006.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from mowa.errors import ModelError
from mowa.types import Character, Segment, Vocabulary, Word

FRAME_S = 0.02
"""One step of every wav2vec2-style encoder: 320 samples at 16 kHz."""

_SPACE = re.compile(r"\s+")


@dataclass(frozen=True, slots=True, eq=False)
class TokenPath:
    """One token per frame: `ids` int32 [T] and `probabilities` float32 [T], how sure the head was of each."""

    ids: NDArray[np.int32]
    probabilities: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.ids)


def best_path(log_probs: NDArray[np.float32], vocabulary: Vocabulary) -> TokenPath:
    """Take the likeliest token of every frame, special tokens left out.

        ids[t] = argmax_v log_probs[t, v],  v not special;    probabilities[t] = exp log_probs[t, ids[t]]

    log_probs float32 [T, V], V = len(vocabulary)  →  T frames. The probabilities are not renormalised over the tokens
    that were left in: mass the head gave to a special token is doubt, and stays visible as such.
    Raises ModelError if the width is not the vocabulary's or a number is NaN. Graves et al. 2006, section 3.2.
    """
    if log_probs.ndim != 2 or log_probs.shape[1] != len(vocabulary):
        raise ModelError(f"the model gave numbers of shape {log_probs.shape} for {len(vocabulary)} tokens.")
    if broken := np.isnan(log_probs).any(axis=1).sum():
        raise ModelError(f"the model gave NaN in {broken} of {len(log_probs)} frames; try float32 or another engine.")
    # Chosen from, not masked to -inf: a special token must not win even where every other one is -inf.
    textual = np.array([token for token in range(len(vocabulary)) if token not in vocabulary.specials], dtype=np.int32)
    ids = textual[log_probs[:, textual].argmax(axis=1)]
    chosen = np.take_along_axis(log_probs, ids[:, None], axis=1)[:, 0]
    # A half-precision softmax may round a log-probability to just above 0.
    return TokenPath(ids, np.exp(np.minimum(chosen, 0)).astype(np.float32))


def concat_paths(paths: Iterable[TokenPath]) -> TokenPath:
    """Put the paths of windows that follow one another without gap or overlap end to end. No windows, no frames."""
    parts = tuple(paths)
    return TokenPath(
        np.concatenate([np.empty(0, np.int32), *(part.ids for part in parts)]),
        np.concatenate([np.empty(0, np.float32), *(part.probabilities for part in parts)]),
    )


def path_to_words(
    path: TokenPath, vocabulary: Vocabulary, *, frame_s: float = FRAME_S, end_s: float = math.inf
) -> tuple[Word, ...]:
    """Collapse repeats, drop blanks, and part what is left into words with their characters.

    `end_s` is the duration of the audio: no time exceeds it. The delimiter reads as a space, and spaces part words
    whichever token they stand in; so a vocabulary with neither delimiter nor spaces gives all text as one word.
    A token of several letters is one character; one with a space inside gives each side the token's whole time.
    Words come in order of time and are never empty; 0 ≤ start_s ≤ end_s for each.
    """
    words: list[Word] = []
    letters: list[Character] = []
    for character in _characters(path, vocabulary, frame_s, end_s):
        for index, piece in enumerate(_SPACE.split(character.text)):
            if index > 0 and letters:
                words.append(_word(letters))
                letters = []
            if piece:
                letters.append(Character(piece, character.start_s, character.end_s, character.confidence))
    if letters:
        words.append(_word(letters))
    return tuple(words)


def group_segments(words: Sequence[Word], boundaries_s: Sequence[float] = ()) -> tuple[Segment, ...]:
    """Group words, given in order of time, by the interval between cuts in which each starts.

    A word that starts on a cut belongs to what follows it. Intervals without words give no segment; without cuts there
    is one interval. A segment lasts from its first word's start to its last word's end.
    """
    cuts = sorted(boundaries_s)
    groups = (tuple(group) for _, group in groupby(words, key=lambda word: bisect_right(cuts, word.start_s)))
    return tuple(
        Segment(
            text=join_words(group),
            start_s=group[0].start_s,
            end_s=group[-1].end_s,
            words=group,
            confidence=fmean(word.confidence for word in group),
        )
        for group in groups
    )


def join_words(words: Iterable[Word]) -> str:
    """The words, one space between them."""
    return " ".join(word.text for word in words)


def _characters(path: TokenPath, vocabulary: Vocabulary, frame_s: float, end_s: float) -> Iterator[Character]:
    """Each run of one id as a character, in order; runs of the blank and of special tokens are silent."""
    silent = vocabulary.specials | {vocabulary.blank}
    bounds = np.flatnonzero(np.diff(path.ids, prepend=-1, append=-1))
    starts, ends = bounds[:-1], bounds[1:]
    means = np.add.reduceat(path.probabilities.astype(np.float64), starts) / (ends - starts)
    for start, end, mean in zip(starts.tolist(), ends.tolist(), means.tolist(), strict=True):
        token = int(path.ids[start])
        if token not in silent:
            yield Character(
                text=" " if token == vocabulary.delimiter else vocabulary.tokens[token],
                start_s=min(start * frame_s, end_s),
                end_s=min(end * frame_s, end_s),
                confidence=mean,
            )


def _word(characters: Sequence[Character]) -> Word:
    confidences = [character.confidence for character in characters]
    return Word(
        text="".join(character.text for character in characters),
        start_s=characters[0].start_s,
        end_s=characters[-1].end_s,
        confidence=math.exp(fmean(map(math.log, confidences))) if all(confidences) else 0.0,
        characters=tuple(characters),
    )
