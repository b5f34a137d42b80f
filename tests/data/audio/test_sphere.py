"""NIST SPHERE, plain and compressed with shorten; WAV files with more audio than their headers state."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import soundfile

from mowa.data import audio
from mowa.data.audio.decoders import AudioBytes
from mowa.errors import AudioError

RATE_HZ = 16_000
SOUND = np.clip(np.random.default_rng(0).standard_normal((20_000, 2)) * 3000, -32768, 32767).astype("<i2")


def sphere(data: bytes, coding: str = "pcm", width: int = 2, count: int = len(SOUND), channels: int = 2) -> bytes:
    order = "-s2 01" if width == 2 else "-s1 1"
    head = (
        f"NIST_1A\n   1024\nchannel_count -i {channels}\nsample_count -i {count}\nsample_rate -i {RATE_HZ}\n"
        f"sample_n_bytes -i {width}\nsample_byte_format {order}\nsample_coding -s{len(coding)} {coding}\nend_head\n"
    )
    return head.encode().ljust(1024) + data


def shorten(samples: np.ndarray) -> bytes:
    """Compress int16 [n, C] with shorten 2, blocks of 256 without prediction (T. Robinson, CUED/F-INFENG/TR.156)."""
    bits: list[int] = []

    def rice(value: int, width: int) -> None:
        bits.extend([0] * (value >> width) + [1] + [value >> at & 1 for at in reversed(range(width))])

    for setting in (5, samples.shape[1], 256, 0, 0, 0):  # little-endian int16, channels, block, no LPC, means or skip
        rice(setting.bit_length(), 2)
        rice(setting, setting.bit_length())
    for start in range(0, len(samples), 256):
        block = samples[start : start + 256].astype(int)
        if len(block) < 256:
            rice(5, 2)  # another block size
            rice(len(block).bit_length(), 2)
            rice(len(block), len(block).bit_length())
        for channel in block.T.tolist():
            rice(0, 2)  # differences of order 0
            rice(9, 3)
            for value in channel:
                rice(value << 1 if value >= 0 else ~value << 1 | 1, 10)
    rice(4, 2)
    return b"ajkg\x02" + np.packbits(bits + [0] * (-len(bits) % 32)).tobytes()


@pytest.mark.parametrize("name", ["a.sph", "a.wav"])
def test_sphere_is_read_whatever_its_name(tmp_path, name):
    (tmp_path / name).write_bytes(sphere(SOUND.tobytes()))
    assert np.array_equal(audio.load_audio(tmp_path / name, channel=1), SOUND[:, 1] / np.float32(2**15))
    info = audio.probe_audio(tmp_path / name)
    assert (info.duration_s, info.rate_hz, info.channels) == (1.25, RATE_HZ, 2)
    assert audio.find_audio_files([tmp_path]) == [tmp_path / name]


@pytest.mark.parametrize(("coding", "subtype"), [("ulaw", "ULAW"), ("alaw", "ALAW")])
def test_sphere_of_telephone_speech(coding, subtype):
    codes = np.random.default_rng(0).integers(0, 256, 20_000, np.uint8)
    expected, _ = soundfile.read(
        io.BytesIO(codes.tobytes()), format="RAW", subtype=subtype, samplerate=RATE_HZ, channels=2, dtype="float32"
    )
    source = AudioBytes("a.sph", sphere(codes.tobytes(), coding, 1, 10_000))
    for channel in (0, 1):
        assert np.array_equal(audio.load_audio(source, channel=channel), expected[:, channel])


@pytest.mark.parametrize("coding", ["pcm,embedded-shorten-v1.09", "pcm,embedded-shorten-v2.00"])
def test_sphere_compressed_with_shorten(coding):
    source = AudioBytes("a.sph", sphere(shorten(SOUND), coding))
    for channel in (0, 1):
        assert np.array_equal(audio.load_audio(source, channel=channel), SOUND[:, channel] / np.float32(2**15))
    assert audio.probe_audio(source).duration_s == pytest.approx(1.25)


@pytest.mark.parametrize("coding", ["pcm", "pcm,embedded-shorten-v2.00"])
def test_sphere_that_is_cut_off_raises(coding):
    data = sphere(SOUND.tobytes() if coding == "pcm" else shorten(SOUND), coding)
    with pytest.raises(AudioError, match=r"is cut off: its header promises 1\.2 s, 0\.[67] s could be decoded"):
        audio.load_audio(AudioBytes("a.sph", data[: len(data) * 11 // 20]))


def test_sphere_in_another_compression_is_named():
    with pytest.raises(AudioError, match=r"a codec that FFmpeg cannot decode \(NIST .*\)\. Convert it with sph2pipe"):
        audio.load_audio(AudioBytes("a.sph", sphere(bytes(1000), "pcm,embedded-wavpack-v1.1")))


@pytest.mark.parametrize(
    "head", [b"NIST_1A\n", b"NIST_1A\n   1024\n", b"NIST_1A\n  99999\nsample_count -i 5\n" + bytes(9000)]
)
def test_damaged_sphere_raises(head):
    with pytest.raises(AudioError):
        audio.load_audio(AudioBytes("a.sph", head))


# --- WAV with more than its header states -----------------------------------------------------------------------------


def stating(share: float) -> bytes:
    """Return a WAV of `SOUND` whose header states a share of it, as one whose writer updates it now and then."""
    encoded = io.BytesIO()
    soundfile.write(encoded, SOUND, RATE_HZ, format="WAV", subtype="PCM_16")
    data = bytearray(encoded.getvalue())
    at = data.index(b"data") + 4
    size = int(SOUND.nbytes * share) // 4 * 4
    data[4:8], data[at : at + 4] = struct.pack("<I", size + at - 4), struct.pack("<I", size)
    return bytes(data)


def test_audio_behind_the_stated_end_is_read_with_a_warning(tmp_path, caplog):
    (tmp_path / "a.wav").write_bytes(stating(0.5))
    assert np.array_equal(audio.load_audio(tmp_path / "a.wav", channel=0), SOUND[:, 0] / np.float32(2**15))
    assert "a.wav: states 0.6 s in its header, and 0.6 s of audio follow" in caplog.text
    caplog.clear()
    whole = AudioBytes("whole.wav", stating(1.0) + b"LIST\4\0\0\0abcd" * 5000)
    assert len(audio.load_audio(whole)) == len(SOUND)
    assert not caplog.records


def test_a_second_wav_in_the_same_file_is_reported(caplog):
    joined = AudioBytes("joined.wav", stating(1.0) * 2)
    assert len(audio.load_audio(joined)) == len(SOUND)
    assert "joined.wav: is followed by another recording in the same file, which is not read" in caplog.text
