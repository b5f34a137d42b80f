"""Recordings of every format are read as mono float32; damaged ones raise one-line errors. Inputs are encoded here."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given
from hypothesis import strategies as st
from transformers import Wav2Vec2FeatureExtractor

from mowa.data.audio import (
    MIN_SAMPLES,
    decoders,
    find_audio_files,
    is_silent,
    load_audio,
    normalize,
    probe_audio,
    stream_audio,
)
from mowa.errors import AudioError
from tests.unprivileged import unprivileged

PCM_ERROR = {
    "PCM_U8": 2**-7,
    "PCM_S8": 2**-7,
    "PCM_16": 2**-15,
    "PCM_24": 2**-23,
    "PCM_32": 2**-24,
    "FLOAT": 0,
    "DOUBLE": 0,
}
ENCODERS = {
    "a.m4a": "aac",
    "a.mp4": "aac",
    "a.aac": "aac",
    "a.webm": "libopus",
    "a.opus": "libopus",
    "a.mkv": "pcm_s16le",
    "a.mp3": "libmp3lame",
    "a.aiff": "pcm_s16be",
    "a.au": "pcm_s16be",
}


def tone(seconds: float, rate_hz: int = 16_000, channels: int = 1) -> np.ndarray:
    """Return 440 Hz and noise, float32 [n] or [n, channels], each channel quieter than the previous one."""
    count = round(seconds * rate_hz)
    noise = 0.01 * np.random.default_rng(7).standard_normal(count)
    mono = 0.5 * np.sin(2 * np.pi * 440 * np.arange(count) / rate_hz) + noise
    shaped = mono[:, None] * np.linspace(1, 0.5, channels) if channels > 1 else mono
    return shaped.astype(np.float32)


def encode(path: Path, samples: np.ndarray, rate_hz: int, codec: str, **options: str) -> Path:
    """Encode mono samples with one of FFmpeg's encoders, through PyAV."""
    with av.open(str(path), "w", options=options) as container:
        track = container.add_stream(codec, rate=rate_hz, layout="mono")
        whole = av.AudioFrame.from_ndarray((samples * 32767).astype(np.int16)[None], format="s16", layout="mono")
        whole.sample_rate = rate_hz
        resampler = av.AudioResampler(track.format, "mono", rate_hz, frame_size=track.frame_size or 1024)
        for frame in [*resampler.resample(whole), *resampler.resample(None)]:
            container.mux(track.encode(frame))
        container.mux(track.encode(None))
    return path


