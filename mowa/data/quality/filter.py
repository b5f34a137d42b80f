"""Which recordings can be learnt from, in the letters that a vocabulary has, with a report of what was left out; and
which may be measured on beside them.

Texts, lengths and names alone are looked at: this room decodes no sound and knows no net but as a count of frames.
How a text is spelt with a vocabulary's letters `letters` knows.
"""

from __future__ import annotations

import random
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from mowa.data.text.alphabet import OOV_POLICIES, VocabularyMapper, is_word_char
from mowa.data.text.alphabet import build_alphabet as build_alphabet
from mowa.data.text.normalize import normalize_text
from mowa.errors import DataError
from mowa.types import Example

DROP_REASONS = (
    "audio missing",
    "too short",
    "too long",
    "letters outside the vocabulary",
    "no letters left",
    "more letters than frames",
)


@dataclass(frozen=True, slots=True)
class FilterConfig:
    """What is left out, and what becomes of letters that the vocabulary lacks.

    `strange`: map (to a near letter, else drop; a recording whose text has digits the vocabulary lacks is left out,
    for they are words), drop, or reject (the recording). `letters` are written otherwise before anything else, in
    both cases where there are two: {"ё": "е"} does Ё too.
    """

    min_duration_s: float = 0.0
    max_duration_s: float = float("inf")
    oov: str = "map"
    char_map: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.oov not in OOV_POLICIES:
            raise DataError(f"strange letters: {self.oov!r} is none of {', '.join(OOV_POLICIES)}.")


@dataclass(frozen=True, slots=True)
class FilterResult:
    """What is learnt from, and what not.

    `left_out`: reason (of REASONS) → ids; `changed`: letter, lower-cased → how often it was mapped or dropped in the
    kept texts, and `became` what it was mapped to (the last time; "" dropped); `outside`: letters that recordings were
    left out for → in how many of them.
    """

    kept: tuple[Example, ...]
    dropped: Mapping[str, tuple[str, ...]]
    mapped_counts: Mapping[str, int]
    mapped_to: Mapping[str, str]
    oov_counts: Mapping[str, int]
    total_hours: float
    kept_hours: float

    def summary(self) -> str:
        """The report: a line for what was read and kept, one a reason with the first ids, one for the letters."""
        read = len(self.kept) + sum(map(len, self.dropped.values()))
        rows = [("read", read, f"{self.total_hours:.2f} h"), ("kept", len(self.kept), f"{self.kept_hours:.2f} h")]
        rows += [(reason, len(ids), _few(ids)) for reason, ids in self.dropped.items()]
        wide, high = max(len(name) for name, *_ in rows), max(len(str(count)) for _, count, _ in rows)
        lines = [f"{name:<{wide}}  {count:>{high}}  {note}" for name, count, note in rows]
        if self.mapped_counts:
            shown = [
                f"{letter} → {self.mapped_to[letter] or 'nothing'} {n}×" for letter, n in _often(self.mapped_counts)
            ]
            lines.append(f"letters written otherwise: {_few(shown, 12)}")
        if self.oov_counts:
            shown = [f"{letter} in {n}" for letter, n in _often(self.oov_counts)]
            lines.append(f"letters outside the vocabulary: {_few(shown, 12)}")
        return "\n".join(lines)


def _few(items: Sequence[str], shown: int = 3) -> str:
    return ", ".join(items[:shown]) + (f", and {len(items) - shown} more" if len(items) > shown else "")


