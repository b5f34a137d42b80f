"""Split a corpus into train, dev and test that share no speakers and no sentences.

Recordings are edges of a graph between speakers and sentences (texts after `normalize_text`), and a split that divides
neither is a union of its connected components. Where the components are too large for that, because everybody reads
the same prompts, one of the two is given up, or recordings that would be in two splits are dropped.

Speakers, sentences and components are ordered by a hash of their names and the seed. Test takes the first and dev the
last of them, so that few recordings change their split when data is added. No audio is decoded.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from mowa.data.quality.filter import speaker_of
from mowa.data.text.normalize import normalize_text
from mowa.errors import DataError
from mowa.io.atomic import atomic_write, dump_json
from mowa.types import Example

DISJOINT = ("auto", "speakers", "sentences", "both")
SPLITS = ("train", "dev", "test")
MIN_RATIO = 0.5  # of the requested size, that a split of whole groups must have,
MIN_TRAIN_RATIO = 0.5  # and of the recordings that must stay in train, to be accepted
EXPONENTS = (1.0, 0.85, 0.7, 0.6, 0.5)  # p^e of the speakers are tried for p of the recordings (`_drop_conflicts`)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(%|h|min|)")

Split = str  # train, dev, test, or "" for dropped


@dataclass(frozen=True, slots=True)
class CorpusSplit:
    """Three splits, each in the order of the corpus.

    dropped    ids of recordings that would have been in two splits
    disjoint   what no two splits share: speakers, sentences or both
    notes      what could not be kept, in sentences
    """

    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]
    dropped: tuple[str, ...]
    disjoint: tuple[str, ...]
    notes: tuple[str, ...]

    def __getitem__(self, split: str) -> tuple[Example, ...]:
        found: tuple[Example, ...] = getattr(self, split)
        return found


@dataclass(frozen=True, slots=True)
class _Corpus:
    """Recordings with their speaker and sentence, and the requested sizes of dev and test as weights."""

    examples: tuple[Example, ...]
    speakers: tuple[str, ...]
    sentences: tuple[str, ...]
    targets: Mapping[Split, float]
    weights: Mapping[Split, Sequence[float]]
    seed: int
    notes: tuple[str, ...] = ()  # how the sizes were measured, where it is not as requested

    def weigh(self, split: Split, members: Iterable[int]) -> float:
        """Return the size of recordings, in the unit of the split's target: seconds, or recordings."""
        return sum(self.weights[split][index] for index in members)

    def group(self, names: Sequence[str]) -> dict[str, list[int]]:
        """Return name → recordings, for one name per recording."""
        groups: dict[str, list[int]] = defaultdict(list)
        for index, name in enumerate(names):
            groups[name].append(index)
        return groups

    def rank(self, name: str) -> bytes:
        """Return the hash by which names are ordered."""
        return blake2b(f"{self.seed} {name}".encode("utf-8", "surrogatepass"), digest_size=8).digest()


def split_corpus(
    examples: Iterable[Example], *, dev: str = "5%", test: str = "5%", disjoint: str = "auto", seed: int = 0
) -> CorpusSplit:
    """Split recordings into train, dev and test.

    Args:
        dev, test: size of a split: "5%" of the duration, "2h", "30min", or "500" recordings; "0" for none. Percentages
            are of the recordings if some have no duration. Whole speakers, sentences or components are taken, so that
            sizes are met approximately.
        disjoint: speakers: no speaker is in two splits; sentences: no text; both: neither, and recordings that would
            be in two splits are dropped; auto: both if nothing has to be dropped, else speakers, or sentences if there
            are too few speakers.
        seed: another seed gives another split.

    Recordings without a speaker stay in train where speakers are disjoint; without any speaker, sentences are.

    Raises DataError for a malformed size, and if there are too few speakers or sentences for the splits.
    """
    if disjoint not in DISJOINT:
        raise DataError(f"disjoint: {disjoint!r} is none of {', '.join(DISJOINT)}")
    corpus = _build_corpus(tuple(examples), {"dev": dev, "test": test}, seed)
    if not any(corpus.speakers):
        if disjoint in ("speakers", "both"):
            raise DataError(f"disjoint: {disjoint}: no recording has a speaker: name the column with --speaker-by")
        return _finish(corpus, _assign(corpus, corpus.sentences), ("no recording has a speaker",))
    if disjoint == "speakers":
        return _finish(corpus, _assign(corpus, corpus.speakers), ())
    if disjoint == "sentences":
        return _finish(corpus, _assign(corpus, corpus.sentences), ())
    components = _find_components(corpus)
    whole = _assign(corpus, components, strict=False)
    if _is_acceptable(corpus, whole):
        return _finish(corpus, whole, ())
    largest = max(map(len, corpus.group(components).values()))
    note = f"{largest} of {len(components)} recordings are connected by shared speakers and sentences"
    if disjoint == "both":
        return _finish(corpus, _drop_conflicts(corpus), (note,))
    by_speaker = _assign(corpus, corpus.speakers, strict=False)
    if _is_acceptable(corpus, by_speaker):
        return _finish(corpus, by_speaker, (f"{note}: speakers are disjoint, sentences are not",))
    return _finish(
        corpus, _assign(corpus, corpus.sentences), (f"{note}, and speakers are few: sentences are disjoint only",)
    )


