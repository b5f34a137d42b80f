"""Live sound, and the moments when it was recorded: of a file, an address, or what `piped` and `microphones` open.

`Bounded` stands between a source, which runs in a thread of its own, and who hears it. A source that can wait stands
still while nobody takes its blocks: files, pipes, HTTP. One that cannot, as a microphone, goes on; where too much is
held then it is dropped, and counted.

This file knows nothing of models or text, and it mends nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Thread
from typing import NamedTuple

import numpy as np
import soxr

from mowa.data import audio
from mowa.data.audio.decoders import Samples
from mowa.errors import AudioError

BLOCK_S = 0.032  # at most; what the speech detector judges at once
FILE_BUFFER_S, LIVE_BUFFER_S = 2.0, 60.0  # how much is held of a source that waits, and of one that does not


RESAMPLE_QUALITY = "HQ"  # of soxr: what it makes of 48 kHz comes 37 ms late, VHQ's 77 ms


# A playlist, or the description of a session, may name other addresses, but no file of this machine.


_POLL_S = 0.1  # whoever waits looks up so often: `finish` wakes nobody


@dataclass(frozen=True, slots=True)
class AudioBlock:
    """float32 [n] of full scale ±1. `recorded_s`: when the last sample was recorded, or came, by `time.monotonic`.

    `lost_s` is how much sound there was between the block before and this one, which nobody can hear any more.
    """

    samples: Samples
    captured_at_s: float
    lost_s: float = 0.0


class AudioChunk(NamedTuple):
    """As a `Block`, of any length and at a rate of its own."""

    samples: Samples
    rate_hz: int
    captured_at_s: float
    lost_s: float = 0.0

    @property
    def duration_s(self) -> float:
        return len(self.samples) / self.rate_hz


AudioChunks = Generator[AudioChunk, None, None]


@dataclass(frozen=True, slots=True)
class AudioSource:
    """`pieces(rate_hz)` opens it, and gives its sound, at that rate where it can. AudioError for what goes wrong.

    waits  it stands still while nobody takes its pieces
    ends   it ends by itself, so that whoever stops it earlier has not heard all
    """

    name: str
    open_stream: Callable[[int], AudioChunks]
    pausable: bool = True
    finite: bool = True


class BufferedSource:
    """A source that runs in a thread of its own from `with` on, of which at most `limit_s` are held.

    Iterating gives it as blocks of `rate_hz`, and at the end raises what the source raised. `finish` may be called from
    a signal handler: nothing more is taken of the source, and what is held still comes. `dropped_s` is how much never
    came.
    """

    def __init__(self, source: AudioSource, rate_hz: int = 16_000, max_buffer_s: float | None = None) -> None:
        self.source, self.rate_hz = source, rate_hz
        self.buffered_s = self.dropped_s = 0.0
        self._limit_s = max_buffer_s or (FILE_BUFFER_S if source.pausable else LIVE_BUFFER_S)
        self._held: deque[AudioChunk] = deque()
        self._gap_s = 0.0  # dropped before the first one that is held
        self._failure: BaseException | None = None
        self._over = self._finished = False
        self._change = Condition()
        self._thread = Thread(target=self._read, name=f"mowa {source.name}", daemon=True)

    def stop(self) -> None:
        self._finished = True

    def __enter__(self) -> BufferedSource:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join(1.0)  # one that waits for a pipe or a network may go on, and ends with the program

    def __iter__(self) -> Iterator[AudioBlock]:
        return _blocks(self._pieces(), self.rate_hz)  # here and not in the thread, which may be left with what it holds

    def _pieces(self) -> Iterator[AudioChunk]:
        while (piece := self._take()) is not None:
            yield piece
        if self._failure is not None:
            raise self._failure

    def _take(self) -> AudioChunk | None:
        with self._change:
            while not self._held:
                if self._over or self._finished:
                    return None
                self._change.wait(_POLL_S)
            piece, gap_s = self._held.popleft(), self._gap_s
            self.buffered_s = self.buffered_s - piece.duration_s if self._held else 0.0
            self._gap_s = 0.0
            self._change.notify_all()
        return piece._replace(lost_s=piece.lost_s + gap_s)

    def _read(self) -> None:
        failure: BaseException | None = None
        try:
            with closing(self.source.open_stream(self.rate_hz)) as pieces:
                for piece in pieces:
                    if not self._put(piece):
                        break
        except OSError as wrong:
            failure = AudioError(f"{self.source.name}: cannot be read ({wrong.strerror or wrong})")
        except BaseException as wrong:  # whoever hears is told
            failure = wrong
        with self._change:
            self._failure, self._over = None if self._finished else failure, True  # what is stopped may end badly
            self._change.notify_all()

    def _put(self, piece: AudioChunk) -> bool:
        """False: nobody wants any more."""
        with self._change:
            while self._held and self.buffered_s + piece.duration_s > self._limit_s and not self._finished:
                if self.source.pausable:
                    self._change.wait(_POLL_S)
                else:  # all at once, so that what follows is heard in one piece
                    self.dropped_s += self.buffered_s
                    self._gap_s += self.buffered_s + sum(one.lost_s for one in self._held)
                    self._held.clear()
                    self.buffered_s = 0.0
            if self._finished:
                return False
            self._held.append(piece)
            self.buffered_s += piece.duration_s
            self._change.notify_all()
        return True


def open_file(path: Path | str) -> AudioSource:
    """A file, as fast as it is heard. AudioError at once where its header is wrong."""
    audio.probe_audio(path)

    def pieces(rate_hz: int) -> AudioChunks:
        for samples in audio.stream_audio(path, rate_hz, block_s=BLOCK_S):
            yield AudioChunk(samples, rate_hz, time.monotonic())

    return AudioSource(str(path), pieces)


def open_realtime_file(path: Path | str, speed: float = 1.0) -> AudioSource:
    """A file as if it were said now: a piece comes when its last sample would have been recorded.

    Moments are counted from the beginning, so that they do not drift. Who hears too slowly finds pieces waiting, with
    the moments when they should have come. `speed` 2 says it in half the time.
    """
    audio.probe_audio(path)

    def pieces(rate_hz: int) -> AudioChunks:
        begun_s, position = time.monotonic(), 0
        for samples in audio.stream_audio(path, rate_hz, block_s=BLOCK_S):
            position += len(samples)
            due_s = begun_s + position / (rate_hz * speed)
            if (early_s := due_s - time.monotonic()) > 0:
                time.sleep(early_s)
            yield AudioChunk(samples, rate_hz, due_s)

    return AudioSource(str(path), pieces)


# --- the stations of a stream -----------------------------------------------------------------------------------------


def _blocks(pieces: Iterable[AudioChunk], rate_hz: int) -> Iterator[AudioBlock]:
    """Pieces as blocks of `BLOCK_S` at most, all at `rate_hz`."""
    size = round(BLOCK_S * rate_hz)
    lost_s = 0.0
    for piece in _at_rate(pieces, rate_hz):
        lost_s += piece.lost_s
        for start in range(0, len(piece.samples), size):
            yield AudioBlock(piece.samples[start : start + size], piece.captured_at_s, lost_s)
            lost_s = 0.0
    if lost_s:
        yield AudioBlock(np.zeros(0, np.float32), time.monotonic(), lost_s)


def _at_rate(pieces: Iterable[AudioChunk], rate_hz: int) -> Iterator[AudioChunk]:
    """The same sound at one rate. That of the pieces may change, or they fail: what a resampler holds comes before."""
    resampler: soxr.ResampleStream | None = None
    from_hz, none, last_s = rate_hz, np.zeros(0, np.float32), time.monotonic()
    failure = None
    try:
        for piece in pieces:
            if piece.rate_hz != from_hz:
                if resampler is not None:
                    yield AudioChunk(resampler.resample_chunk(none, last=True), rate_hz, last_s)
                    resampler = None
                from_hz = piece.rate_hz
                if from_hz != rate_hz:
                    resampler = soxr.ResampleStream(from_hz, rate_hz, 1, dtype="float32", quality=RESAMPLE_QUALITY)
            last_s = piece.captured_at_s
            samples = piece.samples if resampler is None else resampler.resample_chunk(piece.samples)
            yield AudioChunk(samples, rate_hz, last_s, piece.lost_s)
    except AudioError as wrong:
        failure = wrong
    if resampler is not None:
        yield AudioChunk(resampler.resample_chunk(none, last=True), rate_hz, last_s)
    if failure is not None:
        raise failure
