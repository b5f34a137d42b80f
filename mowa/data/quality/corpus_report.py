"""What is in a corpus and what is wrong with it, from one pass over its recordings.

It hears every recording and mends none; it refuses to know where recordings are listed (`sources`) and how a report
looks (`cli.data`). Two recordings sound the same where the mean of their channels, rounded to 16 bits, is the same at
the same rate, whatever container or name they have; MP3, Ogg and the like are compared as decoded. Two texts are the
same where their letters and digits are, in any case. Memory: a hash of 8 bytes for each sound and text, with the ids
that `sources.entries` holds anyway.
"""

from __future__ import annotations

import heapq
import math
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from statistics import median

import numpy as np

from mowa.data import audio
from mowa.data.audio.decoders import AudioBytes, AudioInfo
from mowa.errors import AudioError, MowaError
from mowa.types import Example

MAX_EXAMPLES = 20  # of what is wrong, so many are named; all are counted
CLIPPING_LEVEL = 0.999  # a sample so near the end of its range may be cut
MIN_CLIPPED_RUN = 3  # so many of them in a row are
MAX_CLIPPED_RATIO = 1e-4  # and so many samples in such runs make a clipped recording
OUTLIER_SIGMAS = 5.0  # robust standard deviations of log(letters per second) from the median
MIN_LOG_SPREAD = 0.1  # of that logarithm: less, where texts are read by a machine, would make outliers of nothing
RARE_CHAR_RATIO = 1e-4  # letters that are fewer of all

DURATION_BINS_S = (1, 2, 5, 10, 15, 20, 30, 60, 600)


@dataclass(frozen=True, slots=True)
class Issues:
    """How many recordings something is the matter with, and the first of them: (id, what)."""

    count: int = 0
    examples: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class CorpusReport:
    """What one split holds. Lengths in seconds; Counters by name, the most frequent first.

    lengths_s: (shortest, median, longest). histogram: upper ends in words → recordings. letters: letter in small → how
    often. odd: recordings whose letters per second are far from `pace`, their median. `sounds` and `texts`: hash → the
    id that had it first.
    """

    recordings: int
    total_duration_s: float
    min_median_max_s: tuple[float, float, float]
    duration_histogram: Mapping[str, int]
    sample_rates_hz: Mapping[int, int]
    channels: Mapping[int, int]
    formats: Mapping[str, int]
    languages: Mapping[str, int]
    speakers: Mapping[str, int]
    characters: Mapping[str, int]
    rare_characters: tuple[str, ...]
    median_chars_per_s: float
    unreadable: Issues
    empty_text: Issues
    silent: Issues
    clipped: Issues
    duplicate_audio: Issues
    duplicate_text: Issues
    chars_per_s_outliers: Issues
    audio_hashes: Mapping[int, str] = field(repr=False, default_factory=dict)
    text_hashes: Mapping[int, str] = field(repr=False, default_factory=dict)


@dataclass(frozen=True, slots=True)
class SplitOverlap:
    """What stands in two splits: recordings and texts (id in the one, id in the other), and speakers."""

    audio: Issues
    texts: Issues
    speakers: Issues


def check_corpus(
    examples: Iterable[Example], *, on_progress: Callable[[float], object] = lambda seconds: None
) -> CorpusReport:
    """Hear every recording once. `heard` is called with the seconds of each, for progress.

    Raises nothing: what cannot be read is `unreadable`, and so is, under the id "", a source that breaks off.
    """
    tally = _Tally()
    for example in tally.until_broken(examples):
        tally.add_text(example)
        try:
            sound = _Sound.of(example)
        except MowaError as wrong:
            tally.issues["unreadable"].add(example.id, str(wrong))
            continue
        tally.add_audio(example, sound)
        on_progress(sound.seconds)
    return tally.report()


