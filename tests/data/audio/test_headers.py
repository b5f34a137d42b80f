"""Durations and sizes stated in container headers, byte by byte."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import soundfile

from mowa.data.audio.headers import is_ogg_truncated, read_mp3_frame_count, read_wav_header


def wav(stated: int, present: int, chunks: bytes = b"") -> io.BytesIO:
    """Return 16-bit mono at 8 kHz whose data chunk states `stated` bytes and holds `present`."""
    fmt = b"fmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8_000, 16_000, 2, 16)
    return io.BytesIO(b"RIFF\0\0\0\0WAVE" + chunks + fmt + b"data" + struct.pack("<I", stated) + bytes(present))


def stated(file: io.BytesIO) -> tuple[int, int, float]:
    header = read_wav_header(file)
    return header.rate_hz, header.channels, header.size_ratio


@pytest.mark.parametrize(
    ("size", "present", "size_ratio"),
    [
        (1000, 1000, 1),
        (1000, 1200, 1),  # other chunks follow
        (1044, 1000, 1),  # the header counted as data
        (2000, 1000, 2),
        (4000, 0, 4000),
        (0, 1000, 1),  # this and the following: written to a pipe
        (0x7FFF_F000, 1000, 1),
        (0x8000_0000, 1000, 1),
        (0xFFFF_FFFF, 1000, 1),
    ],
)
def test_wav_size_ratio(size, present, size_ratio):
    assert stated(wav(size, present)) == (8_000, 1, size_ratio)


def test_wav_chunks_of_odd_length_are_padded():
    assert stated(wav(2000, 1000, chunks=b"LIST\3\0\0\0abc\0")) == (8_000, 1, 2)


def test_rf64_states_its_length_in_the_ds64_chunk():
    ds64 = b"ds64" + struct.pack("<IQQQI", 28, 0, 3000, 0, 0)
    assert stated(wav(0xFFFF_FFFF, 1000, chunks=ds64)) == (8_000, 1, 3)


@pytest.mark.parametrize("data", [b"", b"RIFF", b"RIFF\0\0\0\0AVI ", b"RIFF\0\0\0\0WAVEfmt ", b"fLaC" + bytes(100)])
def test_other_files_have_no_wav_header(data):
    assert read_wav_header(io.BytesIO(data)) is None


def test_ogg_ends_with_a_complete_page_and_the_end_flag():
    file = io.BytesIO()
    soundfile.write(file, np.zeros(32_000), 16_000, format="OGG")
    whole = file.getvalue()
    assert not is_ogg_truncated(io.BytesIO(whole))
    assert all(is_ogg_truncated(io.BytesIO(whole[:end])) for end in range(4, len(whole)))
    assert not is_ogg_truncated(io.BytesIO(b"fLaC" + bytes(100)))


@pytest.mark.parametrize("tag", [b"Xing", b"Info"])
@pytest.mark.parametrize("id3", [b"", b"ID3\4\0\0\0\0\2\0" + bytes(256)])
def test_mp3_frames_follow_the_id3_tag(tag, id3):
    frame = b"\xff\xfb\x90\x00" + bytes(32) + tag + struct.pack(">II", 1, 4321) + bytes(200)
    assert read_mp3_frame_count(io.BytesIO(id3 + frame)) == 4321


def test_mp3_without_a_frame_count():
    assert read_mp3_frame_count(io.BytesIO(b"\xff\xfb\x90\x00" + bytes(400))) is None
    assert read_mp3_frame_count(io.BytesIO(b"\xff\xfb\x90\x00" + bytes(32) + b"Info" + bytes(200))) is None
    assert read_mp3_frame_count(io.BytesIO(b"")) is None


@pytest.mark.parametrize(
    ("tail", "unstated", "is_joined"),
    [
        (bytes(16_000), 16_000, False),
        (b"\x12\x00\x34\x00" * 4000, 16_000, False),
        (bytes(3000), 0, False),  # less than 0.25 s
        (b"LIST" + struct.pack("<I", 15_992) + bytes(15_992), 0, False),
        (b"\0LIST" + struct.pack("<I", 15_992) + bytes(15_992), 0, False),  # after an odd number of bytes
        (b"ID3\4" + bytes(16_000), 0, False),
        (b"RIFF" + struct.pack("<I", 16_000) + b"WAVE" + bytes(15_996), 0, True),
    ],
)
def test_audio_behind_the_stated_end_of_a_wav(tail, unstated, is_joined):
    size = 1001 if tail[:1] == b"\0" and tail[1:5] == b"LIST" else 1000
    file = wav(size, size)
    header = read_wav_header(io.BytesIO(file.getvalue() + tail))
    assert (header.unstated_bytes, header.is_joined, header.stated_bytes) == (unstated, is_joined, size)


def test_a_wav_of_5_gib_states_what_remains_of_its_size():
    file = io.BytesIO()

    class Huge(io.BytesIO):  # 5 GiB of zeros behind the header
        def seek(self, offset, whence=0):
            return super().seek(offset, whence) + (5 * 2**30 if whence == 2 else 0)

    file = Huge(wav(2**30, 100).getvalue())
    header = read_wav_header(file)
    assert header.unstated_bytes == pytest.approx(4 * 2**30, abs=200)
    assert header.bytes_per_s == 16_000
