"""Channels are averaged, except where they cancel each other."""

import io
import itertools

import av
import numpy as np
import pytest
import soundfile

import mowa
from mowa.data import audio
from mowa.data.audio.decoders import AudioBytes
from mowa.data.audio.mixing import LIVE_HALF_LIFE_S, ChannelMix, stack_mean
from mowa.data.inputs import network
from mowa.io.hub import SAMPLE_CLIP
from tests.data.audio.test_reader import tone

RATE_HZ = 16_000
_names = itertools.count()


def recording(
    *channels: np.ndarray, subtype: str = "FLOAT", format_name: str = "WAV", rate_hz: int = RATE_HZ
) -> AudioBytes:
    """Encode channels under a new name, since a warning is logged once."""
    encoded = io.BytesIO()
    soundfile.write(encoded, np.stack(channels, 1), rate_hz, format=format_name, subtype=subtype)
    return AudioBytes(f"recording {next(_names)}", encoded.getvalue())


def noise(seed: int, seconds: float = 3.0) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * RATE_HZ)).astype(np.float32)


def test_an_inverted_channel_is_left_out_with_a_warning(caplog):
    sound = tone(3.0)
    source = recording(0.5 * sound, -sound * 0.5)
    assert np.array_equal(audio.load_audio(source), 0.5 * sound)
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{source.name}: has channels that cancel each other when they are averaged, as where one is inverted: channel"
        " 0 alone is used there."
    )


def test_the_louder_channel_is_used():
    sound = tone(3.0)
    assert np.array_equal(audio.load_audio(recording(0.95 * sound, -sound)), -sound)


def test_an_inverted_channel_of_a_lossy_recording_is_left_out():
    sound = tone(3.0, 44_100)
    got = audio.load_audio(
        recording(sound, -sound, format_name="MP3", subtype="MPEG_LAYER_III", rate_hz=44_100), 44_100
    )
    assert np.sqrt(np.mean(got**2)) == pytest.approx(np.sqrt(np.mean(sound**2)), rel=0.02)


def test_a_mean_of_20_db_below_the_channels_is_cancelled():
    sound = tone(3.0)
    for gain, is_cancelled in ((0.85, True), (0.78, False)):  # -22.5 and -19.2 dB
        source = recording(sound, -gain * sound)
        assert (np.abs(audio.load_audio(source)).max() == np.abs(sound).max()) == is_cancelled


@pytest.mark.parametrize(
    "channels",
    [
        (noise(1), noise(2)),  # unrelated
        (noise(1), 0 * noise(1)),  # one silent
        (noise(1), -0.5 * noise(1)),
        (noise(1), *[0 * noise(1)] * 30),  # one of many: 30 dB below it
        (1e-4 * noise(1), -1e-4 * noise(1)),  # hum in a pause
    ],
)
def test_other_recordings_are_the_mean_of_their_channels(channels, caplog):
    got = audio.load_audio(recording(*channels))
    assert np.array_equal(got, np.stack(channels, 1).mean(axis=1))
    assert not caplog.records


def test_only_the_part_with_an_inverted_channel_is_not_averaged():
    left = np.concatenate([noise(1), noise(2), noise(3)])
    right = np.concatenate([noise(4), -noise(2), noise(5)])
    got, second = audio.load_audio(recording(left, right)), 3 * RATE_HZ
    assert np.array_equal(got[:second], (left[:second] + right[:second]) / 2)
    assert np.array_equal(got[second : 2 * second], left[second : 2 * second])
    assert np.array_equal(got[2 * second :], (left[2 * second :] + right[2 * second :]) / 2)


def test_an_excerpt_of_an_inverted_recording_equals_its_part():
    sound = tone(5.0)
    source = recording(sound, -sound)
    part = audio.load_audio(source, offset_s=1.3, duration_s=2.0)
    assert np.array_equal(part, sound[round(1.3 * RATE_HZ) :][: 2 * RATE_HZ])


def test_an_inverted_channel_changes_no_transcript():
    sound, rate_hz = soundfile.read(SAMPLE_CLIP, dtype="float32")
    inverted = recording(sound, -sound, rate_hz=rate_hz)
    engine = mowa.open_engine(mowa.load("pl-tiny"), device="cpu", dtype="float32")
    assert mowa.transcribe(io.BytesIO(inverted.data), engine).text == mowa.transcribe(SAMPLE_CLIP, engine).text


def test_recordings_that_change_their_channels_are_read():
    parts = []
    for layout in ("stereo", "mono"):
        encoded = io.BytesIO()
        with av.open(encoded, "w", format="adts") as container:
            track = container.add_stream("aac", rate=RATE_HZ, layout=layout)
            channels = 2 if layout == "stereo" else 1
            frame = av.AudioFrame.from_ndarray(
                np.tile(noise(1)[:16_384], (channels, 1)).astype(np.float32), format="fltp", layout=layout
            )
            frame.sample_rate = RATE_HZ
            for packet in [*track.encode(frame), *track.encode(None)]:
                container.mux(packet)
        parts.append(encoded.getvalue())
    source = AudioBytes("changing.aac", b"".join(parts))
    assert audio.probe_audio(source).channels == 2
    whole = audio.load_audio(source)
    assert len(audio.load_audio(source, channel=1)) == len(whole) > 32_000
    assert audio.find_distinct_channels(source) in ((0,), (0, 1))


def test_an_inverted_channel_is_no_other_channel():
    sound = tone(2.0)
    assert audio.find_distinct_channels(recording(sound, -sound, 0.5 * sound)) == (0, 2)
    opposite = np.concatenate([sound, -sound])
    assert audio.find_distinct_channels(recording(np.concatenate([sound, sound]), opposite)) == (0, 1)


# --- live -------------------------------------------------------------------------------------------------------------


def test_a_live_mix_switches_within_a_third_of_a_second(caplog):
    mix, sound = ChannelMix("microphone that is inverted", RATE_HZ, LIVE_HALF_LIFE_S), tone(2.0)
    stacked = stack_mean(np.stack([sound, -sound], 1), 2)
    got = np.concatenate([mix.mix(stacked[start : start + 512]) for start in range(0, len(sound), 512)])
    assert np.array_equal(got[RATE_HZ // 3 :], sound[RATE_HZ // 3 :])
    assert "microphone that is inverted: has channels that cancel each other" in caplog.text


def test_a_live_mix_returns_to_the_mean():
    mix = ChannelMix("line", RATE_HZ, LIVE_HALF_LIFE_S)
    left = np.concatenate([noise(1), noise(2)])
    right = np.concatenate([-noise(1), noise(3)])
    stacked = stack_mean(np.stack([left, right], 1), 2)
    got = np.concatenate([mix.mix(stacked[start : start + 512]) for start in range(0, len(left), 512)])
    assert np.array_equal(got[-RATE_HZ:], ((left + right) / 2)[-RATE_HZ:])


def test_a_live_recording_with_an_inverted_channel_is_not_silence():
    sound = tone(3.0)
    data = recording(sound, -sound).data
    got = np.concatenate([chunk.samples for chunk in network.decode_stream(io.BytesIO(data), f"live {next(_names)}")])
    assert np.array_equal(got[RATE_HZ // 2 :], sound[RATE_HZ // 2 :])