def compare_reports(one: CorpusReport, other: CorpusReport) -> SplitOverlap:
    """Recordings, texts and speakers that are in both."""
    return SplitOverlap(
        _in_both(one.audio_hashes, other.audio_hashes),
        _in_both(one.text_hashes, other.text_hashes),
        _in_both({name: str(count) for name, count in one.speakers.items()}, other.speakers, names=True),
    )


def _in_both(one: Mapping, other: Mapping, *, names: bool = False) -> Issues:
    found = _Pile()
    for key in one:
        if key in other:
            found.add(str(key) if names else one[key], "" if names else other[key])
    return found.findings()


# --- one recording ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Sound:
    """What its samples say: length, hash, whether it is silent or clipped."""

    info: AudioInfo
    samples: int = 0
    total: float = 0.0
    squares: float = 0.0
    clipped: int = 0
    key: int = 0

    @classmethod
    def of(cls, example: Example) -> _Sound:
        if example.audio_bytes is None and "://" in example.audio:
            raise AudioError(f"{example.audio}: is an address, and none is opened here. Fetch it first.")
        source = Path(example.audio) if example.audio_bytes is None else AudioBytes(example.audio, example.audio_bytes)
        sound = cls(audio.probe_audio(source))
        digest = blake2b(str(sound.info.rate_hz).encode(), digest_size=8)
        length_s = example.duration_s if example.is_excerpt else None
        for block in audio.stream_audio(source, sound.info.rate_hz, offset_s=example.offset_s, duration_s=length_s):
            wide = block.astype(np.float64)
            sound.samples += len(block)
            sound.total += float(wide.sum())
            sound.squares += float(np.dot(wide, wide))
            sound.clipped += _cut_samples(block)
            digest.update(np.round(block * 2**15).astype("<i4").tobytes())
        sound.key = int.from_bytes(digest.digest(), "little")
        return sound

    @property
    def seconds(self) -> float:
        return self.samples / self.info.rate_hz

    @property
    def silent(self) -> bool:
        power = self.squares / self.samples - (self.total / self.samples) ** 2
        return power < 10 ** (audio.SILENCE_DBFS / 10)


def _cut_samples(block: audio.Samples) -> int:
    """How many samples are at full scale with neighbours that are."""
    edges = np.flatnonzero(np.diff(np.r_[0, np.abs(block) >= CLIPPING_LEVEL, 0]))
    runs = edges[1::2] - edges[::2]
    return int(runs[runs >= MIN_CLIPPED_RUN].sum())


def _key(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _plain(text: str) -> str:
    """Letters and digits in small, words parted by one space."""
    text = unicodedata.normalize("NFC", text).casefold()
    return " ".join("".join(letter if letter.isalnum() else " " for letter in text).split())


# --- all of them ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Pile:
    count: int = 0
    named: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, why: str) -> None:
        self.count += 1
        if len(self.named) < MAX_EXAMPLES:
            self.named.append((name, why))

    def findings(self) -> Issues:
        return Issues(self.count, tuple(self.named))


