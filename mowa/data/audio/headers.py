"""Read from container headers how much audio a file should hold, without decoding it.

Decoders report how much they found, and some correct the stated duration to match; comparing both reveals truncation.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

WAV_TOLERANCE_BYTES = 64  # some writers count the header as data
# data sizes that programs write when they write to a pipe
WAV_STREAMING_SIZES = (range(1), range(0x7FFF_F000, 0x8000_0001), range(0xFFFF_F000, 0x1_0000_0000))
UNSTATED_S = 0.25  # of audio behind the stated end of a WAV; less may be padding
OGG_MAX_PAGE_BYTES = 27 + 255 + 255 * 255
# PyAV format names; FFmpeg estimates the durations of all others
FORMATS_WITH_DURATION = ("aiff", "au", "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2", "mp3", "nistsphere", "ogg")


@dataclass(frozen=True, slots=True)
class PcmHeader:
    """Header of WAV or NIST SPHERE. Bytes are those of samples.

    size_ratio      samples stated / samples present: 1 if the file is complete or was streamed
    bytes_per_s     of all channels; 0 if unknown
    stated_bytes    what the header states
    unstated_bytes  audio behind that, which a writer that died or a size over 4 GiB leaves there
    is_joined       whether another WAV file follows
    """

    rate_hz: int
    channels: int
    size_ratio: float
    bytes_per_s: int = 0
    stated_bytes: int = 0
    unstated_bytes: int = 0
    is_joined: bool = False


def read_wav_header(file: BinaryIO) -> PcmHeader | None:
    """Read RIFF or RF64 up to the data chunk; return None if the file is not WAV or ends before that chunk.

    The file is left at the first sample. Sources: https://www.mmsp.ece.mcgill.ca/Documents/AudioFormats/WAVE/WAVE.html
    and, for RF64, EBU Tech 3306.
    """
    file_size = file.seek(0, 2)
    file.seek(0)
    if file.read(12)[8:] != b"WAVE":
        return None
    rate_hz = channels = block_bytes = 0
    long_size: int | None = None
    while len(header := file.read(8)) == 8:
        name, size = struct.unpack("<4sI", header)
        if name == b"data":
            streamed = any(size in sizes for sizes in WAV_STREAMING_SIZES)
            size = long_size or (0 if streamed else size)
            start = file.tell()
            present, bytes_per_s = file_size - start, rate_hz * block_bytes
            if streamed or not bytes_per_s or present - size < UNSTATED_S * bytes_per_s:
                ratio = size / max(1, present) if size > present + WAV_TOLERANCE_BYTES else 1.0
                return PcmHeader(rate_hz, channels, ratio, bytes_per_s, size)
            follows = _chunk_name(file, start + size, file_size)
            file.seek(start)
            unstated = 0 if follows else present - size
            return PcmHeader(rate_hz, channels, 1.0, bytes_per_s, size, unstated, follows == b"RIFF")
        body = file.read(min(size, 24))
        if name == b"ds64" and len(body) == 24:
            long_size = int.from_bytes(body[8:16], "little")
        if name == b"fmt " and len(body) >= 8:
            _, channels, rate_hz = struct.unpack("<HHI", body[:8])
            block_bytes = int.from_bytes(body[12:14], "little")
        file.seek(size - len(body) + size % 2, 1)
    return None


def _chunk_name(file: BinaryIO, at: int, file_size: int) -> bytes:
    """Return the name of the chunk or tag that begins at `at`, or at the even byte after it; empty if none does."""
    for start in sorted({at, at + at % 2}):
        file.seek(start)
        name, size = file.read(4), int.from_bytes(file.read(4), "little")
        is_chunk = all(0x20 <= byte < 0x7F for byte in name) and start + 8 + size <= file_size + 1
        if is_chunk or name[:3] in (b"ID3", b"TAG") or name == b"APET":
            return name
    return b""


def read_sphere_header(file: BinaryIO) -> PcmHeader | None:
    """Read the header of NIST SPHERE; return None for other files.

    Source: https://www.nist.gov/itl/iad/mig/tools (SPHERE 2.7).
    """
    file.seek(0)
    head = file.read(1024)
    if not head.startswith(b"NIST_1A\n") or not head[8:16].strip().isdigit():
        return None
    size = int(head[8:16])
    head += file.read(min(max(0, size - 1024), 2**16))
    fields = {name: int(value) for name, value in re.findall(rb"^(\w+) -[ir] (\d+)", head, re.MULTILINE)}
    count, channels, width = (fields.get(name, 0) for name in (b"sample_count", b"channel_count", b"sample_n_bytes"))
    present, stated = file.seek(0, 2) - size, count * channels * width
    is_compressed = re.search(rb"^sample_coding -s\d+ \S+,", head, re.MULTILINE) is not None
    ratio = stated / max(1, present) if stated > present and not is_compressed else 1.0
    return PcmHeader(fields.get(b"sample_rate", 0), channels, ratio)


def is_ogg_truncated(file: BinaryIO) -> bool:
    """Return whether this is Ogg whose last page is incomplete or lacks the end-of-stream flag (RFC 3533, §6)."""
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


def lost_ogg_pages(file: BinaryIO) -> bool:
    """Return whether this is Ogg whose pages are not numbered without gaps, so that some were lost (RFC 3533, §6)."""
    expected: dict[int, int] = {}  # serial number of a stream → number of its next page
    file.seek(0)
    while len(page := file.read(27)) == 27 and page[:4] == b"OggS":
        serial, number = struct.unpack("<II", page[14:22])
        if not page[5] & 2 and expected.get(serial, number) != number:
            return True
        expected[serial] = number + 1
        file.seek(sum(file.read(page[26])), 1)
    return False


def read_mp3_frame_count(file: BinaryIO) -> int | None:
    """Return the frame count of the Xing or Info header of an MP3, which follows the ID3v2 tag; None if absent."""
    file.seek(0)
    head = file.read(10)
    if head[:3] == b"ID3" and len(head) == 10:
        a, b, c, d = head[6:]
        file.seek(10 + (a << 21 | b << 14 | c << 7 | d))
    head = file.read(256)
    at = max(head.find(b"Xing"), head.find(b"Info"))
    counted = at >= 0 and len(head) >= at + 12 and head[at + 7] & 1
    return int.from_bytes(head[at + 8 : at + 12], "big") if counted else None


def read_duration_s(container: Any, frames: int | None, start_s: float | None = None) -> float | None:
    """Return the duration that an open PyAV container states; None if FFmpeg only estimates it from the bit rate.

    `frames` is the result of `read_mp3_frame_count`; the duration begins at timestamp `start_s` (None: at the first
    audio).
    """
    track, name = container.streams.audio[0], container.format.name
    if name not in FORMATS_WITH_DURATION or (name == "mp3" and frames is None):
        return None
    own_start_s = float((track.start_time or 0) * track.time_base)
    start_s = own_start_s if start_s is None else start_s
    if name == "matroska,webm":
        if stated := re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", track.metadata.get("DURATION", "")):
            return float(stated[1]) * 3600 + float(stated[2]) * 60 + float(stated[3]) - start_s
        # The duration of the longest track, which may be video and outlast the audio.
        return container.duration / 1e6 - start_s if container.duration and len(container.streams) == 1 else None
    if track.duration is None:
        return None
    duration_s = float(track.duration * track.time_base) + own_start_s - start_s
    if name == "ogg" and track.codec_context.name in ("opus", "libopus"):  # counted from 0, wherever it starts
        duration_s -= max(0.0, own_start_s)
    if name != "mp3" or frames is None:
        return duration_s
    rate_hz = track.codec_context.sample_rate
    # For two joined MP3s FFmpeg estimates the duration, and the count is that of the first.
    return min(duration_s, frames * (1152 if rate_hz >= 32_000 else 576) / rate_hz)
