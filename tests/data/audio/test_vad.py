"""Silero VAD without torch equals the silero package; windows tile any stream and end in silence."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from mowa.data.audio import MIN_SAMPLES, vad
from mowa.data.audio.vad import FRAME_SAMPLES, MIN_TAIL_S, RATE_HZ, SileroVAD, Window, split_windows
from mowa.errors import MissingDependency

HOP = 320


def voice(seconds: float, seed: int = 0) -> np.ndarray:
    """Synthesize audio that Silero classifies as speech: harmonics of a gliding pitch, moving formants, syllables."""
    t = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    draw = np.random.default_rng(seed)
    pitch = 120 + 25 * np.sin(2 * np.pi * 0.7 * t)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE_HZ
    first = 500 + 250 * np.sin(2 * np.pi * 2.3 * t)
    second = 1500 + 500 * np.sin(2 * np.pi * 1.7 * t + 1)
    sound = np.zeros_like(t)
    for harmonic in range(1, 30):
        at = harmonic * pitch
        gain = np.exp(-(((at - first) / 150) ** 2)) + 0.5 * np.exp(-(((at - second) / 200) ** 2))
        sound += (gain + 0.02) * np.sin(harmonic * phase)
    syllables = np.clip(np.sin(2 * np.pi * 4 * t) + 0.6, 0, 1)
    return (0.1 * sound * syllables + 1e-3 * draw.standard_normal(len(t))).astype(np.float32)


def hush(seconds: float) -> np.ndarray:
    noise = np.random.default_rng(1).standard_normal(round(seconds * RATE_HZ))
    return (1e-3 * noise).astype(np.float32)


def split(samples: np.ndarray, sizes: list[int]) -> Iterator[np.ndarray]:
    """Yield the samples in blocks of these sizes, cycling through them."""
    at = number = 0
    while at < len(samples):
        yield samples[at : at + sizes[number % len(sizes)]]
        at += sizes[number % len(sizes)]
        number += 1


# --- the detector -----------------------------------------------------------------------------------------------------


def test_detector_equals_the_silero_package():
    import torch
    from silero_vad.utils_vad import OnnxWrapper

    sound = np.concatenate([hush(0.5), voice(2.0), hush(0.5)])[: 93 * FRAME_SAMPLES]
    single_frame = vad._model_file().with_name("silero_vad.onnx")
    reference = OnnxWrapper(str(single_frame), force_onnx_cpu=True)
    expected = [reference(torch.from_numpy(block), RATE_HZ).item() for block in sound.reshape(-1, FRAME_SAMPLES)]
    np.testing.assert_allclose(SileroVAD().feed(sound), expected, atol=1e-5)


def test_detector_imports_neither_torch_nor_silero():
    script = (
        "import sys, numpy; from mowa.data.audio.vad import SileroVAD;"
        "assert len(SileroVAD().feed(numpy.zeros(16000, 'float32'))) == 31;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'torchaudio', 'silero_vad')))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize(
    ("sound", "low", "high"),
    [
        (voice(3.0), 0.9, 1.0),
        (hush(3.0), 0.0, 0.2),
        (100 * hush(3.0), 0.0, 0.2),
        (np.zeros(3 * RATE_HZ, np.float32), 0.0, 0.2),
        (np.sin(2 * np.pi * 440 / RATE_HZ * np.arange(3 * RATE_HZ)).astype(np.float32), 0.0, 0.2),
    ],
    ids=["voice", "hush", "noise", "silence", "tone"],
)
def test_detector_separates_speech_from_other_audio(sound, low, high):
    assert low <= SileroVAD().feed(sound).max() <= high


@given(sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=8).filter(any))
@settings(max_examples=15, deadline=None)
def test_splitting_the_stream_changes_nothing(sizes):
    sound = np.concatenate([voice(0.5), hush(0.3)])
    detector = SileroVAD()
    parts = [detector.feed(block) for block in split(sound, sizes)]
    np.testing.assert_array_equal(np.concatenate(parts), SileroVAD().feed(sound))


def test_a_missing_model_file_raises(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingDependency, match="pip install"):
        SileroVAD()


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 22_050, 24_000, 44_100, 48_000])
def test_other_rates_are_resampled_for_the_detector(rate_hz):
    """The probabilities are those of audio that soxr resampled; at 8 kHz there is nothing above 4 kHz to detect."""
    sound = soxr.resample(np.concatenate([hush(0.5), voice(2.0), hush(1.5)]), RATE_HZ, rate_hz)
    detector = SileroVAD(rate_hz)
    assert detector.frame_samples == pytest.approx(0.032 * rate_hz, abs=0.5)
    found = np.concatenate([detector.feed(part) for part in split(sound, [1, 5000, 100])])
    expected = SileroVAD().feed(soxr.resample(sound, rate_hz, RATE_HZ))
    assert len(found) == len(sound) // detector.frame_samples
    count = min(len(found), len(expected))
    assert np.abs(found[:count] - expected[:count]).mean() < 0.05
    assert ((found > 0.5)[:count] == (expected > 0.5)[:count]).mean() > 0.96


@pytest.mark.parametrize("rate_hz", [8_000, 48_000])
def test_resampled_frames_have_no_aliases(rate_hz):
    detector, tone = SileroVAD(rate_hz), np.sin(2 * np.pi * 1000 * np.arange(rate_hz) / rate_hz).astype(np.float32)
    delay = (detector._filters.shape[1] - detector.frame_samples) / 2 / rate_hz
    got = detector._resample(tone)
    expected = np.sin(2 * np.pi * 1000 * (np.arange(len(got)) / RATE_HZ - delay))
    assert np.abs(got - expected)[200:].max() < 1e-3
    above = detector._resample(np.sin(2 * np.pi * 11_000 * np.arange(rate_hz) / rate_hz).astype(np.float32))
    assert rate_hz == 8_000 or np.abs(above[200:]).max() < 1e-3


def test_the_state_of_a_resampling_detector_can_be_assigned():
    sound, one, other = soxr.resample(voice(1.0), RATE_HZ, 8_000), SileroVAD(8_000), SileroVAD(8_000)
    whole = SileroVAD(8_000).feed(sound)
    first = one.feed(sound[:3001])
    other.state = one.state
    np.testing.assert_allclose(np.concatenate([first, other.feed(sound[3001:])]), whole, atol=1e-5)


# --- the windows ------------------------------------------------------------------------------------------------------


def check_laws(
    found: list[Window], sound: np.ndarray, max_window_s: float = 20.0, context_s: float = 2.0, hop: int = HOP
) -> None:
    """Check what holds for every stream: tiling, alignment, content, bounds."""
    longest, tail = max_window_s * RATE_HZ, MIN_TAIL_S * RATE_HZ
    assert [window.is_last for window in found] == [False] * (len(found) - 1) + [True]
    edges = [0, *(window.core_end for window in found)]
    assert [window.core_start for window in found] == edges[:-1]
    assert edges[-1] == len(sound)
    for window in found:
        end = window.start + len(window.samples)
        assert window.start % hop == window.core_start % hop == 0
        assert window.start <= window.core_start < window.core_end <= end <= len(sound)
        assert window.core_end - window.core_start <= longest + tail * window.is_last
        assert len(window.samples) <= longest + tail + 2 * (max(context_s * RATE_HZ, hop + MIN_SAMPLES) + hop)
        assert window.core_start - window.start >= min(int(context_s * RATE_HZ), window.core_start)
        assert window.samples.dtype == np.float32
        assert 0.0 <= window.speech_prob <= 1.0
        np.testing.assert_array_equal(window.samples, sound[window.start : end])
        if not window.is_last:
            assert window.core_end % hop == 0
            assert window.core_end - window.core_start >= longest / 2 - hop
            assert end - window.core_end >= hop + MIN_SAMPLES
            assert end - window.core_end >= min(int(context_s * RATE_HZ), len(sound) - window.core_end)
    if len(found) > 1:
        assert found[-1].core_end - found[-1].core_start >= tail


@given(
    count=st.integers(1, 6 * RATE_HZ),
    spoken=st.lists(st.floats(0, 6), max_size=4),
    sizes=st.lists(st.integers(1, 40_000), min_size=1, max_size=4),
    max_window_s=st.floats(1.0, 3.0),
    context_s=st.floats(0.0, 1.5),
    hop=st.sampled_from([1, 160, 320, 640]),
)
@settings(max_examples=40, deadline=None)
def test_windows_tile_any_stream(count, spoken, sizes, max_window_s, context_s, hop):
    sound = hush(6.0)
    for at in spoken:
        piece = voice(0.4)[: len(sound) - round(at * RATE_HZ)]
        sound[round(at * RATE_HZ) :][: len(piece)] += piece
    sound = sound[:count]
    sizes = [max(size, 200) for size in sizes]
    found = list(split_windows(split(sound, sizes), RATE_HZ, max_window_s=max_window_s, context_s=context_s, hop=hop))
    check_laws(found, sound, max_window_s, context_s, hop)
    for window, same in zip(
        found,
        split_windows([sound], RATE_HZ, max_window_s=max_window_s, context_s=context_s, hop=hop),
        strict=True,
    ):
        np.testing.assert_array_equal(window.samples, same.samples)
        assert (window.start, window.core_start, window.core_end, window.is_last, window.speech_prob) == (
            (same.start, same.core_start, same.core_end, same.is_last, same.speech_prob)
        )


@pytest.mark.parametrize("count", [1, 63, 399, 400, 512, 513, 4097, 20 * RATE_HZ - 1, 20 * RATE_HZ])
def test_short_recordings_are_one_window(count):
    sound = np.tile(hush(1.0), 20)[:count]
    (window,) = split_windows([sound], RATE_HZ)
    assert (window.start, window.core_start, window.core_end, window.is_last) == (0, 0, count, True)
    np.testing.assert_array_equal(window.samples, sound)


@pytest.mark.parametrize("blocks", [[], [np.zeros(0, np.float32)]])
def test_no_samples_no_windows(blocks):
    assert list(split_windows(blocks, RATE_HZ)) == []


@pytest.mark.parametrize("beyond_s", [0.0, 0.01, 0.5, 1.0, 1.01, 2.0, 2.5])
def test_the_last_window_is_not_short(beyond_s):
    sound = np.tile(hush(1.0), 23)[: round((20 + beyond_s) * RATE_HZ)]
    found = list(split_windows([sound], RATE_HZ))
    check_laws(found, sound)
    assert len(found) == (1 if beyond_s <= MIN_TAIL_S else 2)


def test_the_cut_is_in_the_middle_of_the_max_window_silence():
    # silences of 0.3 s and 0.8 s in the second half of a 6 s window
    sound = np.concatenate([voice(3.5), hush(0.3), voice(0.7), hush(0.8), voice(4.0)])
    first, *_ = split_windows([sound], RATE_HZ, max_window_s=6.0)
    assert first.core_end / RATE_HZ == pytest.approx(3.5 + 0.3 + 0.7 + 0.4, abs=0.15)
    assert first.speech_prob > 0.9


def test_without_silence_windows_end_at_the_lowest_probability(monkeypatch):
    probabilities = np.full(1000, 0.9, np.float32)
    probabilities[150] = 0.6
    monkeypatch.setattr(SileroVAD, "feed", lambda self, samples: probabilities[: len(samples) // FRAME_SAMPLES])
    first, *_ = split_windows([hush(512 * 1000 / RATE_HZ)], RATE_HZ, max_window_s=6.0)
    assert abs(first.core_end - (150 * FRAME_SAMPLES + FRAME_SAMPLES // 2)) <= HOP / 2


@pytest.mark.parametrize("rate_hz", [8_000, 22_050, 48_000])
def test_windows_of_other_rates_end_in_silence_too(rate_hz):
    sound = np.concatenate([voice(3.5), hush(0.3), voice(0.7), hush(0.8), voice(4.0)])
    resampled = soxr.resample(sound, RATE_HZ, rate_hz)
    found = list(split_windows([resampled], rate_hz, max_window_s=6.0, hop=rate_hz // 50))
    assert found[0].core_end / rate_hz == pytest.approx(3.5 + 0.3 + 0.7 + 0.4, abs=0.15)
    assert found[0].speech_prob > 0.9
    assert sum(window.core_end - window.core_start for window in found) == len(resampled)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 400, 20 * 8_000 + 1])
def test_short_recordings_of_other_rates_are_one_window(count):
    (window,) = split_windows([np.tile(hush(1.0), 20)[:count]], 8_000)
    assert (window.core_start, window.core_end, window.is_last) == (0, count, True)


def test_speech_probability_is_that_of_the_core():
    sound = np.concatenate([voice(4.0), hush(8.0)])
    found = list(split_windows([sound], RATE_HZ, max_window_s=6.0, context_s=3.0))
    check_laws(found, sound, 6.0, 3.0)
    assert found[0].speech_prob > 0.9
    assert found[-1].speech_prob < 0.2
    assert found[-1].start < 4.0 * RATE_HZ  # its context includes speech


def test_memory_is_bounded_by_the_window():
    block = hush(1.0)
    tracemalloc.start()
    try:
        ends = [window.core_end for window in split_windows((block for _ in range(150)), RATE_HZ)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert ends[-1] == 150 * RATE_HZ
    assert peak < 3 * (20 + 2 * 2 + 1) * RATE_HZ * 4  # three copies: the buffer, the joined buffer, the window


def test_windows_of_half_a_second_raise():
    with pytest.raises(ValueError, match="max_window_s"):
        next(split_windows([hush(1.0)], RATE_HZ, max_window_s=0.5))