def truncate(path: Path, share: float = 0.6) -> Path:
    """Remove the end of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def read_error(path: Path, rate_hz: int = 16_000) -> str:
    """Return the message of the AudioError without the path; check that it is one sentence line that begins with it."""
    with pytest.raises(AudioError) as caught:
        list(stream_audio(path, rate_hz))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert message.endswith(".")
    return message.removeprefix(f"{path}: ")


# --- supported formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 8])
@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_wav_of_any_depth_and_channel_count_is_averaged(tmp_path, subtype, channels):
    samples = tone(0.3, channels=channels)
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype)
    expected = samples.reshape(len(samples), -1).mean(axis=1)
    got = load_audio(tmp_path / "a.wav")
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=PCM_ERROR[subtype] + 1e-7)


@pytest.mark.parametrize("subtype", ["PCM_S8", "PCM_16", "PCM_24"])
def test_flac(tmp_path, subtype):
    samples = tone(0.3, channels=2)
    soundfile.write(tmp_path / "a.flac", samples, 16_000, subtype)
    np.testing.assert_allclose(
        load_audio(tmp_path / "a.flac"), samples.mean(axis=1), rtol=0, atol=PCM_ERROR[subtype] + 1e-7
    )


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_ffmpeg_scales_every_depth_as_libsndfile_does(tmp_path, monkeypatch, subtype):
    soundfile.write(tmp_path / "a.wav", tone(0.3, channels=2), 16_000, subtype)
    by_libsndfile = load_audio(tmp_path / "a.wav")
    monkeypatch.setattr(decoders, "_open_sndfile", lambda *_: None)
    np.testing.assert_allclose(load_audio(tmp_path / "a.wav"), by_libsndfile, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", [*ENCODERS, "a.ogg"])
def test_lossy_formats_and_containers_keep_length_and_frequency(tmp_path, name):
    samples = tone(1.5, 48_000)
    if name == "a.ogg":
        soundfile.write(tmp_path / name, samples, 48_000)
    else:
        encode(tmp_path / name, samples, 48_000, ENCODERS[name])
    got = load_audio(tmp_path / name, 48_000)
    assert abs(len(got) - len(samples)) < 0.05 * 48_000
    spectrum = np.abs(np.fft.rfft(got[24_000:48_000]))
    assert np.argmax(spectrum) == 220  # 440 Hz in half a second
    assert np.sqrt(np.mean(got[24_000:48_000] ** 2)) == pytest.approx(0.354, rel=0.1)


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
@pytest.mark.parametrize(("resample", "quality"), [("best", "VHQ"), ("fast", "LQ")])
def test_streamed_resampling_equals_resampling_at_once(tmp_path, rate_hz, resample, quality):
    samples = tone(2.0, rate_hz)
    soundfile.write(tmp_path / "a.wav", samples, rate_hz, "FLOAT")
    got = load_audio(tmp_path / "a.wav", resample=resample)
    expected = soxr.resample(samples, rate_hz, 16_000, quality=quality)
    assert len(got) == len(expected)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("block_s", [0.001, 0.1, 0.77, 3.0, 10.0])
def test_streamed_blocks_have_the_requested_length(tmp_path, block_s):
    soundfile.write(tmp_path / "a.wav", tone(3.0, 44_100, 2), 44_100)
    blocks = list(stream_audio(tmp_path / "a.wav", block_s=block_s))
    size = max(MIN_SAMPLES, round(block_s * 16_000))
    assert {len(block) for block in blocks[:-1]} <= {size}
    assert 0 < len(blocks[-1]) <= size
    np.testing.assert_array_equal(np.concatenate(blocks), load_audio(tmp_path / "a.wav"))


def test_ten_minutes_stream_in_bounded_memory(tmp_path):
    with soundfile.SoundFile(tmp_path / "long.wav", "w", 44_100, 2) as file:
        for _ in range(60):
            file.write(np.zeros((441_000, 2), np.int16))
    length = 0
    tracemalloc.start()
    try:
        for block in stream_audio(tmp_path / "long.wav", resample="fast"):
            length += len(block)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert length == 600 * 16_000
    assert peak < 20e6


def test_chained_ogg_streams_are_read_to_the_end(tmp_path):
    # libsndfile stops after the first stream
    soundfile.write(tmp_path / "one.ogg", tone(1.0), 16_000)
    (tmp_path / "two.ogg").write_bytes((tmp_path / "one.ogg").read_bytes() * 2)
    assert len(load_audio(tmp_path / "two.ogg")) == pytest.approx(32_000, abs=800)


def test_mp3_without_a_length_header_is_read_to_the_end(tmp_path):
    # Quiet, then loud, at a variable bit rate: libsndfile estimates the length from the first frames and stops there.
    samples = np.concatenate(
        [tone(1.0) * 1e-3, 0.3 * np.random.default_rng(0).standard_normal(64_000).astype(np.float32)]
    )
    encode(tmp_path / "a.mp3", samples, 16_000, "libmp3lame", write_xing="0")
    assert probe_audio(tmp_path / "a.mp3").duration_s is None
    assert len(load_audio(tmp_path / "a.mp3")) == pytest.approx(len(samples), abs=3_000)


def test_joined_mp3s_are_read_to_the_end(tmp_path):
    encode(tmp_path / "a.mp3", tone(2.0), 16_000, "libmp3lame")
    (tmp_path / "b.mp3").write_bytes((tmp_path / "a.mp3").read_bytes() * 2)
    assert len(load_audio(tmp_path / "b.mp3")) == pytest.approx(64_000, abs=3_000)


@pytest.mark.parametrize("claimed", [0, 0x7FFF_F000, 0x8000_0000, 0xFFFF_FFFF])
def test_wav_written_to_a_pipe_states_no_duration(tmp_path, claimed):
    soundfile.write(tmp_path / "a.wav", tone(1.0), 16_000)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    at = data.index(b"data") + 4
    data[4:8] = data[at : at + 4] = claimed.to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(data)
    assert len(load_audio(tmp_path / "a.wav")) == 16_000


def test_a_file_name_that_looks_like_a_url_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encode(tmp_path / "plain.m4a", tone(1.0), 16_000, "aac").rename(tmp_path / "http:a?b=%20 ż.m4a")
    assert len(load_audio("http:a?b=%20 ż.m4a")) == pytest.approx(16_000, abs=2_048)


def test_the_name_does_not_decide_the_format(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(1.0), 16_000)
    (tmp_path / "a.mp3").write_bytes((tmp_path / "a.wav").read_bytes())
    assert len(load_audio(tmp_path / "a.mp3")) == 16_000


@pytest.mark.parametrize(
    "samples",
    [np.zeros(16_000), np.sign(np.random.default_rng(0).standard_normal(16_000)), tone(1.0, channels=8)],
    ids=["silence", "one-bit noise", "eight channels"],
)
def test_unusual_recordings_are_read(tmp_path, samples):
    soundfile.write(tmp_path / "a.wav", samples, 16_000, "FLOAT")
    assert len(load_audio(tmp_path / "a.wav")) == 16_000


# --- errors --------------------------------------------------------------------------------------------------


def test_missing_empty_folder_and_text_raise(tmp_path):
    assert read_error(tmp_path / "nothing.wav").startswith("does not exist.")
    assert read_error(tmp_path).startswith("is a folder")
    (tmp_path / "empty.wav").touch()
    assert read_error(tmp_path / "empty.wav").startswith("is empty (0 bytes).")
    (tmp_path / "text.mp3").write_text("Litwo! Ojczyzno moja! ty jesteś jak zdrowie.\n" * 50)
    assert read_error(tmp_path / "text.mp3")


def test_file_without_read_permission_raises(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(1.0), 16_000)
    (tmp_path / "a.wav").chmod(0)
    with unprivileged():
        message = read_error(tmp_path / "a.wav")
    assert message == "cannot be opened (Permission denied). Check its permissions."


@given(
    data=st.binary(min_size=1, max_size=400),
    magic=st.sampled_from([b"", b"RIFF", b"OggS", b"fLaC", b"ID3\4", b"\xff\xfb"]),
)
def test_any_bytes_raise_audio_error(tmp_path_factory, data, magic):
    path = tmp_path_factory.getbasetemp() / "bytes.mp3"
    path.write_bytes(magic + data)
    assert read_error(path)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", *ENCODERS])
def test_damaged_bytes_are_read_or_raises(tmp_path, name):
    path = tmp_path / name
    if name in ("a.wav", "a.flac", "a.ogg"):
        soundfile.write(path, tone(1.0), 16_000)
    else:
        encode(path, tone(1.0, 48_000), 48_000, ENCODERS[name])
    whole = path.read_bytes()
    draw = np.random.default_rng(0)
    for reach in [256] * 12 + [len(whole)] * 12:  # the header, then anywhere
        data = np.frombuffer(whole, np.uint8).copy()
        at = draw.integers(0, min(reach, len(data)), 4)
        data[at] = draw.integers(0, 256, 4)
        path.write_bytes(data.tobytes())
        with contextlib.suppress(AudioError):
            assert np.isfinite(load_audio(path)).all()


def test_a_playlist_opens_nothing(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(1.0), 16_000)
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:1,\n{tmp_path / 'a.wav'}\n#EXT-X-ENDLIST\n")
    assert read_error(tmp_path / "list.m3u8")


def test_more_planar_channels_than_pyav_can_hold_raise(tmp_path):
    soundfile.write(tmp_path / "a.ogg", tone(0.5, channels=16), 16_000)
    assert read_error(tmp_path / "a.ogg").startswith("has 16 channels; at most 8 are supported for its codec.")


def test_video_without_sound_raises(tmp_path):
    with av.open(str(tmp_path / "film.mp4"), "w") as container:
        track = container.add_stream("mpeg4", rate=25)
        track.width = track.height = 64
        track.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        container.mux(track.encode(frame))
        container.mux(track.encode(None))
    assert read_error(tmp_path / "film.mp4").startswith("has no audio stream")


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.aiff"])
def test_recording_without_samples_raises(tmp_path, name):
    soundfile.write(tmp_path / name, np.zeros(0), 16_000)
    assert read_error(tmp_path / name)


@pytest.mark.parametrize(("count", "rate_hz"), [(1, 16_000), (MIN_SAMPLES - 1, 16_000), (1100, 44_100), (1, 96_000)])
def test_recording_shorter_than_the_receptive_field_raises(tmp_path, count, rate_hz):
    soundfile.write(tmp_path / "a.wav", np.ones(count) / 2, rate_hz)
    assert read_error(tmp_path / "a.wav").startswith("is too short: ")


def test_the_shortest_recording_is_read(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(MIN_SAMPLES), 16_000)
    assert len(load_audio(tmp_path / "a.wav")) == MIN_SAMPLES


@pytest.mark.parametrize("name", ["a.wav", "a.rf64", "a.flac", "a.aiff", "a.au", "a.mp3", "a.m4a", "a.mkv", "a.webm"])
def test_truncation_is_reported_with_both_durations(tmp_path, name):
    path = tmp_path / name
    if name in ("a.wav", "a.rf64", "a.flac"):
        soundfile.write(path, tone(5.0, 48_000), 48_000, "PCM_16", format=name[2:])
    else:
        index_first = {"movflags": "faststart"} if name == "a.m4a" else {}
        encode(path, tone(5.0, 48_000), 48_000, ENCODERS[name], **index_first)
    whole = probe_audio(path).duration_s
    assert whole == pytest.approx(5.0, abs=0.1)
    message = read_error(truncate(path))
    promised, decoded = (float(part.split()[-1]) for part in message.split(" s")[:2])
    assert message.startswith("is cut off: its header promises ")
    assert promised == pytest.approx(5.0, abs=0.1)
    assert 2.0 < decoded < 3.6


@pytest.mark.parametrize("share", [0.3, 0.6, 0.99])
@pytest.mark.parametrize("name", ["a.ogg", "a.opus"])
def test_ogg_without_its_last_page_is_refused_at_once(tmp_path, name, share):
    if name == "a.ogg":
        soundfile.write(tmp_path / name, tone(5.0), 16_000)
    else:
        encode(tmp_path / name, tone(5.0, 48_000), 48_000, "libopus")
    with pytest.raises(AudioError, match="is cut off: its last page does not end the stream"):
        next(stream_audio(truncate(tmp_path / name, share)))


def test_ogg_that_lost_a_page_in_the_middle_raises(tmp_path):
    soundfile.write(tmp_path / "a.ogg", tone(5.0), 16_000)
    pages = (tmp_path / "a.ogg").read_bytes().split(b"OggS")
    (tmp_path / "a.ogg").write_bytes(b"OggS".join(pages[:4] + pages[5:]))
    assert read_error(tmp_path / "a.ogg").startswith("is cut off: its header promises 5.0 s")


def test_m4a_without_its_index_raises(tmp_path):
    assert read_error(truncate(encode(tmp_path / "a.m4a", tone(2.0), 16_000, "aac"))).startswith(
        "is not audio, or its index"
    )


def test_aac_that_breaks_inside_a_frame_raises(tmp_path):
    path = encode(tmp_path / "a.aac", tone(2.0), 16_000, "aac")
    path.write_bytes(path.read_bytes()[:-50])
    assert read_error(path).startswith("cannot be decoded after ")


def test_damage_in_the_middle_of_a_flac_raises(tmp_path):
    soundfile.write(tmp_path / "a.flac", tone(5.0), 16_000)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4000] = bytes(4000)
    (tmp_path / "a.flac").write_bytes(data)
    assert read_error(tmp_path / "a.flac")


@pytest.mark.parametrize(
    ("rate_hz", "channels"), [(0, 1), (99, 1), (768_001, 1), (2**32 - 1, 1), (16_000, 0), (16_000, 1025)]
)
def test_invalid_headers_are_rejected(tmp_path, rate_hz, channels):
    soundfile.write(tmp_path / "a.wav", tone(1.0), 16_000)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    at = data.index(b"fmt ") + 10
    data[at : at + 6] = channels.to_bytes(2, "little") + rate_hz.to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(data)
    assert read_error(tmp_path / "a.wav").startswith(f"has an invalid header: {rate_hz} Hz, {channels} channels")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_nan_and_infinity_are_reported_with_their_position(tmp_path, value, subtype):
    samples = tone(3.0, channels=2).astype(np.float64)
    samples[36_000:, 1] = value
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype)
    assert read_error(tmp_path / "a.wav").startswith("holds a sample that is not a number at 2.25 s.")


def test_a_name_with_a_line_break_keeps_the_error_on_one_line(tmp_path):
    with pytest.raises(AudioError) as caught:
        load_audio(tmp_path / "two\nlines.wav")
    assert "\n" not in str(caught.value)


# --- probe, find, normalize, is_silent --------------------------------------------------------------------------------


def test_probe_reads_the_header(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(1.5, 44_100, 2), 44_100)
    assert probe_audio(tmp_path / "a.wav") == decoders.AudioInfo(1.5, 44_100, 2, "wav")
    soundfile.write(tmp_path / "a.ogg", tone(1.5), 16_000)
    assert probe_audio(tmp_path / "a.ogg") == decoders.AudioInfo(1.5, 16_000, 1, "ogg")
    encode(tmp_path / "b.aac", tone(1.5), 16_000, "aac")
    assert probe_audio(tmp_path / "b.aac") == decoders.AudioInfo(None, 16_000, 1, "aac")


def test_find_lists_folders_sorted_and_keeps_files(tmp_path):
    for name in ("b.wav", "a.MP3", "in/c.flac", "in/notes.txt", ".hidden.wav", "._b.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    notes = tmp_path / "in/notes.txt"
    expected = [notes, tmp_path / "a.MP3", tmp_path / "b.wav", tmp_path / "in/c.flac"]
    assert find_audio_files([notes, tmp_path, str(tmp_path / "b.wav")]) == expected
    assert find_audio_files([]) == []


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: None], ids=["empty folder", "missing"])
def test_find_raises_without_audio_files(tmp_path, make: Callable[[Path], None]):
    make(tmp_path / "x")
    with pytest.raises(AudioError, match=r"^.*/x: (holds no audio file|does not exist)\. "):
        find_audio_files([tmp_path / "x"])


@pytest.mark.parametrize("count", [1, 63, 4097, 160_001])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-6, 0.0), (0.1, 0.7), (0.0, 0.3)])
def test_normalize_is_transformers_bit_for_bit(count, scale, offset):
    samples = (scale * np.random.default_rng(count).standard_normal(count) + offset).astype(np.float32)
    (expected,) = Wav2Vec2FeatureExtractor.zero_mean_unit_var_norm([samples], None)
    got = normalize(samples)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected)
    through = Wav2Vec2FeatureExtractor(return_attention_mask=True)(samples, sampling_rate=16_000, return_tensors="np")
    np.testing.assert_array_equal(got, through.input_values[0])


@pytest.mark.parametrize(("dbfs", "silent"), [(-81, True), (-79, False), (-20, False)])
def test_silence_is_measured_around_the_mean(dbfs, silent):
    noise = np.random.default_rng(0).standard_normal(16_000)
    noise = (noise - noise.mean()) / noise.std() * 10 ** (dbfs / 20)
    assert is_silent((0.25 + noise).astype(np.float32)) is silent
    assert is_silent(np.zeros(0, np.float32))
    assert is_silent(np.full(16_000, 0.5, np.float32))
