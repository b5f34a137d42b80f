"""Open standard input as a live audio source: any streamable container, or raw samples, detected by its first bytes.

Containers are decoded by FFmpeg, except 16-bit WAV, whose first two seconds FFmpeg would delay.
"""

from __future__ import annotations

import io
import logging
import math
import os
import re
import sys
import time
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import soundfile

from mowa.data.audio import headers
from mowa.data.audio.decoders import DURATION_TOLERANCE_S, RATE_RANGE_HZ
from mowa.data.audio.mixing import LIVE_HALF_LIFE_S, ChannelMix, stack_mean
from mowa.data.inputs.network import decode_stream
from mowa.data.inputs.source import AudioChunk, AudioChunks, AudioSource
from mowa.errors import AudioError

log = logging.getLogger("mowa")

RAW_RATE_HZ = 16_000
RAW_ENCODINGS = {"s16le": RAW_RATE_HZ, "mulaw": 8_000, "alaw": 8_000}  # default rates; the laws are those of G.711
STDIN_NAME = "standard input"

_READ_BYTES = 4096  # at most, per read
_HEAD_BYTES = 2048  # examined: two frames of any MP3, ten packets of MPEG-TS
_MAGIC = (
    b"RIFF",
    b"RF64",
    b"OggS",
    b"fLaC",
    b"\x1aE\xdf\xa3",
    b"ID3",
    b"FORM",
    b"caff",
    b".snd",
    b"NIST_1A",
    b"#!AMR",
    b"FLV\x01",
)
_ASF = bytes.fromhex("3026b2758e66cf11")
_MPEG_TS, _MPEG_TS_PACKET = 0x47, 188
_KBITS = {  # bit rates of MPEG audio layer III, by the version bits of the frame header
    3: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


def open_stdin(raw_rate_hz: int | None = None, encoding: str = "s16le") -> AudioSource:
    """Return a source that reads standard input. Raw samples are mono, in one of `RAW_ENCODINGS`, at `raw_rate_hz`.

    `raw_rate_hz` defaults to that of the encoding; a container of another rate is an error if it is given.
    Raises AudioError if standard input is a terminal. The stream raises AudioError if nothing comes, if the rate
    differs, and if the recording is damaged.
    """
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        raise AudioError(
            f"{STDIN_NAME}: nothing is piped in. Try: ffmpeg -i … -ac 1 -ar {RAW_RATE_HZ} -f s16le - | mowa listen -"
        )
    descriptor = sys.stdin.fileno()

    def open_stream(rate_hz: int) -> AudioChunks:
        pipe = PipeReader(descriptor)
        head = pipe.peek(_HEAD_BYTES)
        if not head:
            raise AudioError(f"{STDIN_NAME}: ended before any audio. Is the program before the pipe running?")
        if not is_container(head):
            return _read_raw(pipe, raw_rate_hz or RAW_ENCODINGS[encoding], 1, None, encoding)
        if (wav := _parse_pcm_wav(head)) is None:
            return _validate_rate(decode_stream(pipe, STDIN_NAME), raw_rate_hz)
        start, from_hz, channels, size = wav
        pipe.read(start)
        return _validate_rate(_read_raw(pipe, from_hz, channels, size), raw_rate_hz)

    return AudioSource(STDIN_NAME, open_stream)


class PipeReader:
    """A file descriptor as the file object that PyAV expects: `read` returns what is available, without waiting."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._peeked = descriptor, b""

    def peek(self, size: int) -> bytes:
        """Return the first `size` bytes without consuming them; fewer if the input ends before."""
        while len(self._peeked) < size and (data := os.read(self._descriptor, size - len(self._peeked))):
            self._peeked += data
        return self._peeked

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes; none at the end of the input."""
        if self._peeked:
            data, self._peeked = self._peeked[:size], self._peeked[size:]
            return data
        return os.read(self._descriptor, size)


def _read_raw(pipe: PipeReader, from_hz: int, channels: int, size: int | None, encoding: str = "s16le") -> AudioChunks:
    """Yield raw samples, `size` bytes of them or (None) until the input ends."""
    table = None if encoding == "s16le" else _g711_table(encoding)
    rest, received, width = b"", 0, (2 if table is None else 1) * channels
    mix = ChannelMix(STDIN_NAME, from_hz, LIVE_HALF_LIFE_S)
    while (size is None or received < size) and (data := pipe.read(min(_READ_BYTES, (size or sys.maxsize) - received))):
        received += len(data)
        if received == size and _has_unstated_audio(pipe, width * from_hz):
            size = None
        data = rest + data
        whole = len(data) - len(data) % width
        rest = data[whole:]
        samples = np.frombuffer(data[:whole], "<i2" if table is None else np.uint8)
        values = (samples if table is None else table[samples]).reshape(-1, channels).astype(np.float64)
        yield AudioChunk(mix.mix(stack_mean(values, channels) / 2**15), from_hz, time.monotonic())
    if size is not None and size - received > DURATION_TOLERANCE_S * width * from_hz:
        stated_s, received_s = (count / (width * from_hz) for count in (size, received))
        raise AudioError(
            f"{STDIN_NAME}: is cut off: its header promises {stated_s:.1f} s, {received_s:.1f} s were received"
        )


def _has_unstated_audio(pipe: PipeReader, bytes_per_s: int) -> bool:
    """Return whether audio follows the stated end of a WAV, and log it; a chunk may follow, or padding."""
    count = math.ceil(headers.UNSTATED_S * bytes_per_s)
    ahead = pipe.peek(count)
    if len(ahead) < count or any(name.isascii() and name.decode().isprintable() for name in (ahead[:4], ahead[1:5])):
        return False
    log.warning(
        "%s: has more audio than its header states, as where its writer was stopped: all of it is read.", STDIN_NAME
    )
    return True


def _g711_table(encoding: str) -> npt.NDArray[np.int16]:
    """Return the 16-bit value of each byte of ITU-T G.711, as libsndfile decodes it."""
    codes = io.BytesIO(bytes(range(256)))
    subtype = {"mulaw": "ULAW", "alaw": "ALAW"}[encoding]
    table, _ = soundfile.read(codes, dtype="int16", format="RAW", subtype=subtype, samplerate=8_000, channels=1)
    return table


def _validate_rate(chunks: Iterable[AudioChunk], expected_hz: int | None) -> AudioChunks:
    """Pass chunks of a container on. Raises AudioError if their rate differs from the one given for raw input."""
    for chunk in chunks:
        if expected_hz not in (None, chunk.rate_hz):
            raise AudioError(
                f"{STDIN_NAME}: is a recording of {chunk.rate_hz} Hz, not {expected_hz} Hz. Omit --sample-rate: it is "
                "for raw samples, and recordings state their rate."
            )
        yield chunk


# --- container detection ----------------------------------------------------------------------------------------------


def is_container(head: bytes) -> bool:
    """Return whether the first bytes are those of an audio container; otherwise they are raw samples."""
    synced = [head[at : at + 1] for at in range(0, 3 * _MPEG_TS_PACKET, _MPEG_TS_PACKET)]
    return (
        head.startswith((*_MAGIC, _ASF))
        or head[4:8] == b"ftyp"
        or synced == [bytes([_MPEG_TS])] * 3
        or any(
            (size := frame_bytes(head)) > 0 and frame_bytes(head[size:]) > 0
            for frame_bytes in (_mp3_frame_bytes, _adts_frame_bytes)
        )
    )


def _mp3_frame_bytes(head: bytes) -> int:
    """Return the size of the MPEG audio layer III frame at the start of `head`, or 0 (ISO 11172-3, 2.4.1.3)."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:
        return 0
    version, bits, rate = head[1] >> 3 & 3, head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or bits in (0, 15) or rate == 3:
        return 0
    rate_hz = (44_100, 48_000, 32_000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    kbits = _KBITS[3 if version == 3 else 2][bits - 1]
    return (144_000 if version == 3 else 72_000) * kbits // rate_hz + (head[2] >> 1 & 1)


def _adts_frame_bytes(head: bytes) -> int:
    """Return the size of the ADTS AAC frame at the start of `head`, or 0 (ISO 13818-7, 6.2)."""
    if len(head) < 6 or head[0] != 0xFF or head[1] & 0xF6 != 0xF0:
        return 0
    size = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
    return size if size > 6 else 0  # its header alone has 7


def _parse_pcm_wav(head: bytes) -> tuple[int, int, int, int | None] | None:
    """Parse the header of 16-bit WAV: offset of the samples, rate, channels, bytes of samples (None: until the end).

    Return None for other containers. FFmpeg decodes nothing before it has 64 kB, which are two seconds.
    """
    if not re.match(rb"RIFF....WAVEfmt ....\x01\x00.{12}\x10\x00", head, re.DOTALL):
        return None
    file = io.BytesIO(head)
    header = headers.read_wav_header(file)
    low, high = RATE_RANGE_HZ
    if header is None or not header.channels or not low <= header.rate_hz <= high:
        return None
    start = file.tell()
    size = int.from_bytes(head[start - 4 : start], "little")
    streamed = any(size in sizes for sizes in headers.WAV_STREAMING_SIZES)
    return start, header.rate_hz, header.channels, None if streamed else size
