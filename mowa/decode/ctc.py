"""Decode CTC log-probabilities greedily into words with times and confidences. numpy only.

Times: a character on frames a to b (inclusive) lasts from a · frame_s to (b + 1) · frame_s. CTC outputs are short and
late: compared with a forced alignment these times are off by 20 to 60 ms. They are not rounded here.

Confidences: of a character, the mean probability of its frames; of a word, the geometric mean of its characters, so
that one uncertain character shows and the length of a word does not matter; of a segment, the mean of its words.

Source: A. Graves, S. Fernández, F. Gomez, J. Schmidhuber, "Connectionist Temporal Classification", ICML 2006.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from mowa.decode.word_breaks import starts_word, writes_spaces
from mowa.errors import ModelError
from mowa.types import Character, Segment, Vocabulary, Word

FRAME_S = 0.02
"""Duration of a frame of wav2vec2-style encoders: 320 samples at 16 kHz."""

_SPACE = re.compile(r"\s+")


@dataclass(frozen=True, slots=True, eq=False)
class TokenPath:
    """One token per frame: `ids` int32 [T] and `probabilities` float32 [T]."""

    ids: NDArray[np.int32]
    probabilities: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.ids)


def best_path(log_probs: NDArray[np.float32], vocabulary: Vocabulary) -> TokenPath:
    """Decode greedily: take the most probable token of every frame, except special tokens.

        ids[t] = argmax_v log_probs[t, v],  v not special;    probabilities[t] = exp log_probs[t, ids[t]]

    log_probs float32 [T, V], V = len(vocabulary)  →  T frames. The probabilities are not renormalized without the
    special tokens, so that probability mass on these lowers the confidence.
    Raises ModelError if V is not the size of the vocabulary or a value is NaN. Graves et al. 2006, section 3.2.
    """
    if log_probs.ndim != 2 or log_probs.shape[1] != len(vocabulary):
        raise ModelError(
            f"the model output has shape {log_probs.shape}, but the vocabulary has {len(vocabulary)} tokens."
        )
    if num_nan := np.isnan(log_probs).any(axis=1).sum():
        raise ModelError(
            f"the model output is NaN in {num_nan} of {len(log_probs)} frames. Try float32 or another engine."
        )
    # Indexed instead of masked with -inf: a special token must not win even if every other one is -inf.
    textual = np.array([token for token in range(len(vocabulary)) if token not in vocabulary.specials], dtype=np.int32)
    ids = textual[log_probs[:, textual].argmax(axis=1)]
    chosen = np.take_along_axis(log_probs, ids[:, None], axis=1)[:, 0]
    # A half-precision softmax may round a log-probability to just above 0.
    return TokenPath(ids, np.exp(np.minimum(chosen, 0)).astype(np.float32))


def concat_paths(paths: Iterable[TokenPath]) -> TokenPath:
    """Concatenate the paths of consecutive windows. No paths give an empty one."""
    parts = tuple(paths)
    return TokenPath(
        np.concatenate([np.empty(0, np.int32), *(part.ids for part in parts)]),
        np.concatenate([np.empty(0, np.float32), *(part.probabilities for part in parts)]),
    )


def path_to_words(
    path: TokenPath,
    vocabulary: Vocabulary,
    *,
    frame_s: float = FRAME_S,
    end_s: float = math.inf,
    before: str = "",
) -> tuple[Word, ...]:
    """Collapse repeats, remove blanks, and split into words with their characters.

    `end_s` is the duration of the audio, which no time exceeds, and `before` the last character of the text before the
    path. The delimiter is a space, and spaces and ▁ inside tokens separate words too; where a language or a vocabulary
    has no spaces, `word_breaks.starts_word` does, and such words have `space_before=False`. A token of several letters
    is one `Character`; of one with a space inside, each part has the times of the token.
    Words are in order and not empty; 0 ≤ start_s ≤ end_s. Their text (`join_words`) is that of transformers' tokenizer.
    """
    words: list[Word] = []
    characters: list[Character] = []
    space_before, spaced = True, writes_spaces(vocabulary)
    for token in _collapse(path, vocabulary, frame_s, end_s):
        for index, piece in enumerate(_SPACE.split(token.text)):
            if index > 0:
                before = " "
            starts = starts_word(before, piece, spaced=spaced)
            if characters and (index > 0 or starts):
                words.append(_join_characters(characters, space_before, vocabulary.lower_case))
                characters = []
            if piece:
                space_before = space_before if characters else not starts
                characters.append(Character(piece, token.start_s, token.end_s, token.confidence))
                before = piece[-1]
    if characters:
        words.append(_join_characters(characters, space_before, vocabulary.lower_case))
    return tuple(words)


def count_complete_frames(path: TokenPath, vocabulary: Vocabulary) -> int:
    """Return how many frames hold whole words, whatever frames follow: up to the last space or word's start."""
    complete, last, spaced = 0, "", writes_spaces(vocabulary)
    for token, start, end in _runs(path, vocabulary):
        text = vocabulary.text(token)
        if not text.strip():
            complete = end
        elif last and (text[0].isspace() or last.isspace() or starts_word(last, text, spaced=spaced)):
            complete = start
        last = text[-1:] or last
    return complete


