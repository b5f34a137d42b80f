"""Excerpts, single channels and recordings in memory equal the same slices taken with numpy."""

import io

import numpy as np
import pytest
import soundfile

from mowa.data import audio
from mowa.data.audio.decoders import AudioBytes
from mowa.errors import AudioError


def noise(seconds, channels=1, rate_hz=16_000):
    rng = np.random.default_rng(0)
    return (rng.standard_normal((round(seconds * rate_hz), channels)) * 0.1).astype(np.float32)


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
@pytest.mark.parametrize(("offset_s", "duration_s"), [(0.0, 0.5), (0.25, 1.0), (1.7, 0.3), (1.0, None), (0.0, 2.0)])
def test_an_excerpt_equals_a_numpy_slice(tmp_path, name, offset_s, duration_s):
    sound = noise(2.0)
    soundfile.write(tmp_path / name, sound, 16_000, **({"subtype": "FLOAT"} if name == "a.wav" else {}))
    whole = audio.load_audio(tmp_path / name)
    end = None if duration_s is None else round((offset_s + duration_s) * 16_000)
    part = audio.load_audio(tmp_path / name, offset_s=offset_s, duration_s=duration_s)
    np.testing.assert_array_equal(part, whole[round(offset_s * 16_000) : end])


def test_an_excerpt_without_seeking(tmp_path):
    soundfile.write(tmp_path / "a.ogg", noise(2.0, rate_hz=48_000), 48_000)
    whole = audio.load_audio(tmp_path / "a.ogg", 48_000)
    part = audio.load_audio(tmp_path / "a.ogg", 48_000, offset_s=0.5, duration_s=1.25)
    np.testing.assert_array_equal(part, whole[24_000:84_000])


@pytest.mark.parametrize(("offset_s", "duration_s"), [(1.5, 1.0), (2.5, 0.5), (3.0, None)])
@pytest.mark.parametrize("name", ["a.wav", "a.ogg"])
def test_an_excerpt_past_the_end_raises(tmp_path, name, offset_s, duration_s):
    soundfile.write(tmp_path / name, noise(2.0), 16_000)
    with pytest.raises(AudioError, match="ends inside the excerpt from"):
        audio.load_audio(tmp_path / name, offset_s=offset_s, duration_s=duration_s)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg"])
def test_bytes_are_decoded_like_the_file(tmp_path, name):
    soundfile.write(tmp_path / name, noise(1.0, 2, 44_100), 44_100)
    recording = AudioBytes(f"corpus.tar/{name}", (tmp_path / name).read_bytes())
    np.testing.assert_array_equal(audio.load_audio(recording), audio.load_audio(tmp_path / name))
    assert audio.probe_audio(recording) == audio.probe_audio(tmp_path / name)


@pytest.mark.parametrize("data", [b"", b"RIFF", b"RIFF\0\0\0\0WAVEfmt ", b"fLaC", b"OggS", b"ID3", b"nothing"])
def test_errors_of_bytes_begin_with_their_name(data):
    with pytest.raises(AudioError, match=r"corpus\.tar/x"):
        audio.load_audio(AudioBytes("corpus.tar/x", data))


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg"])
def test_one_channel_is_selected(tmp_path, name):
    soundfile.write(tmp_path / name, noise(1.0, 2), 16_000)  # Vorbis reorders more channels
    expected = soundfile.read(tmp_path / name, dtype="float32")[0]
    for channel in range(2):
        one = audio.load_audio(tmp_path / name, channel=channel)
        np.testing.assert_allclose(one, expected[: len(one), channel], atol=1e-4 if name == "a.ogg" else 0)
    with pytest.raises(AudioError, match="no channel 2: it has 2 channels, 0 to 1"):
        audio.load_audio(tmp_path / name, channel=2)


@pytest.mark.parametrize(
    ("layout", "candidates", "distinct"),
    [
        ([0], None, (0,)),
        ([0, 1], None, (0, 1)),
        ([0, 0], None, (0,)),
        ([0, 1, 0, 1], None, (0, 1)),
        ([0, 0, 1], [1, 2], (1, 2)),
        ([0, 0], [1], (1,)),
    ],
)
def test_equal_channels_are_found(tmp_path, layout, candidates, distinct):
    voices = noise(1.0, 2)
    soundfile.write(tmp_path / "a.wav", voices[:, layout], 16_000)
    assert audio.find_distinct_channels(tmp_path / "a.wav", candidates) == distinct


def test_channels_that_differ_only_at_the_end_differ(tmp_path):
    sound = np.repeat(noise(3.0), 2, 1)
    sound[-1, 1] += 0.5
    soundfile.write(tmp_path / "a.wav", sound, 16_000)
    assert audio.find_distinct_channels(tmp_path / "a.wav") == (0, 1)


def test_audio_bytes_need_no_file():
    buffer = io.BytesIO()
    soundfile.write(buffer, noise(0.5), 16_000, format="WAV")
    assert len(audio.load_audio(AudioBytes("nowhere", buffer.getvalue()))) == 8_000
