"""Live streams of real nets: cut anywhere, saved anywhere, in any engine, they say what the net says under its mask."""

import threading
from itertools import pairwise
from pathlib import Path

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
from mowa.engines import onnx, streaming
from mowa.engines.streaming import StreamingConfig
from mowa.errors import ModelError
from mowa.models.ctc_encoder.chunk_mask import ChunkConfig, apply_chunk_mask
from tests.checkpoints import clip
from tests.checkpoints import tiny as whole_tiny

QUICK = {"conv_dim": (16,) * 3, "conv_kernel": (10, 8, 8), "conv_stride": (5, 8, 8), "num_hidden_layers": 2}
TRAINED = {"chunk_frames": [8, 16], "left_frames": None, "ahead_frames": [0, 4]}
SOUND = clip(5, 50_123)
SAMPLE = Path(mowa.__file__).parent / "assets" / "sample.flac"
ALL = EndpointConfig(vad=False)


def tiny(folder, **changes):
    return mowa.load(str(whole_tiny(folder, **QUICK | {"streaming": TRAINED} | changes)))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def engine(model):
    return mowa.open_engine(model, device="cpu", dtype="float32")


def through(listener, sound, cuts):
    memory, sure, start = listener.begin(None), [], 0
    for cut in (*cuts, len(sound)):
        memory, new, _ = listener.hear(memory, sound[start:cut], last=cut == len(sound))
        sure.append(new)
        start = cut
    return np.concatenate(sure)


def words(stream, sound, cuts=()):
    found, start = [], 0
    for cut in (*cuts, len(sound)):
        found += [word for event in stream.feed(sound[start:cut]) if event.final for word in event.words]
        start = cut
    return [*found, *(word for event in stream.close() for word in event.words)]


def placed(word):
    return word.text, [(one.text, one.start_s, one.end_s) for one in (word, *word.characters)]


def cutting():
    return st.lists(st.integers(0, len(SOUND) - 1), max_size=12).map(sorted)


@pytest.mark.parametrize("left", [None, 11])
@settings(max_examples=15, deadline=None)
@given(cuts=cutting(), size=st.integers(1, 30), ahead=st.integers(0, 9))
def test_cached_it_says_what_the_net_says_of_the_whole_under_its_mask(engine, left, cuts, size, ahead):
    heard, _ = running_norm.normalize_running(SOUND, running_norm.RunningStats.prior())
    net = engine.model.net
    with torch.inference_mode(), apply_chunk_mask(net, ChunkConfig(size, left, ahead)):
        expected = net(torch.from_numpy(heard)[None]).logits[0].log_softmax(-1).numpy()
    how = StreamingConfig("cached", size * 0.02, None if left is None else left * 0.02, ahead * 0.02)
    said = through(streaming.create_streaming_encoder(engine, how), SOUND, cuts)
    np.testing.assert_allclose(said, expected, atol=1e-4)


@pytest.mark.parametrize("mode", ["cached", "window"])
@settings(max_examples=10, deadline=None)
@given(cuts=cutting())
def test_however_it_is_cut_the_words_are_the_same(engine, mode, cuts):
    how = StreamingConfig(mode, 0.2, lookahead_s=0.1)
    whole = words(streaming.stream(engine, how, ALL), SOUND)
    assert words(streaming.stream(engine, how, ALL), SOUND, cuts) == whole
    assert len(whole) > 5


@pytest.mark.parametrize("mode", ["cached", "window"])
def test_odd_pieces(engine, mode):
    how, sound = StreamingConfig(mode, 0.1), SOUND[:20_000]
    whole = words(streaming.stream(engine, how, ALL), sound)
    for piece in (1, 7, 160, 100_000):
        cuts = range(piece, len(sound), piece)
        assert words(streaming.stream(engine, how, ALL), sound, cuts if piece > 1 else range(19_000, 20_000)) == whole


