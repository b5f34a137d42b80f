"""Live streams equal the net under its chunk mask, however audio is cut, wherever a stream is saved, in any engine."""

import threading
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mowa
from mowa.data import audio
from mowa.data.audio import running_norm
from mowa.decode import ctc
from mowa.decode.stream import EndpointConfig
from mowa.engines import onnx, streaming, streaming_encoders
from mowa.engines.streaming import StreamingConfig
from mowa.errors import ModelError
from mowa.io.hub import SAMPLE_CLIP as SAMPLE
from mowa.models.ctc_encoder.chunk_mask import ChunkConfig, apply_chunk_mask
from tests.checkpoints import clip
from tests.checkpoints import tiny as whole_tiny

QUICK = {"conv_dim": (16,) * 3, "conv_kernel": (10, 8, 8), "conv_stride": (5, 8, 8), "num_hidden_layers": 2}
TRAINED = {"chunk_frames": [8, 16], "left_context_frames": None, "lookahead_frames": [0, 4]}
SOUND = clip(5, 50_123)
ALL = EndpointConfig(vad=False)


def tiny(folder, **changes):
    return mowa.load(str(whole_tiny(folder, **QUICK | {"streaming": TRAINED} | changes)))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def engine(model):
    return mowa.open_engine(model, device="cpu", dtype="float32")


def through(encoder, sound, cuts):
    state, stable, start = encoder.start_utterance(None), [], 0
    for cut in (*cuts, len(sound)):
        state, new, _ = encoder.step(state, sound[start:cut], is_last=cut == len(sound))
        stable.append(new)
        start = cut
    return np.concatenate(stable)


def words(stream, sound, cuts=()):
    found, start = [], 0
    for cut in (*cuts, len(sound)):
        found += [word for event in stream.feed(sound[start:cut]) if event.is_final for word in event.words]
        start = cut
    return [*found, *(word for event in stream.close() for word in event.words)]


def with_times(word):
    return word.text, [(one.text, one.start_s, one.end_s) for one in (word, *word.characters)]


def cutting():
    return st.lists(st.integers(0, len(SOUND) - 1), max_size=12).map(sorted)


@pytest.mark.parametrize("left", [None, 11])
@settings(max_examples=15, deadline=None)
@given(cuts=cutting(), size=st.integers(1, 30), ahead=st.integers(0, 9))
def test_cached_streaming_equals_the_chunk_mask(engine, left, cuts, size, ahead):
    normalized, _ = running_norm.normalize_running(SOUND, running_norm.RunningStats.prior())
    net = engine.model.net
    with torch.inference_mode(), apply_chunk_mask(net, ChunkConfig(size, left, ahead)):
        expected = net(torch.from_numpy(normalized)[None]).logits[0].log_softmax(-1).numpy()
    config = StreamingConfig("cached", size * 0.02, None if left is None else left * 0.02, ahead * 0.02)
    stable = through(streaming.create_streaming_encoder(engine, config), SOUND, cuts)
    np.testing.assert_allclose(stable, expected, atol=1e-4)


@pytest.mark.parametrize("mode", ["cached", "window"])
@settings(max_examples=10, deadline=None)
@given(cuts=cutting())
def test_words_do_not_depend_on_how_audio_is_cut(engine, mode, cuts):
    config = StreamingConfig(mode, 0.2, lookahead_s=0.1)
    whole = words(streaming.stream(engine, config, ALL), SOUND)
    assert words(streaming.stream(engine, config, ALL), SOUND, cuts) == whole
    assert len(whole) > 5


@pytest.mark.parametrize("mode", ["cached", "window"])
def test_odd_pieces(engine, mode):
    config, sound = StreamingConfig(mode, 0.1), SOUND[:20_000]
    whole = words(streaming.stream(engine, config, ALL), sound)
    for piece in (1, 7, 160, 100_000):
        cuts = range(piece, len(sound), piece)
        assert (
            words(streaming.stream(engine, config, ALL), sound, cuts if piece > 1 else range(19_000, 20_000)) == whole
        )


