"""Run a transcription stream over a live source, with times on the source's clock and the latency of every word."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mowa.data.inputs.source import AudioBlock, BufferedSource
from mowa.decode.stream import TranscriptionStream
from mowa.errors import AudioError
from mowa.types import Segment


@dataclass(frozen=True, slots=True)
class TimedSegment:
    """A segment with times of the source, in seconds.

    `processed_s` is how much audio had been processed; `latency_s` the time since the end of its last word was
    recorded, None for a segment without words.
    """

    segment: Segment
    processed_s: float
    latency_s: float | None


class StreamSession:
    """A stream fed from a source; it tracks compute time, latency and lost audio.

    Where audio was lost, the stream is flushed and later segments are shifted by the length of the gap.
    """

    def __init__(self, stream: TranscriptionStream) -> None:
        self.stream = stream
        self.compute_s = self.lost_s = 0.0
        self.latency_s: float | None = None  # of the latest words
        self._captures: deque[tuple[float, float]] = deque(maxlen=8192)  # (end of block, when it was recorded)

    @property
    def processed_s(self) -> float:
        return self.stream.received_s + self.lost_s

    def events(self, blocks: BufferedSource) -> Iterator[list[TimedSegment]]:
        """Yield the segments that each block brings, often none; at the end, and before an AudioError, the open ones.

        Raises AudioError as the source does.
        """
        failure = None
        try:
            for block in blocks:
                yield self._feed(block)
        except AudioError as error:
            failure = error
        yield self._with_times(time.monotonic(), self.stream.close())
        if failure is not None:
            raise failure

    def _feed(self, block: AudioBlock) -> list[TimedSegment]:
        flushed = []
        if block.lost_s:
            flushed = self._with_times(time.monotonic(), self.stream.flush())
            self.lost_s += block.lost_s
        started_s = time.monotonic()
        found = self.stream.feed(block.samples)
        if len(block.samples):
            self._captures.append((self.processed_s, block.captured_at_s))
        return flushed + self._with_times(started_s, found)

    def _with_times(self, started_s: float, found: list[Segment]) -> list[TimedSegment]:
        now_s = time.monotonic()
        self.compute_s += now_s - started_s
        events = []
        for segment in found:
            shifted = _shift(segment, self.lost_s)
            latency_s = max(0.0, now_s - self._recorded_at_s(shifted.end_s)) if shifted.words else None
            self.latency_s = self.latency_s if latency_s is None else latency_s
            events.append(TimedSegment(shifted, self.processed_s, latency_s))
        return events

    def _recorded_at_s(self, position_s: float) -> float:
        """Return when the audio at `position_s` was recorded, interpolated within its block."""
        later_end_s, later_s = self._captures[-1]
        for end_s, captured_s in reversed(self._captures):
            if end_s < position_s:
                fraction = min(1.0, (position_s - end_s) / (later_end_s - end_s)) if later_end_s > end_s else 1.0
                return captured_s + fraction * (later_s - captured_s)
            later_end_s, later_s = end_s, captured_s
        return later_s


def _shift(segment: Segment, by_s: float) -> Segment:
    if not by_s:
        return segment
    words = tuple(replace(word, start_s=word.start_s + by_s, end_s=word.end_s + by_s) for word in segment.words)
    return replace(segment, start_s=segment.start_s + by_s, end_s=segment.end_s + by_s, words=words)
