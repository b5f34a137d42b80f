"""Filter the recordings that a CTC model can be trained on, map their texts to its vocabulary, and find overlaps.

Only texts, durations and ids are used; no audio is decoded.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from mowa.data.text.alphabet import OOV_POLICIES, VocabularyMapper, is_word_char
from mowa.data.text.normalize import compose, normalize_text
from mowa.data.text.spelling import vocabulary_speller
from mowa.errors import DataError
from mowa.types import Example, Vocabulary

_OUT_OF_VOCABULARY = "characters outside the vocabulary"

DROP_REASONS = (
    "audio missing",
    "too short",
    "too long",
    _OUT_OF_VOCABULARY,
    "empty after normalization",
    "more tokens than frames",
)


@dataclass(frozen=True, slots=True)
class FilterConfig:
    """What is dropped, and what becomes of characters outside the vocabulary.

    min_duration_s, max_duration_s  durations that are kept
    oov       map: replace a character by a similar one that the vocabulary has, else drop it; recordings whose text has
              digits that the vocabulary lacks are dropped, since digits stand for words. drop: drop the characters.
              reject: drop the recordings
    char_map  replacements applied before anything else; a key in lower case also applies to its upper case: {"ё": "е"}
    """

    min_duration_s: float = 0.0
    max_duration_s: float = float("inf")
    oov: str = "map"
    char_map: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.oov not in OOV_POLICIES:
            raise DataError(f"oov: {self.oov!r} is none of {', '.join(OOV_POLICIES)}.")


@dataclass(frozen=True, slots=True)
class FilterResult:
    """Recordings that were kept, with mapped texts, and counts of what was not.

    dropped        reason (of `DROP_REASONS`) → ids
    mapped_counts  character in lower case → how often it was mapped or dropped in the kept texts
    mapped_to      character in lower case → its replacement (the last one; "" if dropped)
    oov_counts     character → number of recordings that were dropped for it
    """

    kept: tuple[Example, ...]
    dropped: Mapping[str, tuple[str, ...]]
    mapped_counts: Mapping[str, int]
    mapped_to: Mapping[str, str]
    oov_counts: Mapping[str, int]
    total_hours: float
    kept_hours: float

    def summary(self) -> str:
        """Return a text table: recordings read and kept, dropped ones by reason with the first ids, characters."""
        num_read = len(self.kept) + sum(map(len, self.dropped.values()))
        rows = [("read", num_read, f"{self.total_hours:.2f} h"), ("kept", len(self.kept), f"{self.kept_hours:.2f} h")]
        rows += [(reason, len(ids), _shorten(ids)) for reason, ids in self.dropped.items()]
        name_width, count_width = max(len(name) for name, *_ in rows), max(len(str(count)) for _, count, _ in rows)
        lines = [f"{name:<{name_width}}  {count:>{count_width}}  {note}" for name, count, note in rows]
        if self.mapped_counts:
            mapped = [f"{c} → {self.mapped_to[c] or 'nothing'} {n}×" for c, n in _by_count(self.mapped_counts)]
            lines.append(f"mapped characters: {_shorten(mapped, 12)}")
        if self.oov_counts:
            outside = [f"{c} in {n}" for c, n in _by_count(self.oov_counts)]
            lines.append(f"{_OUT_OF_VOCABULARY}: {_shorten(outside, 12)}")
        return "\n".join(lines)


def _shorten(items: Sequence[str], count: int = 3) -> str:
    return ", ".join(items[:count]) + (f", and {len(items) - count} more" if len(items) > count else "")


def _by_count(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def filter_examples(
    examples: Iterable[Example], config: FilterConfig, *, vocabulary: Vocabulary, num_frames: Callable[[float], int]
) -> FilterResult:
    """Keep the recordings that CTC can be trained on, with texts that the vocabulary can spell and single spaces.

    vocabulary  of the head to train
    num_frames  function from duration in seconds to frames of the model's output

    Characters take the case that the vocabulary has. Punctuation outside the vocabulary becomes a space, an apostrophe
    nothing. CTC needs a frame per token (a space is one) and one more between two equal ones (Graves et al. 2006,
    §3.1). A recording with several reasons to drop it has the first of `DROP_REASONS`.
    """
    mapper, speller = VocabularyMapper(vocabulary, config.oov, config.char_map), vocabulary_speller(vocabulary)
    kept: list[Example] = []
    dropped: dict[str, list[str]] = {reason: [] for reason in DROP_REASONS}
    mapped_counts: Counter[str] = Counter()
    mapped_to: dict[str, str] = {}
    oov_counts: Counter[str] = Counter()
    total_s = 0.0
    for example in examples:
        total_s += max(0.0, example.duration_s)
        text, mapped, rejected = mapper.map_text(example.text)
        ids, unknown = speller.spell(text)
        rejected |= frozenset(unknown)
        if reason := _drop_reason(example, config, text, ids, rejected, num_frames):
            dropped[reason].append(example.id)
            oov_counts.update(rejected if reason == _OUT_OF_VOCABULARY else ())
            continue
        for character, replacement, count in mapped:
            mapped_counts[character] += count
            mapped_to[character] = replacement
        kept.append(replace(example, text=text))
    return FilterResult(
        kept=tuple(kept),
        dropped={reason: tuple(ids) for reason, ids in dropped.items() if ids},
        mapped_counts=dict(mapped_counts),
        mapped_to=mapped_to,
        oov_counts=dict(oov_counts),
        total_hours=total_s / 3600,
        kept_hours=sum(example.duration_s for example in kept) / 3600,
    )


def _drop_reason(
    example: Example,
    config: FilterConfig,
    text: str,
    ids: Sequence[int],
    rejected: frozenset[str],
    num_frames: Callable[[float], int],
) -> str | None:
    if not Path(example.audio).is_file():
        return "audio missing"
    if not example.duration_s >= config.min_duration_s:  # also for NaN
        return "too short"
    if example.duration_s > config.max_duration_s:
        return "too long"
    if rejected:
        return _OUT_OF_VOCABULARY
    if not any(map(is_word_char, text)):
        return "empty after normalization"
    needed = len(ids) + sum(a == b for a, b in pairwise(ids))
    return "more tokens than frames" if num_frames(example.duration_s) < needed else None


# --- overlap of two lists ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OverlapCount:
    """How many recordings of the second list share something with the first, and the ids of the first few."""

    count: int
    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Overlap:
    """What the `total` recordings of a second list have in common with a first one; false if nothing.

    Recordings are compared by path, sentences by `normalize_text` if they have three words or more, speakers by tag.
    """

    recordings: OverlapCount
    sentences: OverlapCount
    speakers: OverlapCount
    total: int

    def __bool__(self) -> bool:
        return bool(self.recordings.count or self.sentences.count or self.speakers.count)

    def __str__(self) -> str:
        kinds = ((self.recordings, "recordings"), (self.sentences, "sentences"), (self.speakers, "speakers"))
        parts = []
        for overlap, kind in kinds:
            if overlap.count:
                ids = [*overlap.ids, *(["…"] if overlap.count > len(overlap.ids) else [])]
                parts.append(f"{overlap.count} of {self.total} share {kind} with the other list ({', '.join(ids)})")
        return "; ".join(parts) or f"none of {self.total} shares anything with the other list"


def measure_overlap(train: Iterable[Example], dev: Iterable[Example], *, max_ids: int = 3) -> Overlap:
    """Count the recordings of `dev` that share a path, a sentence or a speaker with `train`."""
    known: tuple[set[str], ...] = (set(), set(), set())
    for example in train:
        for values, value in zip(known, _overlap_keys(example), strict=True):
            values.add(value)
    found: tuple[list[str], ...] = ([], [], [])
    dev_examples = list(dev)
    for example in dev_examples:
        for values, ids, value in zip(known, found, _overlap_keys(example), strict=True):
            if value and value in values:
                ids.append(example.id)
    recordings, sentences, speakers = (OverlapCount(len(ids), tuple(ids[:max_ids])) for ids in found)
    return Overlap(recordings, sentences, speakers, len(dev_examples))


def _overlap_keys(example: Example) -> tuple[str, str, str]:
    """Return path, sentence and speaker; "" for a sentence of fewer than three words, which may agree by chance."""
    sentence = _sentence(example)
    return example.audio, sentence if sentence.count(" ") >= 2 else "", speaker_of(example)


def _sentence(example: Example) -> str:
    return normalize_text(example.text)


def speaker_of(example: Example) -> str:
    """Return the speaker, which may be the number 0, as a string in NFC; "" if there is none."""
    tag = example.tags.get("speaker")
    return "" if tag is None else compose(str(tag))


def split_held_out(
    examples: Iterable[Example], ratio: float, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Split into (train, dev), both in the given order, so that no group is in both.

    At most `ratio` of the recordings go to dev, but at least one group. With at least five tagged speakers a group is a
    speaker, and recordings without a speaker stay in train; otherwise a group is a sentence (`normalize_text`). The
    split depends on `seed` and the groups, not on their order.
    Raises DataError if there are fewer than two groups, or `ratio` is not in [0, 1).
    """
    everything = tuple(examples)
    if not 0 <= ratio < 1:
        raise DataError(f"hold_out is {ratio}: it must be at least 0 and less than 1.")
    if not ratio or not everything:
        return everything, ()
    by_speaker = len({speaker_of(example) for example in everything} - {""}) >= 5
    groups: dict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(everything):
        groups[speaker_of(example) if by_speaker else _sentence(example)].append(index)
    if by_speaker:
        groups.pop("", None)
    if len(groups) < 2:
        raise DataError(
            f"nothing can be held out: all {len(everything)} recordings have the same text. Pass a dev set."
        )
    chosen = set(_choose_groups(groups, ratio * len(everything), seed))
    return (
        tuple(example for index, example in enumerate(everything) if index not in chosen),
        tuple(example for index, example in enumerate(everything) if index in chosen),
    )


def _choose_groups(groups: Mapping[str, Sequence[int]], max_count: float, seed: int) -> Iterator[int]:
    """Yield the members of shuffled groups while they fit into `max_count`; of the smallest group if none fits."""
    names = sorted(groups)
    random.Random(seed).shuffle(names)
    taken = 0
    for name in names:
        if taken + len(groups[name]) <= max_count:
            taken += len(groups[name])
            yield from groups[name]
    if not taken:
        yield from groups[min(names, key=lambda name: len(groups[name]))]