def test_a_window_as_long_as_the_recording_says_what_the_net_says(engine):
    """With everything to the left and right in it, a window is the whole recording."""
    heard, _ = running_norm.normalize_running(SOUND, running_norm.RunningStats.prior())
    (expected,) = engine.emissions([heard])
    said = through(
        streaming.create_streaming_encoder(engine, StreamingConfig("window", 0.5, 20.0, 20.0)), SOUND, [20_000]
    )
    np.testing.assert_allclose(said, expected, atol=1e-4)


def test_tentative_frames_follow_the_final_ones(engine):
    for how in (StreamingConfig("cached", 0.2, lookahead_s=0.1), StreamingConfig("window", 0.2, 1.0, 0.2)):
        listener = streaming.create_streaming_encoder(engine, how)
        memory, done = listener.start_utterance(None), 0
        for start in range(0, 40_000, 3200):
            memory, sure, unsure = listener.step(memory, SOUND[start : start + 3200], last=False)
            done += len(sure)
            assert done * 320 + listener.latency_s * 16_000 <= start + 3200 + 320 * 10 + 400
            if len(sure):
                assert len(unsure) > 0


def test_latency_is_said(engine):
    reach_s = 5 / 16_000  # the front end's field of 325 samples, less a hop
    cached, window = (
        StreamingConfig("cached", 0.32, lookahead_s=0.16),
        StreamingConfig("window", 0.64, lookahead_s=1.28),
    )
    assert streaming.create_streaming_encoder(engine, cached).latency_s == pytest.approx(0.32 + 0.16 + reach_s)
    assert streaming.create_streaming_encoder(engine, window).latency_s == pytest.approx(1.92 + reach_s)


def test_auto_is_what_the_model_was_trained_for(engine, tmp_path):
    cached = streaming.create_streaming_encoder(engine)
    assert isinstance(cached, streaming.CachedEncoder)
    assert (cached.chunk_frames, cached.lookahead_frames, cached.left_frames) == (16, 4, None)
    plain = mowa.open_engine(tiny(tmp_path / "plain", streaming=None), device="cpu")
    assert isinstance(streaming.create_streaming_encoder(plain), streaming.FeatureWindowEncoder)
    with pytest.raises(ModelError, match="was not trained to hear in chunks"):
        streaming.create_streaming_encoder(plain, StreamingConfig("cached"))


@pytest.mark.parametrize(
    "how",
    [StreamingConfig(chunk_s=0.001), StreamingConfig(left_context_s=-1.0), StreamingConfig("window", lookahead_s=-0.1)],
)
def test_times_that_are_none_are_refused(engine, how):
    with pytest.raises(ModelError, match="no time is below 0"):
        streaming.create_streaming_encoder(engine, how)


@pytest.mark.parametrize("kind", ["group", "wavlm"])
def test_what_has_no_memory_is_heard_in_windows(tmp_path, kind):
    changes = {"norm": "group"} if kind == "group" else {"family": "wavlm"}
    one = mowa.open_engine(tiny(tmp_path / kind, **changes), device="cpu", dtype="float32")
    listener = streaming.create_streaming_encoder(one)
    assert type(listener) is (streaming.WaveformWindowEncoder if kind == "group" else streaming.FeatureWindowEncoder)
    how = StreamingConfig("window", 0.2, 0.4, 0.2)
    whole = words(streaming.stream(one, how, ALL), SOUND)
    assert len(whole) > 5
    assert words(streaming.stream(one, how, ALL), SOUND, [1, 9_000, 9_001]) == whole
    with pytest.raises(ModelError, match="has no memory"):
        streaming.create_streaming_encoder(one, StreamingConfig("cached"))


