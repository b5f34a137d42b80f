"""Buffer live audio from a source that runs in its own thread, with the time at which each block was recorded.

`AudioSource` describes a source, `BufferedSource` runs it. A source that can pause (file, pipe, HTTP) waits while its
buffer is full; one that cannot, such as a microphone, drops the audio in the buffer and counts what was lost.
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

BLOCK_S = 0.032  # longest block: one frame of the voice activity detector
FILE_BUFFER_S, LIVE_BUFFER_S = 2.0, 60.0  # buffers of sources that can pause, and of those that cannot
RESAMPLE_QUALITY = "HQ"  # of soxr: delays 48 kHz audio by 37 ms, VHQ by 77 ms

_POLL_S = 0.1  # a waiting thread wakes this often, since `stop` notifies nobody


@dataclass(frozen=True, slots=True)
class AudioBlock:
    """Mono audio at the sample rate of its `BufferedSource`.

    samples        float32 [n], full scale ±1
    captured_at_s  `time.monotonic()` when the last sample was recorded or arrived
    lost_s         audio lost between the previous block and this one
    """

    samples: Samples
    captured_at_s: float
    lost_s: float = 0.0


class AudioChunk(NamedTuple):
    """Mono audio of any length, at its own sample rate. Fields as in `AudioBlock`."""

    samples: Samples
    rate_hz: int
    captured_at_s: float
    lost_s: float = 0.0

    @property
    def duration_s(self) -> float:
        """Duration in seconds."""
        return len(self.samples) / self.rate_hz


AudioChunks = Generator[AudioChunk, None, None]


@dataclass(frozen=True, slots=True)
class AudioSource:
    """A live source that has not been opened.

    open_stream  called with the requested sample rate, opens the source and yields its audio, at that rate if it can;
                 raises AudioError if that fails
    pausable     whether the source waits while nothing is taken from it
    finite       whether the source ends by itself
    """

    name: str
    open_stream: Callable[[int], AudioChunks]
    pausable: bool = True
    finite: bool = True


class BufferedSource:
    """Run a source in a thread, from entering the context manager, and iterate over its audio as blocks at `rate_hz`.

    At most `max_buffer_s` of audio is buffered. Iteration ends by raising what the source raised, if anything. `stop`
    may be called from a signal handler: nothing more is read, and what is buffered is still yielded.

    buffered_s  audio in the buffer, in seconds
    dropped_s   audio dropped so far, in seconds
    """

    def __init__(self, source: AudioSource, rate_hz: int = 16_000, max_buffer_s: float | None = None) -> None:
        self.source, self.rate_hz = source, rate_hz
        self.buffered_s = self.dropped_s = 0.0
        self._max_buffer_s = max_buffer_s or (FILE_BUFFER_S if source.pausable else LIVE_BUFFER_S)
        self._buffer: deque[AudioChunk] = deque()
        self._gap_s = 0.0  # audio dropped before the first chunk of the buffer
        self._failure: BaseException | None = None
        self._ended = self._stopped = False
        self._changed = Condition()
        self._thread = Thread(target=self._read, name=f"mowa {source.name}", daemon=True)

    def stop(self) -> None:
        """Stop reading from the source."""
        self._stopped = True

    def __enter__(self) -> BufferedSource:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join(1.0)  # a thread that waits for a pipe or a network ends with the program

    def __iter__(self) -> Iterator[AudioBlock]:
        return _to_blocks(self._chunks(), self.rate_hz)  # not in the thread, whose last chunks may be abandoned

    def _chunks(self) -> Iterator[AudioChunk]:
        while (chunk := self._take()) is not None:
            yield chunk
        if self._failure is not None:
            raise self._failure

    def _take(self) -> AudioChunk | None:
        with self._changed:
            while not self._buffer:
                if self._ended or self._stopped:
                    return None
                self._changed.wait(_POLL_S)
            chunk, gap_s = self._buffer.popleft(), self._gap_s
            self.buffered_s = self.buffered_s - chunk.duration_s if self._buffer else 0.0
            self._gap_s = 0.0
            self._changed.notify_all()
        return chunk._replace(lost_s=chunk.lost_s + gap_s)

    def _read(self) -> None:
        failure: BaseException | None = None
        try:
            with closing(self.source.open_stream(self.rate_hz)) as chunks:
                for chunk in chunks:
                    if not self._put(chunk):
                        break
        except OSError as error:
            failure = AudioError(f"{self.source.name}: cannot be read ({error.strerror or error})")
        except BaseException as error:  # raised again where the blocks are iterated
            failure = error
        with self._changed:
            self._failure, self._ended = None if self._stopped else failure, True  # stopping may cause errors
            self._changed.notify_all()

    def _put(self, chunk: AudioChunk) -> bool:
        """Append a chunk to the buffer. Return False if the source was stopped."""
        with self._changed:
            while self._buffer and self.buffered_s + chunk.duration_s > self._max_buffer_s and not self._stopped:
                if self.source.pausable:
                    self._changed.wait(_POLL_S)
                else:  # drop the whole buffer: one long gap instead of many short ones
                    self.dropped_s += self.buffered_s
                    self._gap_s += self.buffered_s + sum(one.lost_s for one in self._buffer)
                    self._buffer.clear()
                    self.buffered_s = 0.0
            if self._stopped:
                return False
            self._buffer.append(chunk)
            self.buffered_s += chunk.duration_s
            self._changed.notify_all()
        return True


def open_file(path: Path | str) -> AudioSource:
    """Return a source that reads a file as fast as it is consumed. Raises AudioError if its header is invalid."""
    audio.probe_audio(path)

    def open_stream(rate_hz: int) -> AudioChunks:
        for samples in audio.stream_audio(path, rate_hz, block_s=BLOCK_S):
            yield AudioChunk(samples, rate_hz, time.monotonic())

    return AudioSource(str(path), open_stream)


def open_realtime_file(path: Path | str, speed: float = 1.0) -> AudioSource:
    """Return a source that plays a file in real time, `speed` times faster.

    Each chunk comes when its last sample would have been recorded, counted from the start, so that the times do not
    drift. For a consumer that is too slow, chunks wait and keep the times at which they were due. Raises AudioError if
    the header of the file is invalid.
    """
    audio.probe_audio(path)

    def open_stream(rate_hz: int) -> AudioChunks:
        start_s, position = time.monotonic(), 0
        for samples in audio.stream_audio(path, rate_hz, block_s=BLOCK_S):
            position += len(samples)
            due_s = start_s + position / (rate_hz * speed)
            if (early_s := due_s - time.monotonic()) > 0:
                time.sleep(early_s)
            yield AudioChunk(samples, rate_hz, due_s)

    return AudioSource(str(path), open_stream)


# --- stages of the stream ---------------------------------------------------------------------------------------------


def _to_blocks(chunks: Iterable[AudioChunk], rate_hz: int) -> Iterator[AudioBlock]:
    """Resample chunks to `rate_hz` and split them into blocks of at most `BLOCK_S`."""
    size = round(BLOCK_S * rate_hz)
    lost_s = 0.0
    for chunk in _resample(chunks, rate_hz):
        lost_s += chunk.lost_s
        for start in range(0, len(chunk.samples), size):
            yield AudioBlock(chunk.samples[start : start + size], chunk.captured_at_s, lost_s)
            lost_s = 0.0
    if lost_s:
        yield AudioBlock(np.zeros(0, np.float32), time.monotonic(), lost_s)


def _resample(chunks: Iterable[AudioChunk], rate_hz: int) -> Iterator[AudioChunk]:
    """Resample to one rate. The resampler is flushed where the input rate changes or audio was lost, and at the end."""
    resampler: soxr.ResampleStream | None = None
    from_hz, empty, last_s = rate_hz, np.zeros(0, np.float32), time.monotonic()
    failure = None
    try:
        for chunk in chunks:
            if chunk.rate_hz != from_hz or chunk.lost_s:
                if resampler is not None:
                    yield AudioChunk(resampler.resample_chunk(empty, last=True), rate_hz, last_s)
                    resampler = None
                from_hz = chunk.rate_hz
                if from_hz != rate_hz:
                    resampler = soxr.ResampleStream(from_hz, rate_hz, 1, dtype="float32", quality=RESAMPLE_QUALITY)
            last_s = chunk.captured_at_s
            samples = chunk.samples if resampler is None else resampler.resample_chunk(chunk.samples)
            yield AudioChunk(samples, rate_hz, last_s, chunk.lost_s)
    except AudioError as error:
        failure = error
    if resampler is not None:
        yield AudioChunk(resampler.resample_chunk(empty, last=True), rate_hz, last_s)
    if failure is not None:
        raise failure
