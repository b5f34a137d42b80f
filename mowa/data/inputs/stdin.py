"""Standard input as a source of live sound: a recording in any container that can be read from its beginning, or raw
samples. Which of both it is, its first bytes say.

It knows how containers begin, and leaves what they hold to FFmpeg; but for plain WAV, which FFmpeg would keep back.
"""

from __future__ import annotations

import io
import os
import re
import sys
import time
from collections.abc import Iterable

import numpy as np

from mowa.data.audio import headers
from mowa.data.audio.decoders import DURATION_TOLERANCE_S, RATE_RANGE_HZ, mix_to_mono
from mowa.data.inputs.network import decode_stream
from mowa.data.inputs.source import AudioChunk, AudioChunks, AudioSource
from mowa.errors import AudioError

RAW_RATE_HZ = 16_000
STDIN_NAME = "standard input"

_PIECE = 4096  # bytes that are read at a time, at most
_HEAD = 2048  # bytes that are looked at: two frames of any MP3, ten packets of MPEG-TS
_MAGIC = (b"RIFF", b"RF64", b"OggS", b"fLaC", b"\x1aE\xdf\xa3", b"ID3", b"FORM", b"caff", b".snd", b"#!AMR", b"FLV\x01")
_ASF = bytes.fromhex("3026b2758e66cf11")
_MPEG_TS, _MPEG_TS_PACKET = 0x47, 188
_KBITS = {  # of MPEG audio, layer III, by its version as the header has it
    3: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


def open_stdin(raw_rate_hz: int | None = None) -> AudioSource:
    """What is piped in. Raw samples are 16 bits, little-endian, one channel, at `raw_hz` (None: `RAW_HZ`).

    AudioError at once where nothing is piped in; later where nothing comes, where a recording is not of `raw_hz`, and
    where it is damaged.
    """
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        raise AudioError(
            f"{STDIN_NAME}: nothing is piped in. Try: ffmpeg -i … -ac 1 -ar {RAW_RATE_HZ} -f s16le - | mowa listen -"
        )
    file = sys.stdin.fileno()

    def pieces(rate_hz: int) -> AudioChunks:
        pipe = PipeReader(file)
        head = pipe.peek(_HEAD)
        if not head:
            raise AudioError(f"{STDIN_NAME}: ended before any sound came. Does what is before the pipe run?")
        if not is_container(head):
            return _raw(pipe, raw_rate_hz or RAW_RATE_HZ, 1, None)
        if (plain := _plain_wav(head)) is None:
            return _of_rate(decode_stream(pipe, STDIN_NAME), raw_rate_hz)
        begins, from_hz, channels, size = plain
        pipe.read(begins)
        return _of_rate(_raw(pipe, from_hz, channels, size), raw_rate_hz)

    return AudioSource(STDIN_NAME, pieces)


class PipeReader:
    """A file descriptor as PyAV reads files: `read` gives what there is, as soon as there is anything."""

    def __init__(self, descriptor: int) -> None:
        self._file, self._seen = descriptor, b""

    def peek(self, size: int) -> bytes:
        """The first `size` bytes, which will be read again; fewer where it ends before."""
        while len(self._seen) < size and (data := os.read(self._file, size - len(self._seen))):
            self._seen += data
        return self._seen

    def read(self, size: int) -> bytes:
        if self._seen:
            given, self._seen = self._seen[:size], self._seen[size:]
            return given
        return os.read(self._file, size)


def _raw(pipe: PipeReader, from_hz: int, channels: int, size: int | None) -> AudioChunks:
    """16-bit samples; `size` bytes of them, None: all that come."""
    rest, come, width = b"", 0, 2 * channels
    while (size is None or come < size) and (data := pipe.read(min(_PIECE, (size or sys.maxsize) - come))):
        come += len(data)
        data = rest + data
        whole = len(data) - len(data) % width
        rest = data[whole:]
        values = np.frombuffer(data[:whole], "<i2").reshape(-1, channels).astype(np.float64)
        yield AudioChunk((mix_to_mono(values) / 2**15).astype(np.float32), from_hz, time.monotonic())
    if size is not None and size - come > DURATION_TOLERANCE_S * width * from_hz:
        promised_s, have_s = (count / (width * from_hz) for count in (size, come))
        raise AudioError(f"{STDIN_NAME}: is cut off: its header promises {promised_s:.1f} s, {have_s:.1f} s came")


def _of_rate(pieces: Iterable[AudioChunk], wanted_hz: int | None) -> AudioChunks:
    """What a container gives, refused where it is not of the rate that somebody said."""
    for piece in pieces:
        if wanted_hz not in (None, piece.rate_hz):
            raise AudioError(
                f"{STDIN_NAME}: is a recording of {piece.rate_hz} Hz, not {wanted_hz} Hz. Leave out --rate: it is for raw"
                " samples, and recordings say their rate."
            )
        yield piece


# --- how recordings begin ---------------------------------------------------------------------------------------------


def is_container(head: bytes) -> bool:
    """Whether bytes begin as a recording does; else they are samples."""
    synced = [head[at : at + 1] for at in range(0, 3 * _MPEG_TS_PACKET, _MPEG_TS_PACKET)]
    return (
        head.startswith((*_MAGIC, _ASF))
        or head[4:8] == b"ftyp"
        or synced == [bytes([_MPEG_TS])] * 3
        or any((size := length(head)) > 0 and length(head[size:]) > 0 for length in (_mp3, _adts))
    )


def _mp3(head: bytes) -> int:
    """The bytes of the frame of MPEG audio, layer III, that begins here; 0 where none does. ISO 11172-3, 2.4.1.3."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:
        return 0
    version, bits, rate = head[1] >> 3 & 3, head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or bits in (0, 15) or rate == 3:
        return 0
    rate_hz = (44_100, 48_000, 32_000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    kbits = _KBITS[3 if version == 3 else 2][bits - 1]
    return (144_000 if version == 3 else 72_000) * kbits // rate_hz + (head[2] >> 1 & 1)


def _adts(head: bytes) -> int:
    """The bytes of the ADTS frame of AAC that begins here; 0 where none does. ISO 13818-7, 6.2."""
    if len(head) < 6 or head[0] != 0xFF or head[1] & 0xF6 != 0xF0:
        return 0
    size = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
    return size if size > 6 else 0  # of which 7 are its header


def _plain_wav(head: bytes) -> tuple[int, int, int, int | None] | None:
    """Of a WAV of 16-bit samples: the byte where they begin, rate, channels, how many bytes (None: until it ends).

    FFmpeg gives none of them before it has seen 64 kB: two seconds.
    """
    if not re.match(rb"RIFF....WAVEfmt ....\x01\x00.{12}\x10\x00", head, re.DOTALL):
        return None
    file = io.BytesIO(head)
    header = headers.read_wav_header(file)
    low, high = RATE_RANGE_HZ
    if header is None or not header.channels or not low <= header.rate_hz <= high:
        return None
    begins = file.tell()
    size = int.from_bytes(head[begins - 4 : begins], "little")
    return (
        begins,
        header.rate_hz,
        header.channels,
        None if any(size in all for all in headers.WAV_STREAMING_SIZES) else size,
    )
