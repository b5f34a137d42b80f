"""Decode all recordings of a corpus once and report its contents and problems.

Two recordings are duplicates if the mean of their channels, rounded to 16 bits, is equal at the same sample rate,
whatever their names and containers; lossy formats are compared as decoded. Two texts are duplicates if
`normalize_text` makes them equal. Memory: a hash of 8 bytes per recording and text, and the ids.
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
from mowa.data.text.normalize import compose, normalize_text
from mowa.errors import AudioError, MowaError
from mowa.types import Example

MAX_EXAMPLES = 20  # ids listed per issue; all are counted
CLIPPING_LEVEL = 0.999  # samples at least this large, relative to full scale,
MIN_CLIPPED_RUN = 3  # and this many in a row, count as clipped
MAX_CLIPPED_RATIO = 1e-4  # a recording with a larger share of clipped samples is reported
OUTLIER_SIGMAS = 5.0  # robust standard deviations of log(characters per second) from its median
MIN_LOG_SPREAD = 0.1  # lower bound of that deviation: synthetic speech varies so little that all would be outliers
RARE_CHAR_RATIO = 1e-4  # characters with a smaller share of the text are rare
DURATION_BINS_S = (1, 2, 5, 10, 15, 20, 30, 60, 600)


@dataclass(frozen=True, slots=True)
class Issues:
    """How many recordings have an issue, and the first ones as (id, detail)."""

    count: int = 0
    examples: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class CorpusReport:
    """Contents and issues of one split. Counts are sorted, the most frequent first.

    min_median_max_s      shortest, median and longest duration in seconds
    duration_histogram    bin, such as "up to 2 s" → recordings
    characters            letter or mark, in lower case → count
    median_chars_per_s    median of letters and digits per second of audio
    chars_per_s_outliers  recordings far from that median, whose texts may be wrong
    audio_hashes, text_hashes  hash → first id that has it
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
    """What two splits share: recordings and texts as (id in one, id in the other), and speakers."""

    audio: Issues
    texts: Issues
    speakers: Issues


def check_corpus(
    examples: Iterable[Example], *, on_progress: Callable[[float], object] = lambda seconds: None
) -> CorpusReport:
    """Decode every recording once; `on_progress` is called with the duration of each in seconds.

    Errors are not raised: recordings that cannot be read are counted as `unreadable`, and so is, with the id "", a
    source that fails.
    """
    tally = _Tally()
    for example in tally.until_error(examples):
        if example.error:
            tally.issues["unreadable"].add(example.id, example.error)
            continue
        tally.add_text(example)
        try:
            stats = _AudioStats.of(example)
        except MowaError as error:
            tally.issues["unreadable"].add(example.id, str(error))
            continue
        tally.add_audio(example, stats)
        on_progress(stats.duration_s)
    return tally.report()


def compare_reports(one: CorpusReport, other: CorpusReport) -> SplitOverlap:
    """Return the recordings, texts and speakers that are in both."""
    return SplitOverlap(
        _in_both(one.audio_hashes, other.audio_hashes),
        _in_both(one.text_hashes, other.text_hashes),
        _in_both({name: str(count) for name, count in one.speakers.items()}, other.speakers, names=True),
    )


def _in_both(one: Mapping, other: Mapping, *, names: bool = False) -> Issues:
    issues = _IssueList()
    for key in one:
        if key in other:
            issues.add(str(key) if names else one[key], "" if names else other[key])
    return issues.freeze()


# --- one recording ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _AudioStats:
    """Statistics and hash of the samples of one recording."""

    info: AudioInfo
    samples: int = 0
    total: float = 0.0
    sum_squares: float = 0.0
    clipped: int = 0
    hash: int = 0

    @classmethod
    def of(cls, example: Example) -> _AudioStats:
        if example.audio_bytes is None and "://" in example.audio:
            raise AudioError(f"{example.audio}: is a URL, and URLs are not read. Download it first.")
        source = Path(example.audio) if example.audio_bytes is None else AudioBytes(example.audio, example.audio_bytes)
        stats = cls(audio.probe_audio(source))
        digest = blake2b(str(stats.info.rate_hz).encode(), digest_size=8)
        duration_s = example.duration_s if example.is_excerpt else None
        for block in audio.stream_audio(source, stats.info.rate_hz, offset_s=example.offset_s, duration_s=duration_s):
            float64 = block.astype(np.float64)
            stats.samples += len(block)
            stats.total += float(float64.sum())
            stats.sum_squares += float(np.dot(float64, float64))
            stats.clipped += _count_clipped(block)
            digest.update(np.round(block * 2**15).astype("<i4").tobytes())
        stats.hash = int.from_bytes(digest.digest(), "little")
        return stats

    @property
    def duration_s(self) -> float:
        return self.samples / self.info.rate_hz

    @property
    def silent(self) -> bool:
        power = self.sum_squares / self.samples - (self.total / self.samples) ** 2
        return power < 10 ** (audio.SILENCE_DBFS / 10)


def _count_clipped(block: audio.Samples) -> int:
    """Count the samples in runs of at least `MIN_CLIPPED_RUN` at full scale."""
    edges = np.flatnonzero(np.diff(np.r_[0, np.abs(block) >= CLIPPING_LEVEL, 0]))
    runs = edges[1::2] - edges[::2]
    return int(runs[runs >= MIN_CLIPPED_RUN].sum())