def test_a_window_as_long_as_the_recording_equals_the_net(engine):
    """With enough context, every window is the whole recording."""
    normalized, _ = running_norm.normalize_running(SOUND, running_norm.RunningStats.prior())
    (expected,) = engine.emissions([normalized])
    stable = through(
        streaming.create_streaming_encoder(engine, StreamingConfig("window", 0.5, 20.0, 20.0)), SOUND, [20_000]
    )
    np.testing.assert_allclose(stable, expected, atol=1e-4)


def test_unstable_frames_follow_the_stable_ones(engine):
    for config in (StreamingConfig("cached", 0.2, lookahead_s=0.1), StreamingConfig("window", 0.2, 1.0, 0.2)):
        encoder = streaming.create_streaming_encoder(engine, config)
        state, done = encoder.start_utterance(None), 0
        for start in range(0, 40_000, 3200):
            state, stable, unstable = encoder.step(state, SOUND[start : start + 3200], is_last=False)
            done += len(stable)
            assert done * 320 + encoder.latency_s * 16_000 <= start + 3200 + 320 * 10 + 400
            if len(stable):
                assert len(unstable) > 0


def test_latency(engine):
    reach_s = 5 / 16_000  # receptive field of the front end, 325 samples, less one hop
    cached, window = (
        StreamingConfig("cached", 0.32, lookahead_s=0.16),
        StreamingConfig("window", 0.64, lookahead_s=1.28),
    )
    assert streaming.create_streaming_encoder(engine, cached).latency_s == pytest.approx(0.32 + 0.16 + reach_s)
    assert streaming.create_streaming_encoder(engine, window).latency_s == pytest.approx(1.92 + reach_s)


def test_auto_is_cached_for_models_trained_for_it(engine, tmp_path):
    cached = streaming.create_streaming_encoder(engine)
    assert isinstance(cached, streaming.CachedEncoder)
    assert (cached.chunk_frames, cached.lookahead_frames, cached.left_frames) == (16, 4, None)
    plain = mowa.open_engine(tiny(tmp_path / "plain", streaming=None), device="cpu")
    assert isinstance(streaming.create_streaming_encoder(plain), streaming.FeatureWindowEncoder)
    with pytest.raises(ModelError, match="was not trained with chunked attention"):
        streaming.create_streaming_encoder(plain, StreamingConfig("cached"))


@pytest.mark.parametrize(
    "config",
    [StreamingConfig(chunk_s=0.001), StreamingConfig(left_context_s=-1.0), StreamingConfig("window", lookahead_s=-0.1)],
)
def test_invalid_times_are_refused(engine, config):
    with pytest.raises(ModelError, match="no time may be negative"):
        streaming.create_streaming_encoder(engine, config)


@pytest.mark.parametrize("kind", ["group", "wavlm"])
def test_other_nets_are_streamed_in_windows(tmp_path, kind):
    changes = {"norm": "group"} if kind == "group" else {"family": "wavlm"}
    one = mowa.open_engine(tiny(tmp_path / kind, **changes), device="cpu", dtype="float32")
    encoder = streaming.create_streaming_encoder(one)
    assert type(encoder) is (streaming.WaveformWindowEncoder if kind == "group" else streaming.FeatureWindowEncoder)
    config = StreamingConfig("window", 0.2, 0.4, 0.2)
    whole = words(streaming.stream(one, config, ALL), SOUND)
    assert len(whole) > 5
    assert words(streaming.stream(one, config, ALL), SOUND, [1, 9_000, 9_001]) == whole
    with pytest.raises(ModelError, match="has no cached streaming"):
        streaming.create_streaming_encoder(one, StreamingConfig("cached"))


