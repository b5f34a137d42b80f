"""What the containers of audio promise: how much sound there should be, read from their bytes.

Decoders tell how much they found, and some shorten the promise to match; this is the other side of the comparison.
It reads headers and nothing else: it decodes no sound, and leaves it to the caller what to refuse.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

WAV_TOLERANCE_BYTES = 64  # sloppy writers count the header as data
WAV_STREAMING_SIZES = (
    range(1),
    range(0x7FFF_F000, 0x8000_0001),
    range(0xFFFF_F000, 0x1_0000_0000),
)  # sizes written to pipes
OGG_MAX_PAGE_BYTES = 27 + 255 + 255 * 255
FORMATS_WITH_DURATION = (
    "aiff",
    "au",
    "matroska,webm",
    "mov,mp4,m4a,3gp,3g2,mj2",
    "mp3",
    "ogg",
)  # FFmpeg estimates all other lengths


@dataclass(frozen=True, slots=True)
class WavHeader:
    """`claim` is how many times more samples the header counts than the file holds: 1 where it is whole or streamed."""

    rate_hz: int
    channels: int
    size_ratio: float


def read_wav_header(file: BinaryIO) -> WavHeader | None:
    """Read RIFF or RF64 up to its data chunk; None where the file is no WAV or ends before it.

    https://www.mmsp.ece.mcgill.ca/Documents/AudioFormats/WAVE/WAVE.html; RF64: EBU Tech 3306.
    """
    file_size = file.seek(0, 2)
    file.seek(0)
    if file.read(12)[8:] != b"WAVE":
        return None
    rate_hz = channels = 0
    long_size: int | None = None
    while len(header := file.read(8)) == 8:
        name, size = struct.unpack("<4sI", header)
        if name == b"data":
            streamed = any(size in sizes for sizes in WAV_STREAMING_SIZES)
            size = long_size or (0 if streamed else size)
            there = file_size - file.tell()
            return WavHeader(rate_hz, channels, size / max(1, there) if size > there + WAV_TOLERANCE_BYTES else 1.0)
        body = file.read(min(size, 24))
        if name == b"ds64" and len(body) == 24:
            long_size = int.from_bytes(body[8:16], "little")
        if name == b"fmt " and len(body) >= 8:
            _, channels, rate_hz = struct.unpack("<HHI", body[:8])
        file.seek(size - len(body) + size % 2, 1)
    return None


def is_ogg_truncated(file: BinaryIO) -> bool:
    """Whether this is Ogg whose last page is torn or lacks the end-of-stream flag. RFC 3533, section 6."""
    file.seek(0)
    if file.read(4) != b"OggS":
        return False
    file.seek(max(0, file.seek(0, 2) - 2 * OGG_MAX_PAGE_BYTES))
    page = file.read()
    page = page[page.rfind(b"OggS") :]
    if len(page) < 27 or len(page) < 27 + page[26]:
        return True
    ends = bool(page[5] & 4)
    return not ends or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]])


def read_mp3_frame_count(file: BinaryIO) -> int | None:
    """The frame count in the Xing or Info header of an MP3, if there is one: it follows the ID3v2 tag."""
    file.seek(0)
    head = file.read(10)
    if head[:3] == b"ID3" and len(head) == 10:
        a, b, c, d = head[6:]
        file.seek(10 + (a << 21 | b << 14 | c << 7 | d))
    head = file.read(256)
    at = max(head.find(b"Xing"), head.find(b"Info"))
    counted = at >= 0 and len(head) >= at + 12 and head[at + 7] & 1
    return int.from_bytes(head[at + 8 : at + 12], "big") if counted else None


def read_duration_s(container: Any, frames: int | None) -> float | None:
    """The seconds of sound an open PyAV container states, or None where FFmpeg only estimates them from the bit rate.

    `frames` is what `mp3_frames` found in the file.
    """
    track, name = container.streams.audio[0], container.format.name
    if name not in FORMATS_WITH_DURATION or (name == "mp3" and frames is None):
        return None
    start_s = float((track.start_time or 0) * track.time_base)
    if name == "matroska,webm":
        if stated := re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", track.metadata.get("DURATION", "")):
            return float(stated[1]) * 3600 + float(stated[2]) * 60 + float(stated[3]) - start_s
        # The length of the longest track, which may be a video that runs on after the sound.
        return container.duration / 1e6 - start_s if container.duration and len(container.streams) == 1 else None
    if track.duration is None:
        return None
    duration_s = float(track.duration * track.time_base)
    if name != "mp3" or frames is None:
        return duration_s
    rate_hz = track.codec_context.sample_rate
    # Where two MP3s were joined FFmpeg estimates after all, and the count is the first one's.
    return min(duration_s, frames * (1152 if rate_hz >= 32_000 else 576) / rate_hz)