class _Tally:
    """What is known after some recordings. Lengths and paces are numbers in arrays; of paces the ends have names."""

    def __init__(self) -> None:
        self.recordings = 0
        self.lengths, self.paces = array("f"), array("f")
        self.slowest: list[tuple[float, str]] = []
        self.fastest: list[tuple[float, str]] = []
        self.counts: dict[str, Counter] = {name: Counter() for name in ("rate", "channels", "format", "letters")}
        self.tags: dict[str, Counter[str]] = {"language": Counter(), "speaker": Counter()}
        kinds = ("unreadable", "without_text", "silent", "clipped", "same_sound", "same_text")
        self.issues = {kind: _Pile() for kind in kinds}
        self.sounds: dict[int, str] = {}
        self.texts: dict[int, str] = {}

    def until_broken(self, examples: Iterable[Example]) -> Iterator[Example]:
        try:
            for example in examples:
                self.recordings += 1
                yield example
        except MowaError as wrong:
            self.issues["unreadable"].add("", str(wrong))

    def add_text(self, example: Example) -> None:
        for tag, counter in self.tags.items():
            if value := example.tags.get(tag):
                counter[value] += 1
        plain = _plain(example.text)
        if not plain:
            self.issues["without_text"].add(example.id, "")
            return
        self.counts["letters"].update(letter for letter in plain if letter.isalpha())
        first = self.texts.setdefault(_key(plain), example.id)
        if first != example.id:
            self.issues["same_text"].add(example.id, first)

    def add_audio(self, example: Example, sound: _Sound) -> None:
        info = sound.info
        self.lengths.append(sound.seconds)
        self.counts["rate"][info.rate_hz] += 1
        self.counts["channels"][info.channels] += 1
        self.counts["format"][info.format] += 1
        if sound.silent:
            self.issues["silent"].add(example.id, "")
        else:
            first = self.sounds.setdefault(sound.key, example.id)
            if first != example.id:
                self.issues["same_sound"].add(example.id, first)
        if sound.clipped > MAX_CLIPPED_RATIO * sound.samples:
            self.issues["clipped"].add(example.id, f"{sound.clipped / sound.samples:.2%} of its samples")
        if letters := len(_plain(example.text).replace(" ", "")):
            pace = letters / sound.seconds
            self.paces.append(pace)
            for ends, value in ((self.slowest, -pace), (self.fastest, pace)):
                heapq.heappush(ends, (value, example.id))
                if len(ends) > MAX_EXAMPLES:
                    heapq.heappop(ends)

    def report(self) -> CorpusReport:
        letters = self.counts["letters"]
        few = RARE_CHAR_RATIO * letters.total()
        pace, odd = self._odd()
        bounds = [f"up to {bound} s" for bound in DURATION_BINS_S] + [f"over {DURATION_BINS_S[-1]} s"]
        histogram = Counter(np.searchsorted(DURATION_BINS_S, np.asarray(self.lengths)).tolist())
        lengths = self.lengths or array("f", [0.0])
        shortest, middle, longest = min(lengths), median(lengths), max(lengths)
        return CorpusReport(
            recordings=self.recordings,
            total_duration_s=round(math.fsum(self.lengths), 3),
            min_median_max_s=(round(shortest, 3), round(middle, 3), round(longest, 3)),
            duration_histogram={bounds[place]: histogram[place] for place in sorted(histogram)},
            sample_rates_hz=dict(self.counts["rate"].most_common()),
            channels=dict(self.counts["channels"].most_common()),
            formats=dict(self.counts["format"].most_common()),
            languages=dict(self.tags["language"].most_common()),
            speakers=dict(self.tags["speaker"].most_common()),
            characters=dict(letters.most_common()),
            rare_characters=tuple(letter for letter, count in letters.most_common() if count == 1 or count < few),
            median_chars_per_s=round(pace, 3),
            chars_per_s_outliers=odd,
            audio_hashes=self.sounds,
            text_hashes=self.texts,
            **{kind: pile.findings() for kind, pile in self.issues.items()},
        )

    def _odd(self) -> tuple[float, Issues]:
        """The median of letters per second, and those too far from it: by the median of distances (MAD) of the
        logarithm, which a few wrong texts do not move."""
        if not self.paces:
            return 0.0, Issues()
        logs = np.log(np.asarray(self.paces))
        middle = float(np.median(logs))
        spread = max(MIN_LOG_SPREAD, 1.4826 * float(np.median(np.abs(logs - middle))))
        count = int((np.abs(logs - middle) > OUTLIER_SIGMAS * spread).sum())
        paces = sorted({(abs(value), name) for value, name in (*self.slowest, *self.fastest)})
        far = [(pace, name) for pace, name in paces if abs(math.log(pace) - middle) > OUTLIER_SIGMAS * spread]
        far.sort(key=lambda pair: -abs(math.log(pair[0]) - middle))
        return math.exp(middle), Issues(
            count, tuple((name, f"{pace:.1f} letters a second") for pace, name in far[:MAX_EXAMPLES])
        )