def test_the_cache_is_rebuilt_in_a_long_utterance(engine, monkeypatch):
    """After CACHE_RESET_S the cache is rebuilt from the last CACHE_OVERLAP_S, and frames continue without a gap."""
    monkeypatch.setattr(streaming_encoders, "CACHE_RESET_S", 1.0)
    monkeypatch.setattr(streaming_encoders, "CACHE_OVERLAP_S", 0.3)
    encoder = streaming.create_streaming_encoder(engine, StreamingConfig("cached", 0.1, lookahead_s=0.04))
    state, stable, most_frames = encoder.start_utterance(None), [], 0
    for start in range(0, len(SOUND), 777):
        state, new, _ = encoder.step(state, SOUND[start : start + 777], is_last=start + 777 >= len(SOUND))
        stable.append(new)
        most_frames = max(most_frames, int(state["frame_counts"][1]))
    assert len(np.concatenate(stable)) == (len(SOUND) - 400) // 320 + 1
    assert most_frames <= 50 + 5
    np.testing.assert_array_equal(np.concatenate(stable), through(encoder, SOUND, [3_000, 44_444]))
    fresh = streaming.CachedEncoder(engine, encoder._step, 5, None, 2)
    fresh._reset_frames = None
    whole = through(fresh, SOUND, [])
    np.testing.assert_allclose(np.concatenate(stable)[:50], whole[:50], atol=1e-5)


def test_a_saved_stream_continues_elsewhere(engine):
    for config in (StreamingConfig("cached", 0.2), StreamingConfig("window", 0.2, 1.0, 0.2)):
        whole = words(streaming.stream(engine, config, ALL), SOUND)
        one, other = streaming.stream(engine, config, ALL), streaming.stream(engine, config, ALL)
        before = [word for event in one.feed(SOUND[:30_001]) if event.is_final for word in event.words]
        other.restore(one.save())
        assert [*before, *words(other, SOUND[30_001:])] == whole
    with pytest.raises(ModelError, match="another model or mode"):
        streaming.stream(engine, StreamingConfig("cached", 0.2), ALL).restore(one.save())


def test_streams_in_two_threads_are_independent(engine):
    sounds = [SOUND, clip(6, 50_000)]
    expected = [words(streaming.stream(engine, StreamingConfig("cached", 0.1), ALL), sound) for sound in sounds]
    encoder, found = streaming.create_streaming_encoder(engine, StreamingConfig("cached", 0.1)), {}

    def run(index):
        stream = streaming.TranscriptionStream(encoder, None, ALL)
        found[index] = words(stream, sounds[index], range(1000, 50_000, 1000))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip((found[0], found[1]), expected, strict=True):
        assert [with_times(word) for word in ours] == [with_times(word) for word in theirs]
        # sums in another thread may be rounded differently
        np.testing.assert_allclose([w.confidence for w in ours], [w.confidence for w in theirs], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("int8", marks=pytest.mark.slow)])
def test_cached_streaming_in_onnx(model, engine, dtype, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setenv("MOWA_CACHE", str(tmp_path))
    other = onnx.open_engine(model, dtype=dtype)
    for config in (StreamingConfig(), StreamingConfig("cached", 0.14, 0.5, 0.1)):
        ours, theirs = (
            through(streaming.create_streaming_encoder(one, config), SOUND, [777]) for one in (engine, other)
        )
        assert ours.shape == theirs.shape
        if dtype == "float32":
            np.testing.assert_allclose(theirs, ours, atol=1e-4)
        else:
            assert (ours.argmax(-1) == theirs.argmax(-1)).mean() > 0.8
    assert isinstance(
        streaming.create_streaming_encoder(other, StreamingConfig("window")), streaming.WaveformWindowEncoder
    )


def test_pl_tiny_transcribes_the_sample_live():
    reference = "dzień dobry to jest mowa program który słucha i zapisuje każde słowo"
    engine = mowa.open_engine(mowa.load("pl-tiny"), device="cpu", dtype="float32")
    stream, sound, events = streaming.stream(engine), audio.load_audio(SAMPLE), []
    for start in range(0, len(sound), 1600):
        events += stream.feed(sound[start : start + 1600])
    events += stream.close()
    found = [word for event in events if event.is_final for word in event.words]
    from mowa.tasks.metrics import error_rates

    assert error_rates([reference], [ctc.join_words(found[: len(reference.split())])])["cer"] < 0.35
    assert all(a.start_s <= b.start_s for a, b in pairwise(found))
    assert found[-1].end_s <= len(sound) / 16_000
    assert any(not event.is_final for event in events)