def find_longest_pause(path: TokenPath, vocabulary: Vocabulary) -> int:
    """Return the end of the longest pause beside tokens, as a frame: where a word that does not end may be broken."""
    runs = _runs(path, vocabulary)
    ends, starts = [0, *(end for _, _, end in runs)], [*(start for _, start, _ in runs), len(path)]
    pauses = [(start - end, start) for end, start in zip(ends, starts, strict=True)]
    if runs and not pauses[-1][0]:
        pauses.pop()  # the last token may go on
    return max(pauses)[1]


def last_character(path: TokenPath, vocabulary: Vocabulary) -> str:
    """Return the last character of a path's text, which may be a space; "" if it has none."""
    return "".join(vocabulary.text(token)[-1:] for token, _, _ in _runs(path, vocabulary)[-1:])


def group_segments(words: Sequence[Word], boundaries_s: Sequence[float] = ()) -> tuple[Segment, ...]:
    """Group words, given in order, by the interval between boundaries in which each starts.

    A word that starts on a boundary belongs to the interval after it. Intervals without words give no segment. A
    segment lasts from the start of its first word to the end of its last word.
    """
    boundaries = sorted(boundaries_s)
    groups = (tuple(group) for _, group in groupby(words, key=lambda word: bisect_right(boundaries, word.start_s)))
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
    """Return the text of the words, separated by single spaces where they have one."""
    return "".join(f" {word.text}" if word.space_before else word.text for word in words).lstrip(" ")


def join_segments(segments: Iterable[Segment]) -> str:
    """Return the text of segments in order of time: a space between two, unless the language writes none."""
    text, channel = "", None
    for segment in segments:
        if segment.text:
            follows = segment.channel == channel and segment.words and not segment.words[0].space_before
            text += segment.text if follows or not text else f" {segment.text}"
            channel = segment.channel
    return text


def _collapse(path: TokenPath, vocabulary: Vocabulary, frame_s: float, end_s: float) -> Iterator[Character]:
    """Yield each run of one id as a character, except runs of the blank and of special tokens."""
    starts, ends = _run_bounds(path)
    means = np.add.reduceat(path.probabilities.astype(np.float64), starts) / (ends - starts)
    confidences = dict(zip(starts.tolist(), means.tolist(), strict=True))
    for token, start, end in _runs(path, vocabulary):
        yield Character(
            text=vocabulary.text(token),
            start_s=min(start * frame_s, end_s),
            end_s=min(end * frame_s, end_s),
            confidence=confidences[start],
        )


def _runs(path: TokenPath, vocabulary: Vocabulary) -> list[tuple[int, int, int]]:
    """Return token, first frame and end of each run of one id, without the blank and special tokens."""
    skipped = vocabulary.specials | {vocabulary.blank}
    starts, ends = _run_bounds(path)
    runs = zip(path.ids[starts].tolist(), starts.tolist(), ends.tolist(), strict=True)
    return [(token, start, end) for token, start, end in runs if token not in skipped]


def _run_bounds(path: TokenPath) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    bounds = np.flatnonzero(np.diff(path.ids, prepend=-1, append=-1))
    return bounds[:-1], bounds[1:]


def _join_characters(characters: Sequence[Character], space_before: bool, lower_case: bool) -> Word:
    confidences = [character.confidence for character in characters]
    text = "".join(character.text for character in characters)
    if lower_case:  # at once: a final sigma depends on the letter before it
        text, whole = text.lower(), text
        bounds = accumulate((len(character.text) for character in characters), initial=0)
        lowered = [text[a:b] for a, b in pairwise(bounds)] if len(text) == len(whole) else None
        characters = [
            replace(character, text=lowered[at] if lowered else character.text.lower())
            for at, character in enumerate(characters)
        ]
    return Word(
        text=text,
        start_s=characters[0].start_s,
        end_s=characters[-1].end_s,
        confidence=math.exp(fmean(map(math.log, confidences))) if all(confidences) else 0.0,
        characters=tuple(characters),
        space_before=space_before,
    )
