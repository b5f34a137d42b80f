"""Times of audio are those of its container: holes in timestamps are silence, and audio may begin after the picture."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from mowa.data import audio
from mowa.data.audio import headers, timestamps
from mowa.data.audio.decoders import AudioBytes
from mowa.data.audio.timestamps import MAX_HOLES_S, Timeline
from mowa.data.inputs import network
from mowa.errors import AudioError

RATE_HZ = 48_000
CONTAINERS = {  # with a codec whose frames are complete without their neighbors
    "a.webm": "libopus",
    "a.mkv": "aac",
    "pcm.mkv": "pcm_s16le",
    "a.mp4": "aac",
    "a.m4a": "aac",
    "flac.mp4": "flac",
    "a.ogg": "libopus",
    "a.ts": "aac",
    "a.flv": "aac",
    "a.mpg": "mp2",
}
WITH_VIDEO = ("a.webm", "a.mkv", "pcm.mkv", "a.mp4", "a.mov", "a.ts")


def tone(seconds: float, rate_hz: int = RATE_HZ) -> np.ndarray:
    """Return 440 Hz and noise as int16 [1, n]."""
    count = round(seconds * rate_hz)
    noise = 0.01 * np.random.default_rng(7).standard_normal(count)
    return ((0.3 * np.sin(2 * np.pi * 440 * np.arange(count) / rate_hz) + noise) * 32767).astype(np.int16)[None]


def packets(track, sound: np.ndarray, rate_hz: int, moved: Callable[[float], float]) -> list[av.Packet]:
    """Encode, and move the packet at t seconds to `moved(t)`."""
    whole = av.AudioFrame.from_ndarray(sound, format="s16", layout="mono")
    whole.sample_rate, whole.time_base, whole.pts = rate_hz, Fraction(1, rate_hz), 0
    resampler = av.AudioResampler(track.format, "mono", rate_hz, frame_size=track.frame_size or 960)
    frames = [*resampler.resample(whole), *resampler.resample(None), None]
    found = [packet for frame in frames for packet in track.encode(frame)]
    for packet in found:
        at_s = float(packet.pts * packet.time_base)
        packet.pts = packet.dts = packet.pts + round((moved(at_s) - at_s) / packet.time_base)
    return found


def write(
    path: Path,
    codec: str = "libopus",
    moved: Callable[[float], float] = lambda at_s: at_s,
    *,
    seconds: float = 3.0,
    rate_hz: int = RATE_HZ,
    picture: bool = False,
) -> Path:
    """Write a recording whose timestamps are moved, with black video from 0 to its end if `picture`."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libvpx" if path.suffix == ".webm" else "mpeg4", rate=25) if picture else None
        track = container.add_stream(codec, rate=rate_hz, layout="mono")
        written = packets(track, tone(seconds, rate_hz), rate_hz, moved)
        if video is not None:
            video.width = video.height = 32
            video.pix_fmt = "yuv420p"
            black = [av.VideoFrame(32, 32, "yuv420p") for _ in range(round(25 * moved(seconds)))]
            for number, frame in enumerate(black):
                frame.pts = number
            written += [packet for frame in [*black, None] for packet in video.encode(frame)]
        for packet in sorted(written, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)
    return path


def hole(at_s: float, length_s: float) -> Callable[[float], float]:
    return lambda time_s: time_s + (length_s if time_s >= at_s else 0)


def padded_by_ffmpeg(path: Path, start_s: float | None = None) -> np.ndarray:
    """Decode with FFmpeg, which pads with silence by timestamp from `start_s` (None: the first frame) on."""
    first = "" if start_s is None else f":first_pts={round(start_s * RATE_HZ)}"
    with av.open(str(path)) as container:
        graph = av.filter.Graph()
        source = graph.add_abuffer(template=container.streams.audio[0])
        pad, end = (
            graph.add("aresample", f"async=1:min_hard_comp={timestamps.MIN_HOLE_S}{first}"),
            graph.add("abuffersink"),
        )
        source.link_to(pad)
        pad.link_to(end)
        graph.configure()
        parts = []
        for frame in [*container.decode(audio=0), None]:
            graph.push(frame)
            while True:
                try:
                    parts.append(graph.pull().to_ndarray())
                except (av.BlockingIOError, av.EOFError):
                    break
    joined = np.concatenate(parts, axis=1).mean(axis=0)
    return joined / 2**15 if parts[0].dtype == np.int16 else joined / 2**31 if parts[0].dtype == np.int32 else joined


