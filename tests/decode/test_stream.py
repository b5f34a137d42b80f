"""A live stream over a listener that can be seen through: every 10 samples are a frame that says a letter."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mowa.decode.stream import STEP_SAMPLES, EndpointConfig, TranscriptionStream
from mowa.errors import AudioError, ModelError
from mowa.types import Vocabulary

TOKENS = ("<pad>", "|", "a", "b", "c")
WORDS = Vocabulary(TOKENS, blank=0, delimiter=1, specials=frozenset())
HOP = 64


class Spelled:
    """Frame t says the token that its first sample names (sample · 10); `unsure` frames at the end may yet change."""

    rate_hz, hop, vocabulary, latency_s = 16_000, HOP, WORDS, 0.0

    def __init__(self, unsure=0):
        self.unsure, self.begun, self.heard = unsure, 0, 0

    def begin(self, memory):
        self.begun += 1
        return {"sound": np.zeros(0, np.float32)}

    def hear(self, memory, samples, *, last):
        self.heard += len(samples)
        sound = np.concatenate([memory["sound"], samples])
        count = len(sound) // HOP
        sure = count if last else max(0, count - self.unsure)
        ids = np.rint(sound[: count * HOP : HOP] * 10).astype(int).clip(0, len(TOKENS) - 1)
        scores = np.log(np.full((count, len(TOKENS)), 1e-3, np.float32))
        scores[np.arange(count), ids] = np.log(0.9)
        return {"sound": sound[sure * HOP :]}, scores[:sure], scores[sure:]


class Loud:
    """Speech is what is not zero."""

    def __init__(self):
        self.state = {"blocks": np.zeros(1)}

    def feed(self, samples):
        self.state = {"blocks": self.state["blocks"] + 1}
        return np.array([float(np.abs(samples).max() > 0)], np.float32)


def said(text, frames=8):
    """`text` as sound: each letter lasts `frames` frames, a pause of as many between equal ones."""
    ids = []
    for letter in text:
        token = TOKENS.index("|" if letter == " " else letter)
        ids += [*([0] * frames if ids and ids[-1] == token else []), *[token] * frames]
    return np.repeat(np.array(ids, np.float32) / 10, HOP)


QUIET = np.zeros(16_000, np.float32)


def heard(stream, sound, cuts):
    events, start = [], 0
    for cut in (*cuts, len(sound)):
        events += stream.feed(sound[start:cut])
        start = max(start, cut)
    return [*events, *stream.close()]


def finals(events):
    return " ".join(event.text for event in events if event.final and event.text)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_however_it_is_cut_the_same_words_become_final_in_the_same_order(data):
    sound = np.concatenate([QUIET, said("ab cab a bc"), QUIET, said("cc ab"), QUIET[:700], said("b"), QUIET])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sound)), max_size=30)))
    unsure = data.draw(st.integers(0, 20))
    whole = heard(TranscriptionStream(Spelled(unsure), Loud()), sound, [])
    events = heard(TranscriptionStream(Spelled(unsure), Loud()), sound, cuts)
    final = [event for event in events if event.final]
    assert finals(events) == finals(whole) == "ab cab a bc cc abb"
    words = [word for event in final for word in event.words]
    assert words == [word for event in whole if event.final for word in event.words]
    assert [e.start_s for e in final] == sorted(e.start_s for e in final)
    assert [event.ends for event in final if event.ends] == [True, True]


@given(st.integers(0, 30))
@settings(max_examples=15, deadline=None)
def test_partials_come_last_and_say_what_stays(unsure):
    stream, sound = TranscriptionStream(Spelled(unsure), Loud()), said("abc ab cab abcab")
    for start in range(0, len(sound), STEP_SAMPLES):
        events = stream.feed(sound[start : start + STEP_SAMPLES])
        assert all(event.is_final for event in events[:-1])
        for event in events:
            assert 0 <= event.stability <= 1
            assert event.is_final or not event.is_endpoint
        if events and not events[-1].is_final and not unsure:
            assert events[-1].stability == 1


def test_words_have_the_times_of_the_stream():
    sound = np.concatenate([QUIET, said("ab c"), QUIET])
    events = heard(TranscriptionStream(Spelled(), Loud(), EndpointConfig(speech_pad_s=0.1)), sound, [])
    one, two = (word for event in events if event.final for word in event.words)
    lasts = 8 * HOP / 16_000
    assert one.start_s == pytest.approx(1, abs=STEP_SAMPLES / 16_000)
    assert one.end_s - one.start_s == pytest.approx(2 * lasts)
    assert two.start_s - one.start_s == pytest.approx(3 * lasts)
    assert one.characters[1].start_s == pytest.approx(one.start_s + lasts)


def test_nothing_is_heard_while_nobody_speaks():
    listener = Spelled()
    stream = TranscriptionStream(listener, Loud(), EndpointConfig(speech_pad_s=0.2))
    for _ in range(60):
        assert stream.feed(QUIET) == []
    assert listener.begun == listener.heard == 0
    assert len(stream.state.pre_speech) <= 0.2 * 16_000
    stream.feed(said("ab"))
    assert listener.begun == 1


def test_a_long_segment_ends_at_a_word_and_the_next_begins():
    rules = EndpointConfig(max_segment_s=1.0)
    events = heard(TranscriptionStream(Spelled(), Loud(), rules), said("ab cab " * 30), [])
    ended = [event for event in events if event.ends]
    assert len(ended) >= 5
    assert finals(events) == ("ab cab " * 30).strip()


def test_without_detection_all_is_one_utterance():
    listener = Spelled()
    stream = TranscriptionStream(listener, None, EndpointConfig(vad=False))
    events = heard(stream, np.concatenate([QUIET, said("ab"), QUIET, said("c")]), [])
    assert (finals(events), listener.begun) == ("abc", 1)


def test_flush_reads_what_was_heard_and_goes_on():
    stream = TranscriptionStream(Spelled(5), Loud())
    first = [*stream.feed(said("ab c")), *stream.flush()]
    assert finals(first) == "ab c"
    assert first[-1].is_endpoint
    assert stream.flush() == []
    assert finals([*stream.feed(said("b")), *stream.close()]) == "b"
    assert stream.close() == []


def test_saved_and_restored_elsewhere_it_goes_on():
    sound = np.concatenate([QUIET[:3000], said("ab cab a bc"), QUIET, said("cc ab")])
    whole = finals(heard(TranscriptionStream(Spelled(4), Loud()), sound, []))
    for at in (0, 1, 2999, 5000, 9000, 20_000, len(sound)):
        one, other = TranscriptionStream(Spelled(4), Loud()), TranscriptionStream(Spelled(4), Loud())
        before = one.feed(sound[:at])
        other.restore(one.save())
        assert finals([*before, *heard(other, sound[at:], [])]) == whole


@pytest.mark.parametrize("damage", [b"", b"no stream", "cut"])
def test_what_is_no_saved_stream_is_refused(damage):
    stream = TranscriptionStream(Spelled(), Loud())
    stream.feed(said("ab"))
    saved = stream.save()
    with pytest.raises(ModelError, match="no saved stream"):
        stream.restore(saved[: len(saved) // 2] if damage == "cut" else damage)
    assert finals([*stream.feed(said(" c")), *stream.close()]) in ("ab c", "c")


@pytest.mark.parametrize(
    ("samples", "rate_hz", "said"),
    [
        (np.zeros((2, 5), np.float32), None, "one channel"),
        (np.zeros(5, np.float32), 8000, "16000 Hz, not 8000 Hz"),
        (np.array([0, np.nan], np.float32), None, "sample 1 of 2 is nan"),
        (np.array([np.inf], np.float32), None, "sample 0 of 1 is inf"),
        (np.zeros(5, np.int32), None, "int32"),
        (["a"], None, "float32"),
    ],
)
def test_bad_samples_are_refused_and_nothing_is_taken(samples, rate_hz, said):
    stream = TranscriptionStream(Spelled(), Loud())
    with pytest.raises(AudioError, match=said):
        stream.feed(samples, rate_hz)
    assert stream.received_s == 0
    assert stream.feed(QUIET[:100], 16_000) == []


def test_int16_and_float64_are_full_scale():
    events = heard(
        TranscriptionStream(Spelled(), Loud()), (said("ab c").astype(np.float64) * 32768).astype(np.int16), []
    )
    assert finals(events) == "ab c"
    assert finals(heard(TranscriptionStream(Spelled(), Loud()), said("ab c").astype(np.float64), [])) == "ab c"


def test_closed_is_closed():
    stream = TranscriptionStream(Spelled(), Loud())
    stream.close()
    for verb in (lambda: stream.feed(QUIET), stream.flush):
        with pytest.raises(AudioError, match="closed"):
            verb()


def test_two_threads_may_not_feed_at_once():
    inside, go = threading.Event(), threading.Event()

    class Slow(Spelled):
        def hear(self, memory, samples, *, last):
            inside.set()
            go.wait(10)
            return super().hear(memory, samples, last=last)

    stream = TranscriptionStream(Slow(), Loud())
    thread = threading.Thread(target=stream.feed, args=(said("ab"),))
    thread.start()
    assert inside.wait(10)
    with pytest.raises(AudioError, match="another thread"):
        stream.feed(said("c"))
    go.set()
    thread.join()