def test_a_long_utterance_is_gone_on_with_anew(engine, monkeypatch):
    """After each `RENEW_S` what is kept is thrown away but for `OVERLAP_S`, and frames follow on without a gap."""
    monkeypatch.setattr(streaming, "CACHE_RESET_S", 1.0)
    monkeypatch.setattr(streaming, "CACHE_OVERLAP_S", 0.3)
    listener = streaming.create_streaming_encoder(engine, StreamingConfig("cached", 0.1, lookahead_s=0.04))
    memory, said, largest = listener.start_utterance(None), [], 0
    for start in range(0, len(SOUND), 777):
        memory, sure, _ = listener.step(memory, SOUND[start : start + 777], last=start + 777 >= len(SOUND))
        said.append(sure)
        largest = max(largest, int(memory["counts"][1]))
    assert len(np.concatenate(said)) == (len(SOUND) - 400) // 320 + 1
    assert largest <= 50 + 5
    np.testing.assert_array_equal(np.concatenate(said), through(listener, SOUND, [3_000, 44_444]))
    fresh = streaming.CachedEncoder(engine, listener._step, 5, None, 2)
    fresh._renew = None
    whole = through(fresh, SOUND, [])
    np.testing.assert_allclose(np.concatenate(said)[:50], whole[:50], atol=1e-5)


def test_saved_and_restored_elsewhere_it_goes_on(engine):
    for how in (StreamingConfig("cached", 0.2), StreamingConfig("window", 0.2, 1.0, 0.2)):
        whole = words(streaming.stream(engine, how, ALL), SOUND)
        one, other = streaming.stream(engine, how, ALL), streaming.stream(engine, how, ALL)
        before = [word for event in one.feed(SOUND[:30_001]) if event.is_final for word in event.words]
        other.restore(one.save())
        assert [*before, *words(other, SOUND[30_001:])] == whole
    with pytest.raises(ModelError, match="another model or mode"):
        streaming.stream(engine, StreamingConfig("cached", 0.2), ALL).restore(one.save())


def test_two_streams_in_two_threads_do_not_disturb_each_other(engine):
    sounds = [SOUND, clip(6, 50_000)]
    expected = [words(streaming.stream(engine, StreamingConfig("cached", 0.1), ALL), sound) for sound in sounds]
    listener_of, found = streaming.create_streaming_encoder(engine, StreamingConfig("cached", 0.1)), {}

    def run(index):
        stream = streaming.TranscriptionStream(listener_of, None, ALL)
        found[index] = words(stream, sounds[index], range(1000, 50_000, 1000))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for said, meant in zip((found[0], found[1]), expected, strict=True):
        assert [placed(word) for word in said] == [placed(word) for word in meant]
        # a thread of its own may add in another order
        np.testing.assert_allclose([w.confidence for w in said], [w.confidence for w in meant], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_the_onnx_engine_remembers_too(model, engine, dtype, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setenv("MOWA_CACHE", str(tmp_path))
    other = onnx.open_engine(model, dtype=dtype)
    for how in (StreamingConfig(), StreamingConfig("cached", 0.14, 0.5, 0.1)):
        ours, theirs = (through(streaming.create_streaming_encoder(one, how), SOUND, [777]) for one in (engine, other))
        assert ours.shape == theirs.shape
        if dtype == "float32":
            np.testing.assert_allclose(theirs, ours, atol=1e-4)
        else:
            assert (ours.argmax(-1) == theirs.argmax(-1)).mean() > 0.8
    assert isinstance(
        streaming.create_streaming_encoder(other, StreamingConfig("window")), streaming.WaveformWindowEncoder
    )


def test_pl_tiny_understands_the_sample_live():
    said = "dzień dobry to jest mowa program który słucha i zapisuje każde słowo"
    engine = mowa.open_engine(mowa.load("pl-tiny"), device="cpu", dtype="float32")
    stream, sound, events = streaming.stream(engine), audio.load_audio(SAMPLE), []
    for start in range(0, len(sound), 1600):
        events += stream.feed(sound[start : start + 1600])
    events += stream.close()
    found = [word for event in events if event.final for word in event.words]
    from mowa.tasks.metrics import error_rates

    assert error_rates([said], [ctc.join_words(found[: len(said.split())])])["cer"] < 0.35
    assert all(a.start_s <= b.start_s for a, b in pairwise(found))
    assert found[-1].end_s <= len(sound) / 16_000
    assert any(not event.final for event in events)
