"""A live stream with a fake encoder, in which the samples of each frame spell a token."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mowa.decode.ctc import join_words
from mowa.decode.stream import EndpointConfig, TranscriptionStream
from mowa.errors import AudioError, ModelError
from mowa.types import Vocabulary

TOKENS = ("<pad>", "|", "a", "b", "c")
WORDS = Vocabulary(TOKENS, blank=0, delimiter=1, specials=frozenset())
HOP = 64

STEP_SAMPLES = 512  # 32 ms


class FakeEncoder:
    """The first sample of frame t is its token id / 10; the last `provisional` frames may still change."""

    rate_hz, hop_length, vocabulary, latency_s = 16_000, HOP, WORDS, 0.0

    def __init__(self, provisional=0):
        self.provisional, self.num_utterances, self.num_samples = provisional, 0, 0

    def start_utterance(self, state):
        self.num_utterances += 1
        return {"samples": np.zeros(0, np.float32)}

    def step(self, state, samples, *, is_last):
        self.num_samples += len(samples)
        samples = np.concatenate([state["samples"], samples])
        count = len(samples) // HOP
        final = count if is_last else max(0, count - self.provisional)
        ids = np.rint(samples[: count * HOP : HOP] * 10).astype(int).clip(0, len(TOKENS) - 1)
        log_probs = np.log(np.full((count, len(TOKENS)), 1e-3, np.float32))
        log_probs[np.arange(count), ids] = np.log(0.9)
        return {"samples": samples[final * HOP :]}, log_probs[:final], log_probs[final:]


class FakeVAD:
    """Classifies samples other than zero as speech."""

    def __init__(self):
        self.state = {"blocks": np.zeros(1)}

    def feed(self, samples):
        self.state = {"blocks": self.state["blocks"] + 1}
        return np.array([float(np.abs(samples).max() > 0)], np.float32)


def spell(text, frames=8):
    """Return samples of `text`: `frames` frames per letter, and as many blanks between equal letters."""
    ids = []
    for letter in text:
        token = TOKENS.index("|" if letter == " " else letter)
        ids += [*([0] * frames if ids and ids[-1] == token else []), *[token] * frames]
    return np.repeat(np.array(ids, np.float32) / 10, HOP)


SILENCE = np.zeros(16_000, np.float32)


def transcribe(stream, samples, boundaries):
    events, start = [], 0
    for end in (*boundaries, len(samples)):
        events += stream.feed(samples[start:end])
        start = max(start, end)
    return [*events, *stream.close()]


def finals(events):
    return " ".join(event.text for event in events if event.is_final and event.text)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_final_words_do_not_depend_on_how_the_audio_is_split(data):
    samples = np.concatenate(
        [SILENCE, spell("ab cab a bc"), SILENCE, spell("cc ab"), SILENCE[:700], spell("b"), SILENCE]
    )
    boundaries = sorted(data.draw(st.lists(st.integers(0, len(samples)), max_size=30)))
    provisional = data.draw(st.integers(0, 20))
    whole = transcribe(TranscriptionStream(FakeEncoder(provisional), FakeVAD()), samples, [])
    events = transcribe(TranscriptionStream(FakeEncoder(provisional), FakeVAD()), samples, boundaries)
    final = [event for event in events if event.is_final]
    assert finals(events) == finals(whole) == "ab cab a bc cc abb"
    words = [word for event in final for word in event.words]
    assert words == [word for event in whole if event.is_final for word in event.words]
    assert [e.start_s for e in final] == sorted(e.start_s for e in final)
    assert [event.is_endpoint for event in final if event.is_endpoint] == [True, True]


@given(st.integers(0, 30))
@settings(max_examples=15, deadline=None)
def test_partials_come_last_with_their_stability(provisional):
    stream, samples = TranscriptionStream(FakeEncoder(provisional), FakeVAD()), spell("abc ab cab abcab")
    for start in range(0, len(samples), STEP_SAMPLES):
        events = stream.feed(samples[start : start + STEP_SAMPLES])
        assert all(event.is_final for event in events[:-1])
        for event in events:
            assert 0 <= event.stability <= 1
            assert event.is_final or not event.is_endpoint
        if events and not events[-1].is_final and not provisional:
            assert events[-1].stability == 1


def test_word_times_are_those_of_the_stream():
    samples = np.concatenate([SILENCE, spell("ab c"), SILENCE])
    events = transcribe(TranscriptionStream(FakeEncoder(), FakeVAD(), EndpointConfig(speech_pad_s=0.1)), samples, [])
    one, two = (word for event in events if event.is_final for word in event.words)
    letter_s = 8 * HOP / 16_000
    assert one.start_s == pytest.approx(1, abs=STEP_SAMPLES / 16_000)
    assert one.end_s - one.start_s == pytest.approx(2 * letter_s)
    assert two.start_s - one.start_s == pytest.approx(3 * letter_s)
    assert one.characters[1].start_s == pytest.approx(one.start_s + letter_s)


def test_the_encoder_does_not_run_without_speech():
    encoder = FakeEncoder()
    stream = TranscriptionStream(encoder, FakeVAD(), EndpointConfig(speech_pad_s=0.2))
    for _ in range(60):
        assert stream.feed(SILENCE) == []
    assert encoder.num_utterances == encoder.num_samples == 0
    assert len(stream.state.pre_speech) <= 0.2 * 16_000
    stream.feed(spell("ab"))
    assert encoder.num_utterances == 1


def test_long_segments_end_at_a_word():
    config = EndpointConfig(max_segment_s=1.0)
    events = transcribe(TranscriptionStream(FakeEncoder(), FakeVAD(), config), spell("ab cab " * 30), [])
    ended = [event for event in events if event.is_endpoint]
    assert len(ended) >= 5
    assert finals(events) == ("ab cab " * 30).strip()


CHINESE = Vocabulary(("<pad>", "他", "a", "b", "c"), blank=0, delimiter=None)
PIECES = Vocabulary(("<pad>", "y", "▁a", "b", "▁c"), blank=0, delimiter=None)
PHONEMES = Vocabulary(("<pad>", "|", "a", "b", "c"), blank=0, delimiter=1, separator=" ")
HAN = Vocabulary(("<pad>", "|", "他", "你", "好"), blank=0, delimiter=1)


def open_stream(vocabulary, **endpointing):
    encoder = FakeEncoder()
    encoder.vocabulary = vocabulary
    return TranscriptionStream(encoder, FakeVAD(), EndpointConfig(**endpointing))


def joined(events):
    return join_words([word for event in events if event.is_final for word in event.words])


@pytest.mark.parametrize(
    ("vocabulary", "text"),
    [(CHINESE, "abcabc"), (PIECES, "ab cb ab cb"), (PHONEMES, "a b c a b c"), (HAN, "他你好他你好")],
    ids=["no delimiter", "pieces", "phonemes", "Chinese with a delimiter"],
)
def test_words_without_a_delimiter_become_final_before_the_stream_closes(vocabulary, text):
    samples = spell("abcbabcb" if vocabulary is PIECES else "abcabc")
    stream = open_stream(vocabulary)
    events = [event for at in range(0, len(samples), 512) for event in stream.feed(samples[at : at + 512])]
    early, late = joined(events), stream.close()
    assert len(early) >= len(text) - 4
    assert joined([*events, *late]) == text
    final = [event for event in [*events, *late] if event.is_final and event.words]
    assert len(final) >= 4
    assert all(event.stability == 1 for event in final)


def test_segments_without_spaces_end_at_pauses_and_by_length():
    samples = np.concatenate([spell("abc" * 8), SILENCE, spell("cab")])
    stream = open_stream(CHINESE, max_segment_s=0.3)
    events = [*stream.feed(samples), *stream.close()]
    segments, words = [], []
    for event in events:
        words += event.words if event.is_final else ()
        if event.is_endpoint:
            segments.append(words)
            words = []
    assert joined(events) == "abc" * 8 + "cab"
    assert [word.text for word in segments[-1]] == ["c", "a", "b"]
    assert all(segment[-1].end_s - segment[0].start_s < 0.5 for segment in segments if segment)
    starts = [word.start_s for segment in segments for word in segment]
    assert starts == sorted(starts)


def test_a_saved_stream_without_spaces_continues_in_another():
    samples = spell("abcabc")
    for at in (1000, 2999, 5000):
        one, other = open_stream(CHINESE), open_stream(CHINESE)
        before = one.feed(samples[:at])
        other.restore(one.save())
        assert joined([*before, *other.feed(samples[at:]), *other.close()]) == "abcabc"


def test_a_word_that_never_ends_becomes_final_all_the_same():
    stream = open_stream(WORDS, max_segment_s=0.5, vad=False)
    samples = spell("abc" * 30)
    events = [event for at in range(0, len(samples), 512) for event in stream.feed(samples[at : at + 512])]
    assert len(joined(events)) > 60
    assert len(stream.state.stable_ids) * HOP / 16_000 < 0.6
    assert joined([*events, *stream.close()]).replace(" ", "") == "abc" * 30


def test_without_vad_the_stream_is_one_utterance():
    encoder = FakeEncoder()
    stream = TranscriptionStream(encoder, None, EndpointConfig(vad=False))
    events = transcribe(stream, np.concatenate([SILENCE, spell("ab"), SILENCE, spell("c")]), [])
    assert (finals(events), encoder.num_utterances) == ("abc", 1)


def test_flush_transcribes_the_rest_and_continues():
    stream = TranscriptionStream(FakeEncoder(5), FakeVAD())
    first = [*stream.feed(spell("ab c")), *stream.flush()]
    assert finals(first) == "ab c"
    assert first[-1].is_endpoint
    assert stream.flush() == []
    assert finals([*stream.feed(spell("b")), *stream.close()]) == "b"
    assert stream.close() == []


def test_a_saved_stream_continues_in_another():
    samples = np.concatenate([SILENCE[:3000], spell("ab cab a bc"), SILENCE, spell("cc ab")])
    whole = finals(transcribe(TranscriptionStream(FakeEncoder(4), FakeVAD()), samples, []))
    for at in (0, 1, 2999, 5000, 9000, 20_000, len(samples)):
        one, other = TranscriptionStream(FakeEncoder(4), FakeVAD()), TranscriptionStream(FakeEncoder(4), FakeVAD())
        before = one.feed(samples[:at])
        other.restore(one.save())
        assert finals([*before, *transcribe(other, samples[at:], [])]) == whole


@pytest.mark.parametrize("damage", [b"", b"no stream", "truncated"])
def test_invalid_saved_streams_raise(damage):
    stream = TranscriptionStream(FakeEncoder(), FakeVAD())
    stream.feed(spell("ab"))
    saved = stream.save()
    with pytest.raises(ModelError, match="not a saved stream"):
        stream.restore(saved[: len(saved) // 2] if damage == "truncated" else damage)
    assert finals([*stream.feed(spell(" c")), *stream.close()]) in ("ab c", "c")


@pytest.mark.parametrize(
    ("samples", "rate_hz", "message"),
    [
        (np.zeros((2, 5), np.float32), None, "one channel"),
        (np.zeros(5, np.float32), 8000, "needs 16000 Hz, not 8000 Hz"),
        (np.array([0, np.nan], np.float32), None, "sample 1 of 2 is nan"),
        (np.array([np.inf], np.float32), None, "sample 0 of 1 is inf"),
        (np.zeros(5, np.int32), None, "int32"),
        (["a"], None, "float32"),
    ],
)
def test_invalid_samples_raise_and_are_not_taken(samples, rate_hz, message):
    stream = TranscriptionStream(FakeEncoder(), FakeVAD())
    with pytest.raises(AudioError, match=message):
        stream.feed(samples, rate_hz)
    assert stream.received_s == 0
    assert stream.feed(SILENCE[:100], 16_000) == []


class LevelVAD(FakeVAD):
    """Classifies audio above -50 dBFS as speech, as Silero nearly does."""

    def feed(self, samples):
        return np.array([float(np.sqrt(np.mean(samples**2)) > 10 ** (-50 / 20))], np.float32)


class RecordingEncoder(FakeEncoder):
    def __init__(self):
        super().__init__()
        self.fed = []

    def step(self, state, samples, *, is_last):
        self.fed.append(samples)
        return super().step(state, samples, is_last=is_last)


@pytest.mark.parametrize(("level_db", "gain_db"), [(-20, 0), (-44, 0), (-55, 10), (-65, 20), (-80, 35)])
def test_soft_voices_are_amplified_from_their_first_sample(level_db, gain_db):
    """What is softer than -45 dBFS reaches it, by one factor for the whole utterance; the rest is left as it is."""
    noise = np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    voice = noise / np.float32(np.sqrt(np.mean(noise[:512] ** 2))) * np.float32(10 ** (level_db / 20))
    stream = TranscriptionStream(encoder := RecordingEncoder(), LevelVAD())
    transcribe(stream, np.concatenate([SILENCE[:8192], voice, SILENCE]), [])
    fed = np.concatenate(encoder.fed)
    start = int(np.flatnonzero(fed)[0])
    assert start == 8192 - 1792  # 0.4 s of padding
    spoken = fed[start : start + len(voice)]
    np.testing.assert_allclose(spoken, voice * 10 ** (gain_db / 20), rtol=1e-3)
    assert gain_db or np.array_equal(spoken, voice)


def test_a_soft_voice_after_a_loud_one_is_detected_again():
    noise = np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    loud, soft = 0.1 * noise, 1e-3 * noise
    stream = TranscriptionStream(RecordingEncoder(), LevelVAD())
    stream.feed(np.concatenate([loud, *[SILENCE] * 12]))
    assert stream.state.utterance_start == -1
    stream.feed(soft)
    assert stream.state.utterance_start >= 0


def test_floats_of_another_scale_raise_and_are_not_taken():
    stream = TranscriptionStream(FakeEncoder(), FakeVAD())
    with pytest.raises(AudioError, match="samples reach 20000, and full scale is 1: divide 16-bit values by 32768"):
        stream.feed(np.full(600, -20_000.0, np.float32))
    assert stream.received_s == 0
    assert stream.feed(np.zeros(0, np.float32)) == []


def test_int16_and_float64_samples():
    events = transcribe(
        TranscriptionStream(FakeEncoder(), FakeVAD()), (spell("ab c").astype(np.float64) * 32768).astype(np.int16), []
    )
    assert finals(events) == "ab c"
    assert (
        finals(transcribe(TranscriptionStream(FakeEncoder(), FakeVAD()), spell("ab c").astype(np.float64), []))
        == "ab c"
    )


def test_a_closed_stream_raises():
    stream = TranscriptionStream(FakeEncoder(), FakeVAD())
    stream.close()
    for call in (lambda: stream.feed(SILENCE), stream.flush):
        with pytest.raises(AudioError, match="closed"):
            call()


def test_two_threads_may_not_feed_at_once():
    inside, go = threading.Event(), threading.Event()

    class Slow(FakeEncoder):
        def step(self, state, samples, *, is_last):
            inside.set()
            go.wait(10)
            return super().step(state, samples, is_last=is_last)

    stream = TranscriptionStream(Slow(), FakeVAD())
    thread = threading.Thread(target=stream.feed, args=(spell("ab"),))
    thread.start()
    assert inside.wait(10)
    with pytest.raises(AudioError, match="another thread"):
        stream.feed(spell("c"))
    go.set()
    thread.join()