def write_split(split: CorpusSplit, folder: Path) -> list[Path]:
    """Write `train.jsonl`, `dev.jsonl` and `test.jsonl` as `read_examples` reads them, except empty ones.

    Raises DataError if one of them exists.
    """
    files = {folder / f"{name}.jsonl": split[name] for name in SPLITS if split[name]}
    if existing := next((folder / f"{name}.jsonl" for name in SPLITS if (folder / f"{name}.jsonl").exists()), None):
        raise DataError(f"{existing} exists: delete it, or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for file, examples in files.items():
        atomic_write(file, "".join(dump_json(_to_row(one)) + "\n" for one in examples))
    return list(files)


def _to_row(example: Example) -> dict[str, object]:
    named = {"id": example.id, "audio": example.audio, "text": example.text, "duration_s": example.duration_s}
    offset = {"offset": example.offset_s} if example.is_excerpt or example.offset_s else {}
    return named | offset | dict(example.tags)


def _build_corpus(examples: tuple[Example, ...], sizes: Mapping[Split, str], seed: int) -> _Corpus:
    durations = [max(0.0, one.duration_s) if math.isfinite(one.duration_s) else 0.0 for one in examples]
    notes: list[str] = []
    targets: dict[Split, float] = {}
    weights: dict[Split, Sequence[float]] = {}
    for split, size in sizes.items():
        match = _SIZE.fullmatch(size.strip())
        if match is None:
            raise DataError(f'{split}: {size!r} is no size: write "5%", "2h", "30min" or a number of recordings')
        number, unit = float(match[1]), match[2]
        by_count = not unit
        if unit == "%" and examples and not all(durations):
            by_count, unknown = True, durations.count(0.0)
            notes = [f"{unknown} of {len(examples)} recordings have no duration: percentages are of the recordings"]
        weights[split] = [1.0] * len(examples) if by_count else durations
        scale = {"%": sum(weights[split]) / 100, "h": 3600.0, "min": 60.0, "": 1.0}[unit]
        targets[split] = number * scale
        if targets[split] and targets[split] >= sum(weights[split]):
            raise DataError(f"{split}: {size} leaves nothing of {len(examples)} recordings to train on")
    sentences = (normalize_text(example.text) or f"\0{number}" for number, example in enumerate(examples))
    speakers = map(speaker_of, examples)
    return _Corpus(examples, tuple(speakers), tuple(sentences), targets, weights, seed, tuple(notes))


def _find_components(corpus: _Corpus) -> tuple[str, ...]:
    """Return for each recording its component, named after the speaker in it that is first by hash; "" has no speaker.

    Union-find over speakers and sentences, with path halving.
    """
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def find(node: tuple[str, str]) -> tuple[str, str]:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = node = parent[parent[node]]
        return node

    for speaker, sentence in zip(corpus.speakers, corpus.sentences, strict=True):
        parent[find(("speaker", speaker))] = find(("sentence", sentence))
    named: dict[tuple[str, str], str] = {}
    for speaker in sorted(set(corpus.speakers), key=lambda name: (bool(name), corpus.rank(name))):
        named.setdefault(find(("speaker", speaker)), speaker)
    return tuple(named[find(("speaker", speaker))] for speaker in corpus.speakers)


def _assign(corpus: _Corpus, names: Sequence[str], *, strict: bool = True) -> list[Split]:
    """Assign whole groups of recordings with the same name to splits; those named "" to train.

    With `strict`, raises DataError if a requested split stays empty.
    """
    groups = corpus.group(names)
    splits = ["train"] * len(names)
    for name, split in _choose(corpus, groups, corpus.targets).items():
        for index in groups[name]:
            splits[index] = split
    empty = [split for split in SPLITS if split not in splits and corpus.targets.get(split, 1.0)]
    if strict and empty:
        raise DataError(f"{len(groups)} groups of recordings are too few: nothing is left for {', '.join(empty)}")
    return splits


def _choose(corpus: _Corpus, groups: Mapping[str, Sequence[int]], targets: Mapping[Split, float]) -> dict[str, Split]:
    """Return the groups of dev and test: each next one that brings the size closer to the target, else the smallest."""
    ranked = sorted((name for name in groups if name), key=corpus.rank)
    chosen: dict[str, Split] = {}
    for split, order in (("test", ranked), ("dev", ranked[::-1])):
        target, taken = targets[split], 0.0
        if not target:
            continue
        sizes = {name: corpus.weigh(split, groups[name]) for name in order if name not in chosen}
        for name, size in sizes.items():
            if len(sizes) > 1 and abs(taken + size - target) < abs(taken - target):
                chosen[name] = split
                taken += size
        if not taken and len(sizes) > 1:
            chosen[min(sizes, key=sizes.__getitem__)] = split
    return chosen


def _is_acceptable(corpus: _Corpus, splits: Sequence[Split]) -> bool:
    """Whether dev and test have at least `MIN_RATIO` of their sizes, and train most of what was not dropped."""
    for split, target in corpus.targets.items():
        size = corpus.weigh(split, (index for index, one in enumerate(splits) if one == split))
        if size < MIN_RATIO * target:
            return False
    return splits.count("train") >= max(1.0, MIN_TRAIN_RATIO * (len(splits) - splits.count("")))


def _drop_conflicts(corpus: _Corpus) -> list[Split]:
    """Assign speakers and sentences to splits, and drop the recordings whose speaker and sentence are not in the same.

    Where everybody reads everything, a share p of the recordings is kept for a split with a share a of the speakers and
    p/a of the sentences; the fewest are dropped with a = √p. Where most sentences have one speaker, a = p is best. Some
    exponents between are tried.
    """
    by_speaker, by_sentence = corpus.group(corpus.speakers), corpus.group(corpus.sentences)
    attempts = []
    for exponent in EXPONENTS:
        targets = {
            split: total * (target / total) ** exponent if (total := sum(corpus.weights[split])) else 0.0
            for split, target in corpus.targets.items()
        }
        speaker_split = _choose(corpus, by_speaker, targets)
        sentence_split = _place_sentences(corpus, by_sentence, speaker_split)
        splits = [
            speaker_split.get(speaker, "train") if speaker_split.get(speaker, "train") == sentence_split[text] else ""
            for speaker, text in zip(corpus.speakers, corpus.sentences, strict=True)
        ]
        attempts.append((not _is_acceptable(corpus, splits), splits.count(""), splits))
    missed, _, best = min(attempts, key=lambda attempt: attempt[:2])
    empty = [split for split in SPLITS if split not in best and corpus.targets.get(split, 1.0)]
    if missed and empty:
        raise DataError(
            f"disjoint: both: {len(by_speaker)} speakers and {len(by_sentence)} sentences are too few: nothing is left"
            f" for {', '.join(empty)}; use speakers or sentences"
        )
    return best


def _place_sentences(
    corpus: _Corpus, by_sentence: Mapping[str, Sequence[int]], speaker_split: Mapping[str, Split]
) -> dict[str, Split]:
    """Assign sentences to the split of their speakers; if these are in several, to one that is too small, or train."""
    placed: dict[str, Split] = {}
    sizes = dict.fromkeys(corpus.targets, 0.0)
    contested: list[tuple[str, dict[Split, list[int]]]] = []
    for sentence in sorted(by_sentence, key=corpus.rank):
        members: dict[Split, list[int]] = defaultdict(list)
        for index in by_sentence[sentence]:
            members[speaker_split.get(corpus.speakers[index], "train")].append(index)
        if len(members) > 1:
            contested.append((sentence, members))
            continue
        (split,) = members
        placed[sentence] = split
        if split in sizes:
            sizes[split] += corpus.weigh(split, members[split])
    for sentence, members in contested:
        filled = {
            split: sizes[split] / target
            for split, target in corpus.targets.items()
            if split in members and sizes[split] < target
        }
        split = min(filled, key=filled.__getitem__) if filled else "train" if "train" in members else min(members)
        placed[sentence] = split
        if split in sizes:
            sizes[split] += corpus.weigh(split, members[split])
    return placed


def _finish(corpus: _Corpus, splits: Sequence[Split], notes: tuple[str, ...]) -> CorpusSplit:
    parts = {
        name: tuple(example for example, split in zip(corpus.examples, splits, strict=True) if split == name)
        for name in (*SPLITS, "")
    }
    notes += corpus.notes
    untagged = corpus.speakers.count("")
    disjoint = tuple(
        kind
        for kind, names in (("speakers", corpus.speakers), ("sentences", corpus.sentences))
        if any(names) and _is_disjoint(names, splits)
    )
    if 0 < untagged < len(splits) and "speakers" in disjoint:
        notes += (f"{untagged} recordings have no speaker and are in train",)
    return CorpusSplit(parts["train"], parts["dev"], parts["test"], tuple(e.id for e in parts[""]), disjoint, notes)


def _is_disjoint(names: Sequence[str], splits: Sequence[Split]) -> bool:
    seen: dict[str, Split] = {}
    return all(seen.setdefault(name, split) == split for name, split in zip(names, splits, strict=True) if split)