def _hash_text(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


# --- all recordings ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _IssueList:
    count: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, detail: str) -> None:
        self.count += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append((name, detail))

    def freeze(self) -> Issues:
        return Issues(self.count, tuple(self.examples))


class _Tally:
    """Running counts. `speeds` are characters per second, of which only the extreme ones are kept with their ids."""

    def __init__(self) -> None:
        self.recordings = 0
        self.durations, self.speeds = array("f"), array("f")
        self.slowest: list[tuple[float, str]] = []
        self.fastest: list[tuple[float, str]] = []
        self.counts: dict[str, Counter] = {name: Counter() for name in ("rate", "channels", "format", "characters")}
        self.tags: dict[str, Counter[str]] = {"language": Counter(), "speaker": Counter()}
        kinds = ("unreadable", "empty_text", "silent", "clipped", "duplicate_audio", "duplicate_text")
        self.issues = {kind: _IssueList() for kind in kinds}
        self.audio_hashes: dict[int, str] = {}
        self.text_hashes: dict[int, str] = {}

    def until_error(self, examples: Iterable[Example]) -> Iterator[Example]:
        try:
            for example in examples:
                self.recordings += 1
                yield example
        except MowaError as error:
            self.issues["unreadable"].add("", str(error))

    def add_text(self, example: Example) -> None:
        for tag, counter in self.tags.items():
            if (value := example.tags.get(tag)) not in (None, ""):
                counter[compose(str(value))] += 1
        text = normalize_text(example.text)
        if not text:
            self.issues["empty_text"].add(example.id, "")
            return
        self.counts["characters"].update(c for c in text if unicodedata.category(c)[0] in "LM")
        first = self.text_hashes.setdefault(_hash_text(text), example.id)
        if first != example.id:
            self.issues["duplicate_text"].add(example.id, first)

    def add_audio(self, example: Example, stats: _AudioStats) -> None:
        info = stats.info
        self.durations.append(stats.duration_s)
        self.counts["rate"][info.rate_hz] += 1
        self.counts["channels"][info.channels] += 1
        self.counts["format"][info.format] += 1
        if stats.silent:
            self.issues["silent"].add(example.id, "")
        else:
            first = self.audio_hashes.setdefault(stats.hash, example.id)
            if first != example.id:
                self.issues["duplicate_audio"].add(example.id, first)
        if stats.clipped > MAX_CLIPPED_RATIO * stats.samples:
            self.issues["clipped"].add(example.id, f"{stats.clipped / stats.samples:.2%} of its samples")
        if characters := len(normalize_text(example.text).replace(" ", "")):
            speed = characters / stats.duration_s
            self.speeds.append(speed)
            for extreme, value in ((self.slowest, -speed), (self.fastest, speed)):
                heapq.heappush(extreme, (value, example.id))
                if len(extreme) > MAX_EXAMPLES:
                    heapq.heappop(extreme)

    def report(self) -> CorpusReport:
        characters = self.counts["characters"]
        rare_count = RARE_CHAR_RATIO * characters.total()
        median_speed, outliers = self._find_outliers()
        bins = [f"up to {bound} s" for bound in DURATION_BINS_S] + [f"over {DURATION_BINS_S[-1]} s"]
        histogram = Counter(np.searchsorted(DURATION_BINS_S, np.asarray(self.durations)).tolist())
        durations = self.durations or array("f", [0.0])
        shortest, middle, longest = min(durations), median(durations), max(durations)
        return CorpusReport(
            recordings=self.recordings,
            total_duration_s=round(math.fsum(self.durations), 3),
            min_median_max_s=(round(shortest, 3), round(middle, 3), round(longest, 3)),
            duration_histogram={bins[index]: histogram[index] for index in sorted(histogram)},
            sample_rates_hz=dict(self.counts["rate"].most_common()),
            channels=dict(self.counts["channels"].most_common()),
            formats=dict(self.counts["format"].most_common()),
            languages=dict(self.tags["language"].most_common()),
            speakers=dict(self.tags["speaker"].most_common()),
            characters=dict(characters.most_common()),
            rare_characters=tuple(c for c, count in characters.most_common() if count == 1 or count < rare_count),
            median_chars_per_s=round(median_speed, 3),
            chars_per_s_outliers=outliers,
            audio_hashes=self.audio_hashes,
            text_hashes=self.text_hashes,
            **{kind: issues.freeze() for kind, issues in self.issues.items()},
        )

    def _find_outliers(self) -> tuple[float, Issues]:
        """Return the median of characters per second, and the recordings far from it.

        Distances are measured by the median absolute deviation (MAD) of the logarithm, since a few wrong texts do not
        change it.
        """
        if not self.speeds:
            return 0.0, Issues()
        logs = np.log(np.asarray(self.speeds))
        middle = float(np.median(logs))
        spread = max(MIN_LOG_SPREAD, 1.4826 * float(np.median(np.abs(logs - middle))))
        count = int((np.abs(logs - middle) > OUTLIER_SIGMAS * spread).sum())
        speeds = sorted({(abs(value), name) for value, name in (*self.slowest, *self.fastest)})
        outliers = [(speed, name) for speed, name in speeds if abs(math.log(speed) - middle) > OUTLIER_SIGMAS * spread]
        outliers.sort(key=lambda pair: -abs(math.log(pair[0]) - middle))
        return math.exp(middle), Issues(
            count, tuple((name, f"{speed:.1f} characters/s") for speed, name in outliers[:MAX_EXAMPLES])
        )
