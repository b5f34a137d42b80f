"""Place decoded audio by the timestamps of its container: holes are silence, and time 0 is where the container starts.

Recordings of calls, of muted participants and of broken connections (WebRTC, Opus with DTX, RTMP) leave audio out and
continue with later timestamps. As FFmpeg's `aresample=async=1` does, a hole is filled with silence once the audio lags
behind its timestamps by more than `MIN_HOLE_S`; nothing is removed where timestamps go back. The delay of encoders
(AAC priming, Opus pre-skip) is before the first decoded frame, so it is never a hole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

MIN_HOLE_S = 0.1  # as FFmpeg's min_hard_comp: Matroska and FLV round timestamps to 1 ms, and live encoders by more
MAX_HOLES_S = 24 * 3600.0  # all holes of a recording, or one of a live stream; a jump beyond that is an error
RESTART_S = 1.0  # timestamps that go back this far are those of another recording, whose clock starts again
FORMATS_WITH_TIMESTAMPS = frozenset({"asf", "flv", "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2", "mpeg", "mpegts", "ogg"})

_SILENCE_S = 1.0  # longest piece of silence made at once


class Timeline:
    """Where the next frame of a recording belongs. Frames are passed in the order in which they are decoded.

    position_s  end of the audio so far, silence included, from the start of the recording
    ignored_s   sum of the jumps that were taken for wrong timestamps
    """

    def __init__(
        self,
        start_s: float | None = None,
        is_hole: Callable[[], bool] = lambda: True,
        *,
        chained: bool = False,
        live: bool = False,
    ) -> None:
        """Begin at timestamp `start_s`, or (None) at the first frame.

        `is_hole` is called once, at the first hole: False means that audio was lost there, and timestamps are ignored.
        Where they go back in a `chained` format (Ogg), another recording begins, which is no error. A `live` stream may
        have any number of holes.
        """
        self.position_s = self.ignored_s = 0.0
        self._zero_s = start_s  # timestamp of position 0
        self._is_hole, self._chained, self._live = cache(is_hole), chained, live
        self._holes_s = self._longest_s = self._back_s = 0.0
        self._num_holes = 0
        self._back_at_s = self._ignored_at_s = 0.0

    def place(self, timestamp_s: float | None, duration_s: float) -> float:
        """Advance by a frame and return the seconds of silence before it; None is a frame without a timestamp."""
        hole_s = 0.0 if timestamp_s is None else self._hole_s(timestamp_s)
        self.position_s += hole_s + duration_s
        return hole_s

    def warnings(self) -> list[str]:
        """Return what a user should know about the timestamps so far, as sentences without a subject."""
        found = []
        if self._longest_s >= RESTART_S:
            places = "place" if self._num_holes == 1 else "places"
            found.append(
                f"has no audio for {self._holes_s:.1f} s in {self._num_holes} {places}, by its timestamps: counted as"
                " silence"
            )
        if self._back_s:
            found.append(
                f"has timestamps that go back by {self._back_s:.1f} s at {self._back_at_s:.1f} s: all audio is kept,"
                " and later times are counted from there"
            )
        if self.ignored_s:
            found.append(
                f"has a timestamp that jumps by {self.ignored_s / 3600:.1f} h at {self._ignored_at_s:.1f} s: ignored,"
                f" since holes of more than {MAX_HOLES_S / 3600:g} h are taken for an error"
            )
        return found

    def _hole_s(self, timestamp_s: float) -> float:
        first = not self.position_s
        if self._zero_s is None or (first and abs(timestamp_s - self._zero_s) <= MIN_HOLE_S):
            self._zero_s = timestamp_s - self.position_s
        ahead_s = timestamp_s - self._zero_s - self.position_s
        if ahead_s < -MIN_HOLE_S:
            self._go_back(-ahead_s, timestamp_s, first)
        if ahead_s <= MIN_HOLE_S or not self._is_hole():
            return 0.0
        if ahead_s + (0.0 if self._live else self._holes_s) > MAX_HOLES_S:
            self._ignored_at_s = self._ignored_at_s or self.position_s
            self.ignored_s += ahead_s
            self._zero_s = timestamp_s - self.position_s
            return 0.0
        self._holes_s += ahead_s
        if not first:  # audio that begins late is common where there is a picture
            self._longest_s, self._num_holes = max(self._longest_s, ahead_s), self._num_holes + 1
        return ahead_s

    def _go_back(self, by_s: float, timestamp_s: float, first: bool) -> None:
        """Note an overlap; after a clock that starts again, later timestamps are relative to it."""
        if by_s >= RESTART_S or first or self._chained:
            self._zero_s = timestamp_s - self.position_s
        if by_s > self._back_s and not (first or self._chained):
            self._back_s, self._back_at_s = by_s, self._back_at_s or self.position_s


def find_start_s(container: Any) -> float | None:
    """Return when an open PyAV container starts, by timestamp; None if its first audio stream is the first to start.

    Attached pictures, subtitles and data have no part in this.
    """
    from av.stream import Disposition

    track = container.streams.audio[0]
    others_s = [
        float(stream.start_time * stream.time_base)
        for stream in (*container.streams.audio[1:], *container.streams.video)
        if stream.start_time is not None and not stream.disposition & Disposition.attached_pic
    ]
    if not others_s:
        return None
    # FFmpeg gives a stream of which it saw no packet yet, behind a large picture, the start of the container.
    later_s = math.inf if track.start_time is None else float(track.start_time * track.time_base) - min(others_s)
    return min(others_s) if later_s == 0 or later_s > MIN_HOLE_S else None


def silence_pieces(hole_s: float, rate_hz: int) -> Iterator[int]:
    """Yield the numbers of samples of pieces of silence that add up to `hole_s`."""
    left, longest = round(hole_s * rate_hz), round(_SILENCE_S * rate_hz)
    while left > 0:
        yield min(left, longest)
        left -= longest