def _often(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def filter_examples(
    examples: Iterable[Example], config: FilterConfig, *, characters: Sequence[str], num_frames: Callable[[float], int]
) -> FilterResult:
    """Keep what CTC can learn, its texts in the letters of `tokens` and single spaces.

    `tokens` are the vocabulary's tokens of one character (a space or | among them is the delimiter's business, not a
    letter); `frames(duration_s)` how many frames the net makes of a recording. Letters take the case that the
    vocabulary has; punctuation that it lacks becomes a space, apostrophes nothing. CTC needs a frame a letter (a space
    is one, too) and one more between two of the same (Graves et al. 2006, §3.1). Of several reasons to leave a
    recording out, the first of REASONS is given.
    """
    speller = VocabularyMapper(frozenset(characters) - {" ", "|"}, config.oov, config.char_map)
    kept: list[Example] = []
    left_out: dict[str, list[str]] = {reason: [] for reason in DROP_REASONS}
    changed: Counter[str] = Counter()
    became: dict[str, str] = {}
    outside: Counter[str] = Counter()
    read_s = 0.0
    for example in examples:
        read_s += max(0.0, example.duration_s)
        text, mapped, strange = speller.map_text(example.text)
        if reason := _reason(example, config, text, strange, num_frames):
            left_out[reason].append(example.id)
            outside.update(strange if reason == "letters outside the vocabulary" else ())
            continue
        for letter, written, count in mapped:
            changed[letter] += count
            became[letter] = written
        kept.append(replace(example, text=text))
    return FilterResult(
        kept=tuple(kept),
        dropped={reason: tuple(ids) for reason, ids in left_out.items() if ids},
        mapped_counts=dict(changed),
        mapped_to=became,
        oov_counts=dict(outside),
        total_hours=read_s / 3600,
        kept_hours=sum(example.duration_s for example in kept) / 3600,
    )


def _reason(
    example: Example, rules: FilterConfig, text: str, strange: frozenset[str], frames: Callable[[float], int]
) -> str | None:
    if not Path(example.audio).is_file():
        return "audio missing"
    if not example.duration_s >= rules.min_duration_s:  # nor is NaN
        return "too short"
    if example.duration_s > rules.max_duration_s:
        return "too long"
    if strange:
        return "letters outside the vocabulary"
    if not any(map(is_word_char, text)):
        return "no letters left"
    needed = len(text) + sum(a == b for a, b in pairwise(text))
    return "more letters than frames" if frames(example.duration_s) < needed else None


# --- two lists --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OverlapCount:
    """How many recordings of the second list share something with the first, and the ids of the first few."""

    count: int
    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Overlap:
    """What the `of` recordings of a second list have in common with a first one; false where that is nothing.

    `recordings` by their path, `sentences` of three words or more, `speakers` by their tag.
    """

    recordings: OverlapCount
    sentences: OverlapCount
    speakers: OverlapCount
    total: int

    def __bool__(self) -> bool:
        return bool(self.recordings.count or self.sentences.count or self.speakers.count)

    def __str__(self) -> str:
        """One line for people."""
        kinds = (
            (self.recordings, "are recordings of the other list"),
            (self.sentences, "say a sentence of it"),
            (self.speakers, "have a speaker of it"),
        )
        said = []
        for shared, what in kinds:
            if shared.count:
                ids = [*shared.ids, *(["…"] if shared.count > len(shared.ids) else [])]
                said.append(f"{shared.count} of {self.total} {what} ({', '.join(ids)})")
        return "; ".join(said) or f"none of {self.total} has anything in common with the other list"


def measure_overlap(train: Iterable[Example], dev: Iterable[Example], *, max_ids: int = 3) -> Overlap:
    """How many of `dev` are known from `train`. Sentences are compared in `plain` form, from three words on."""
    known: tuple[set[str], ...] = (set(), set(), set())
    for example in train:
        for there, value in zip(known, _marks(example), strict=True):
            there.add(value)
    found: tuple[list[str], ...] = ([], [], [])
    heard = list(dev)
    for example in heard:
        for there, ids, value in zip(known, found, _marks(example), strict=True):
            if value and value in there:
                ids.append(example.id)
    recordings, sentences, speakers = (OverlapCount(len(ids), tuple(ids[:max_ids])) for ids in found)
    return Overlap(recordings, sentences, speakers, len(heard))


def _marks(example: Example) -> tuple[str, str, str]:
    """What a recording may be known by, "" where it says too little: path, sentence, speaker."""
    sentence = _said(example)
    return example.audio, sentence if sentence.count(" ") >= 2 else "", _speaker(example)


def _said(example: Example) -> str:
    return normalize_text(unicodedata.normalize("NFC", example.text))


def _speaker(example: Example) -> str:
    return str(example.tags.get("speaker") or "")


def split_held_out(
    examples: Iterable[Example], ratio: float, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """(train, dev), each in the order given: at most `share` of the recordings go to dev, but a group at least.

    Where five speakers are tagged, a group is a speaker, and who is not tagged stays in train; else it is a sentence
    (`plain`, of any length). No group is in both. The choice follows from `seed` and the groups, not from their order.
    Raises DataError where there are not two groups, or `share` is not in [0, 1).
    """
    everything = tuple(examples)
    if not 0 <= ratio < 1:
        raise DataError(f"hold_out is {ratio}: it is a share of the recordings, from 0 to less than 1.")
    if not ratio or not everything:
        return everything, ()
    by_speaker = len({_speaker(example) for example in everything} - {""}) >= 5
    groups: dict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(everything):
        groups[_speaker(example) if by_speaker else _said(example)].append(index)
    if by_speaker:
        groups.pop("", None)
    if len(groups) < 2:
        said = f"all {len(everything)} recordings say the same"
        raise DataError(f"nothing can be held out: {said}. Name a dev set.")
    chosen = set(_some(groups, ratio * len(everything), seed))
    return (
        tuple(example for index, example in enumerate(everything) if index not in chosen),
        tuple(example for index, example in enumerate(everything) if index in chosen),
    )


def _some(groups: Mapping[str, Sequence[int]], most: float, seed: int) -> Iterator[int]:
    """Whole groups in a shuffled order, as many as fit into `most`; the smallest where none does."""
    names = sorted(groups)
    random.Random(seed).shuffle(names)
    taken = 0
    for name in names:
        if taken + len(groups[name]) <= most:
            taken += len(groups[name])
            yield from groups[name]
    if not taken:
        yield from groups[min(names, key=lambda name: len(groups[name]))]