def silences(samples: np.ndarray, rate_hz: int = RATE_HZ) -> list[tuple[float, float]]:
    """Return (start, length) in seconds of the runs of zeros that last 50 ms or more."""
    edges = np.flatnonzero(np.diff(np.r_[False, np.abs(samples) < 1e-6, False].astype(int)))
    return [(start / rate_hz, (end - start) / rate_hz) for start, end in edges.reshape(-1, 2) if end - start > 2400]


# --- holes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_hole_is_silence_as_in_ffmpeg(tmp_path, name):
    path = write(tmp_path / name, CONTAINERS[name], hole(1.0, 2.5))
    got, expected = audio.load_audio(path, RATE_HZ), padded_by_ffmpeg(path)
    assert len(got) == pytest.approx(
        len(expected), abs=0.02 * RATE_HZ
    )  # FFmpeg fills whole milliseconds here and there
    ((start_s, length_s),) = silences(got)
    assert (start_s, length_s) == pytest.approx(silences(expected)[0], abs=0.01)
    np.testing.assert_allclose(got[: RATE_HZ // 2], expected[: RATE_HZ // 2], atol=1e-6)
    assert len(got) / RATE_HZ == pytest.approx(5.5, abs=0.06)


def test_many_short_holes_do_not_add_up(tmp_path):
    """Every third packet of 20 ms was lost: the times stay within 0.1 s of the container's."""
    path = write(tmp_path / "a.webm", moved=lambda at_s: at_s + 0.02 * (at_s // 0.06), seconds=6.0)
    assert len(audio.load_audio(path)) / 16_000 == pytest.approx(8.0, abs=0.12)


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("rate_hz", [8_000, 48_000])  # AAC of 8 kHz begins with 0.13 s of padding
def test_recordings_without_holes_are_the_decoded_frames_alone(tmp_path, name, rate_hz):
    path = write(tmp_path / name, CONTAINERS[name], rate_hz=48_000 if name == "a.mpg" else rate_hz)
    with av.open(str(path)) as container:
        decoded_hz = container.streams.audio[0].codec_context.sample_rate
        count = sum(frame.samples for frame in container.decode(audio=0))
    assert len(audio.load_audio(path, decoded_hz)) == count


def test_an_excerpt_is_counted_by_timestamp(tmp_path):
    path = write(tmp_path / "a.mkv", "pcm_s16le", hole(1.0, 2.5))
    whole = audio.load_audio(path, RATE_HZ)
    part = audio.load_audio(path, RATE_HZ, offset_s=3.0, duration_s=1.5)
    assert np.array_equal(part, whole[3 * RATE_HZ :][: len(part)])
    assert len(part) == 1.5 * RATE_HZ
    assert silences(part) == [(0.0, pytest.approx(0.5, abs=0.05))]


def test_equal_channels_are_found_across_a_hole(tmp_path):
    assert audio.find_distinct_channels(write(tmp_path / "a.mkv", "pcm_s16le", hole(1.0, 2.0))) == (0,)


@pytest.mark.parametrize("name", ["a.webm", "a.mkv", "a.mp4", "a.ogg"])
def test_the_stated_duration_is_that_with_the_hole(tmp_path, name):
    path = write(tmp_path / name, CONTAINERS[name], hole(1.0, 2.5))
    assert audio.probe_audio(path).duration_s == pytest.approx(5.5, abs=0.05)


@pytest.mark.parametrize("name", ["a.mkv", "a.webm"])
def test_a_recording_with_a_hole_may_still_be_cut_off(tmp_path, name):
    data = write(tmp_path / name, CONTAINERS[name], hole(1.0, 2.5), seconds=6.0).read_bytes()
    with pytest.raises(AudioError, match=r"is cut off: its header promises 8\.5 s, [67]\.. s could be decoded"):
        audio.load_audio(AudioBytes(name, data[: len(data) * 4 // 5]))


def test_a_long_hole_needs_no_memory_and_is_reported(tmp_path, caplog):
    path = write(tmp_path / "a.mkv", "pcm_s16le", hole(1.0, 1000.0), rate_hz=8_000)
    blocks = audio.stream_audio(path, 8_000, block_s=1.0)
    assert sum(map(len, blocks)) == 1003 * 8_000
    assert "a.mkv: has no audio for 1000.0 s in 1 place, by its timestamps: counted as silence." in caplog.text


def test_an_absurd_jump_is_ignored_and_reported(tmp_path, caplog):
    path = write(tmp_path / "a.mkv", "pcm_s16le", hole(1.0, 30 * 3600.0))
    assert len(audio.load_audio(path)) == 3 * 16_000
    assert "has a timestamp that jumps by 30.0 h at 1.0 s: ignored, since holes of more than 24 h" in caplog.text


def test_timestamps_that_go_back_are_reported_and_nothing_is_lost(tmp_path, caplog):
    path = write(tmp_path / "a.ts", "aac")
    whole = audio.load_audio(path)
    (tmp_path / "b.ts").write_bytes(path.read_bytes() * 2)
    assert len(audio.load_audio(tmp_path / "b.ts")) == pytest.approx(2 * len(whole), abs=1)
    assert "b.ts: has timestamps that go back by 3.0 s at 3.0 s: all audio is kept" in caplog.text


def test_chained_ogg_streams_may_have_holes(tmp_path, caplog):
    first = write(tmp_path / "a.ogg").read_bytes()
    second = write(tmp_path / "b.ogg", moved=hole(1.0, 0.5), seconds=2.0).read_bytes()
    samples = audio.load_audio(AudioBytes("chained.ogg", first + second), RATE_HZ)
    assert len(samples) / RATE_HZ == pytest.approx(5.5, abs=0.03)
    assert not caplog.records


def test_warnings_are_not_repeated(tmp_path, caplog):
    path = write(tmp_path / "a.mkv", "pcm_s16le", hole(1.0, 2.0))
    audio.load_audio(path)
    audio.load_audio(path, channel=0)
    assert len(caplog.records) == 1


def test_a_lost_ogg_page_is_no_hole(tmp_path):
    soundfile.write(tmp_path / "a.ogg", tone(5.0, 16_000)[0], 16_000)
    pages = (tmp_path / "a.ogg").read_bytes().split(b"OggS")
    assert not headers.lost_ogg_pages(io.BytesIO(b"OggS".join(pages)))
    assert not headers.lost_ogg_pages(io.BytesIO(b"OggS".join(pages) * 2))
    assert headers.lost_ogg_pages(io.BytesIO(b"OggS".join(pages[:4] + pages[5:])))


# --- audio that begins after the picture ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_audio_that_begins_after_the_picture_has_the_times_of_the_container(tmp_path, name):
    codec = CONTAINERS.get(name, "pcm_s16le")
    path = write(tmp_path / name, codec, lambda at_s: at_s + 2.0, picture=True)
    got, expected = audio.load_audio(path, RATE_HZ), padded_by_ffmpeg(path, 0.0)
    assert len(got) == pytest.approx(len(expected), abs=0.03 * RATE_HZ)
    ((start_s, length_s),) = silences(got)
    assert (start_s, length_s) == pytest.approx((0.0, 2.0), abs=0.05)
    duration_s = audio.probe_audio(path).duration_s
    assert duration_s is None or duration_s == pytest.approx(5.0, abs=0.05)


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_audio_that_begins_with_the_picture_is_not_moved(tmp_path, name):
    path = write(tmp_path / name, CONTAINERS.get(name, "pcm_s16le"), picture=True)
    with av.open(str(path)) as container:
        count = sum(frame.samples for frame in container.decode(audio=0))
    assert len(audio.load_audio(path, RATE_HZ)) == count


def test_audio_far_behind_a_large_picture_is_read(tmp_path):
    """FFmpeg looks for the start of streams in the first 5 MB only."""
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        video = container.add_stream("mjpeg", rate=25)
        video.width, video.height, video.pix_fmt = 64, 64, "yuvj420p"
        track = container.add_stream("pcm_s16le", rate=16_000, layout="mono")
        (image,) = video.encode(av.VideoFrame(64, 64, "yuvj420p"))
        for number in range(10):
            packet = av.Packet(bytes(image) + bytes(10**6))
            packet.stream, packet.time_base, packet.pts, packet.dts = video, Fraction(1, 25), number * 5, number * 5
            container.mux(packet)
        for packet in packets(track, tone(2.0, 16_000), 16_000, lambda at_s: at_s + 2.0):
            container.mux(packet)
    with av.open(str(tmp_path / "a.mkv")) as container:
        assert container.streams.audio[0].start_time == 0  # a guess: the audio starts at 2 s
    samples = audio.load_audio(tmp_path / "a.mkv")
    assert len(samples) == 4 * 16_000
    assert silences(samples, 16_000)[0] == (0.0, pytest.approx(2.0, abs=0.01))


@pytest.mark.parametrize("name", ["a.ts", "a.mpg", "a.flv"])
def test_audio_that_begins_behind_what_ffmpeg_probes_is_read(tmp_path, name):
    """FFmpeg reads the first 5 MB or seconds to find the streams of these formats, and their sample rates."""
    codecs = {"a.ts": ("mpeg2video", "aac"), "a.mpg": ("mpeg2video", "mp2"), "a.flv": ("flv", "aac")}
    with av.open(str(tmp_path / name), "w") as container:
        video = container.add_stream(codecs[name][0], rate=25)
        video.width, video.height, video.pix_fmt = 640, 480, "yuv420p"
        video.bit_rate = 40_000_000
        track = container.add_stream(codecs[name][1], rate=44_100, layout="mono")
        noise = np.random.default_rng(0).integers(0, 255, (480, 640, 3), np.uint8)
        image = av.VideoFrame.from_ndarray(noise, format="rgb24")
        for number in range(25 * 8):
            image.pts = number
            container.mux(video.encode(image))
        for packet in packets(track, tone(2.0, 44_100), 44_100, lambda at_s: at_s + 8.0):
            container.mux(packet)
    for source in (tmp_path / name, AudioBytes(name, (tmp_path / name).read_bytes())):
        samples = audio.load_audio(source)
        assert len(samples) == pytest.approx(10 * 16_000, abs=1600)
        assert silences(samples, 16_000)[0] == (0.0, pytest.approx(8.0, abs=0.1))


def test_a_recording_of_an_opus_stream_that_was_joined_late_is_whole(tmp_path):
    """FFmpeg counts the duration of Opus in Ogg from 0, where the stream had begun long before."""
    path = write(tmp_path / "a.ogg", moved=lambda at_s: at_s + 100.0)
    assert audio.probe_audio(path).duration_s == pytest.approx(3.0, abs=0.03)
    assert len(audio.load_audio(path)) == pytest.approx(48_000, abs=400)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(AudioError, match="is cut off"):
        audio.load_audio(path)


def test_a_cover_picture_does_not_move_the_audio(tmp_path):
    path = write(tmp_path / "a.mp4", "aac", lambda at_s: at_s + 2.0, picture=True)
    with av.open(str(path)) as container:
        assert timestamps.find_start_s(container) == 0.0
        container.streams.video[0].disposition = av.stream.Disposition.attached_pic
        assert timestamps.find_start_s(container) is None


# --- live streams -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.ts", "a.webm", "a.flv"])
def test_a_hole_in_a_live_stream_is_silence(tmp_path, name):
    data = write(tmp_path / name, CONTAINERS[name], hole(1.0, 2.5)).read_bytes()
    chunks = list(network.decode_stream(io.BytesIO(data), name))
    samples = np.concatenate([chunk.samples for chunk in chunks])
    assert not any(chunk.lost_s for chunk in chunks)
    assert np.array_equal(samples, audio.load_audio(AudioBytes(name, data), RATE_HZ))


def test_a_long_hole_in_a_live_stream_is_lost_audio(tmp_path):
    data = write(tmp_path / "a.ts", "aac", hole(1.0, 3600.0)).read_bytes()
    chunks = list(network.decode_stream(io.BytesIO(data), "a.ts"))
    assert sum(chunk.duration_s for chunk in chunks) == pytest.approx(3.0, abs=0.1)
    assert sum(chunk.lost_s for chunk in chunks) == pytest.approx(3600.0, abs=0.1)


# --- the timeline -----------------------------------------------------------------------------------------------------


def test_jitter_below_a_tenth_of_a_second_is_not_silence():
    timeline, random = Timeline(), np.random.default_rng(0)
    times = np.arange(500) * 0.02 + random.uniform(0, 0.09, 500)
    assert not any(timeline.place(float(time_s), 0.02) for time_s in times)
    assert not timeline.warnings()


def test_jitter_back_and_forth_does_not_add_up():
    timeline = Timeline()
    for number in range(1000):
        timeline.place(number * 0.02 + (0.2 if number % 2 else 0.0), 0.02)
    assert timeline.position_s == pytest.approx(20.2, abs=0.05)


def test_all_holes_of_a_recording_are_bounded():
    timeline = Timeline()
    for number in range(1000):
        timeline.place((number % 2) * 5 * 3600.0, 0.02)
    assert timeline.position_s < MAX_HOLES_S + 1000
    live = Timeline(live=True)
    for number in range(100):
        live.place(number * 3600.0, 0.02)
    assert live.position_s == pytest.approx(99 * 3600.0, abs=1)


def test_frames_without_timestamps_follow_each_other():
    timeline = Timeline()
    assert [timeline.place(one, 1.0) for one in (None, 1.0, None, 5.0)] == [0.0, 0.0, 0.0, 2.0]


def test_nothing_is_logged_about_common_recordings(tmp_path, caplog):
    caplog.set_level(logging.INFO, "mowa")
    audio.load_audio(write(tmp_path / "a.webm", moved=hole(1.0, 0.4)))  # a pause that Opus did not send
    assert not caplog.records
