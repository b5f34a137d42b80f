"""Live speech as words: samples in, in any pieces, and segments out, of which nothing final ever changes.

A `Stream` finds speech (`Detector`), hands it to what hears (`Listener`), and reads frames as words as they come. A
word is final when what ends it has been heard in frames that no later sound can change: the space after it, or a
pause. Partial segments hold what follows the last final word, and may change.

All that a stream is at a moment is in its `State`, a plain value: `Stream.save` gives it as bytes, and any process
with the same model goes on from them. What is fed is taken in steps of `STEP` samples, so that the same sound gives
the same words, however it is cut.

Nothing is computed while nobody speaks, but for the detector.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from statistics import fmean
from threading import Lock
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from mowa.decode import ctc
from mowa.errors import AudioError, ModelError
from mowa.types import Segment, Vocabulary, Word

Samples = NDArray[np.float32]
LogProbs = NDArray[np.float32]
Arrays = dict[str, NDArray[Any]]

STEP_SAMPLES = 512  # samples taken at a time: 32 ms, what the detector judges at once
SPEECH_THRESHOLD, SILENCE_THRESHOLD = (
    0.5,
    0.35,
)  # an utterance begins at the one, and may end below the other, as in Silero's own segmenter


class VoiceActivityDetector(Protocol):
    """Says how likely each STEP of samples is speech. Its memory is `state`, which may be set."""

    state: Arrays

    def feed(self, samples: Samples) -> NDArray[np.float32]: ...


class StreamingEncoder(Protocol):
    """A net that hears one utterance after another. All it remembers is in arrays, which are handed back to it.

    `latency_s`: how much later than its sound a frame can be final at worst, computing left aside.
    """

    rate_hz: int
    hop_length: int
    vocabulary: Vocabulary
    latency_s: float

    def start_utterance(self, state: Arrays | None) -> Arrays:
        """An utterance begins; `memory` is what was left after the last one, None at the beginning of a stream."""

    def step(self, state: Arrays, samples: Samples, *, is_last: bool) -> tuple[Arrays, LogProbs, LogProbs]:
        """→ memory, log-probabilities [T, V] of the next frames, and [U, V] of frames after them that may yet change.

        After `last` the utterance is over; all its frames have come then. `memory` itself is not changed.
        """


@dataclass(frozen=True, slots=True)
class EndpointConfig:
    """Where utterances begin and end, in seconds. `pause_s` of quiet ends one, after `longest_s` a segment ends at
    the next word; `lead_s` before speech was noticed is heard too. Without `detect` all is one utterance."""

    min_silence_s: float = 0.6
    max_segment_s: float = 20.0
    speech_pad_s: float = 0.4
    vad: bool = True


DEFAULT_ENDPOINTING = EndpointConfig()


@dataclass(slots=True)
class StreamState:
    """A stream at a moment. Positions are samples from its beginning."""

    num_samples: int = 0  # samples that were taken in steps
    pending: Samples = field(default_factory=lambda: np.zeros(0, np.float32))  # not a step yet
    pre_speech: Samples = field(
        default_factory=lambda: np.zeros(0, np.float32)
    )  # what led up to now, while nobody speaks
    vad_state: Arrays = field(default_factory=dict)
    encoder_state: Arrays | None = None  # the listener's
    utterance_start: int = -1  # where the utterance began; -1: nobody speaks
    silence_start: int = -1  # since where it is quiet in the utterance; -1: it is not
    frames_decoded: int = 0  # frames of the utterance that are read for good
    stable_ids: NDArray[np.int32] = field(
        default_factory=lambda: np.zeros(0, np.int32)
    )  # and those after them, sure too
    stable_probs: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    segment_start_s: float = -1.0  # where the first word of the segment began; -1: it has none
    last_partial: str = ""  # the last partial text
    closed: bool = False


class TranscriptionStream:
    """One live stream. May be fed from any thread, from one at a time; streams of one listener do not disturb each
    other.

    Final segments hold the words that became final with this feed, a few at a time; `ends` says that a segment is over,
    and the words since the last one that ended are its text. An ending one may be empty. At most one partial comes with
    a feed, the last thing in it: what may follow the final words, until the next segment of either kind. `stability` is
    the share of its letters that stay.
    """

    def __init__(
        self,
        model: StreamingEncoder,
        vad: VoiceActivityDetector | None,
        endpointing: EndpointConfig = DEFAULT_ENDPOINTING,
    ) -> None:
        self.encoder, self.vad, self.endpointing = model, vad, endpointing
        self.state = StreamState(vad_state=vad.state if vad is not None else {})
        self._feeding = Lock()

    @property
    def received_s(self) -> float:
        return (self.state.num_samples + len(self.state.pending)) / self.encoder.rate_hz

    def feed(self, samples: Any, rate_hz: int | None = None) -> list[Segment]:
        """Samples [n] as they come (float32 of full scale ±1, or int16), any n → what they brought.

        AudioError, and nothing is taken: closed; another rate or shape; NaN or infinite samples; a feed in another
        thread that is not over.
        """
        if self.state.closed:
            raise AudioError("this stream is closed: begin another")
        if rate_hz is not None and rate_hz != self.encoder.rate_hz:
            raise AudioError(f"this stream hears {self.encoder.rate_hz} Hz, not {rate_hz} Hz: resample what is fed")
        sound = _sound(samples)
        if not self._feeding.acquire(blocking=False):
            raise AudioError("this stream is fed from another thread at this moment: give each thread its own")
        try:
            state = self.state
            state.pending = np.concatenate([state.pending, sound])
            found: list[Segment] = []
            whole = len(state.pending) // STEP_SAMPLES * STEP_SAMPLES
            steps, state.pending = state.pending[:whole], state.pending[whole:].copy()
            for start in range(0, whole, STEP_SAMPLES):
                found += self._step(steps[start : start + STEP_SAMPLES])
            return _last_partial(found)
        finally:
            self._feeding.release()

    def flush(self) -> list[Segment]:
        """Read what was heard so far as if a pause followed. What is fed afterwards is another utterance."""
        if self.state.closed:
            raise AudioError("this stream is closed: begin another")
        with self._feeding:
            state = self.state
            rest, state.pending = state.pending, np.zeros(0, np.float32)
            state.num_samples += len(rest)
            if state.utterance_start < 0 and (self.endpointing.vad or not len(rest)):
                return []
            return _last_partial(self._decode(rest, last=True))

    def close(self) -> list[Segment]:
        """`flush`, and nothing can be fed any more. Closing twice is no mistake."""
        if self.state.closed:
            return []
        found = self.flush()
        self.state.closed = True
        return found

    def save(self) -> bytes:
        """All that the stream is at this moment; `restore` of another stream over the same model takes it."""
        with self._feeding:
            return _packed(self.state)

    def restore(self, saved: bytes) -> None:
        """Go on from where the stream that was saved stood. ModelError where that heard with another kind of memory."""
        state = _unpacked(saved)
        if state.encoder_state is not None:
            ours = self.encoder.start_utterance(None)
            if ours.keys() != state.encoder_state.keys():
                raise ModelError("this stream was saved with another model or mode: restore it with the same one")
        with self._feeding:
            self.state = state

    def _step(self, block: Samples) -> list[Segment]:
        state, rules, rate_hz = self.state, self.endpointing, self.encoder.rate_hz
        speech = 1.0
        if rules.vad and self.vad is not None:
            self.vad.state = state.vad_state
            speech = float(self.vad.feed(block)[0])
            state.vad_state = self.vad.state
        state.num_samples += len(block)
        if state.utterance_start < 0 and speech < SPEECH_THRESHOLD:
            lead = round(rules.speech_pad_s * rate_hz)
            state.pre_speech = np.concatenate([state.pre_speech, block])[-lead:] if lead else state.pre_speech
            return []
        if speech >= SPEECH_THRESHOLD:
            state.silence_start = -1
        elif speech < SILENCE_THRESHOLD and state.silence_start < 0:
            state.silence_start = state.num_samples - len(block)
        paused = state.silence_start >= 0 and state.num_samples - state.silence_start >= rules.min_silence_s * rate_hz
        return self._decode(block, last=paused)

    def _decode(self, sound: Samples, *, last: bool) -> list[Segment]:
        state, listener = self.state, self.encoder
        if state.utterance_start < 0:
            sound, state.pre_speech = np.concatenate([state.pre_speech, sound]), np.zeros(0, np.float32)
            state.utterance_start = state.num_samples - len(sound)
            state.encoder_state = listener.start_utterance(state.encoder_state)
        assert state.encoder_state is not None
        state.encoder_state, sure, unsure = listener.step(state.encoder_state, sound, is_last=last)
        if not (len(sure) or len(unsure) or last):
            return []
        path = ctc.concat_paths(
            [ctc.TokenPath(state.stable_ids, state.stable_probs), ctc.best_path(sure, listener.vocabulary)]
        )
        end = len(path) if last else _after_last_space(path.ids, listener.vocabulary)
        words = self._words(ctc.TokenPath(path.ids[:end], path.probabilities[:end]))
        state.frames_decoded += end
        state.stable_ids, state.stable_probs = path.ids[end:], path.probabilities[end:]
        found = []
        if words or last:
            found.append(self._final(words, last))
        rest = ctc.TokenPath(state.stable_ids, state.stable_probs)
        open_words = () if last else self._words(ctc.concat_paths([rest, ctc.best_path(unsure, listener.vocabulary)]))
        partial = ctc.join_words(open_words)
        if (partial or not found) and (words or partial != state.last_partial):
            staying = len(ctc.join_words(self._words(rest))) / len(partial) if partial else 1.0
            found.append(_segment(open_words, final=False, ends=False, stability=min(1.0, staying)))
        state.last_partial = partial
        if last:
            state.utterance_start, state.silence_start, state.frames_decoded = -1, -1, 0
        return found

    def _words(self, path: ctc.TokenPath) -> tuple[Word, ...]:
        """The words of frames that follow those that are read, with times of the stream."""
        state, listener = self.state, self.encoder
        frame_s = listener.hop_length / listener.rate_hz
        begun_s = state.utterance_start / listener.rate_hz + state.frames_decoded * frame_s
        words = ctc.path_to_words(path, listener.vocabulary, frame_s=frame_s, end_s=self._now_s() - begun_s)
        return tuple(_later(word, begun_s) for word in words)

    def _now_s(self) -> float:
        return self.state.num_samples / self.encoder.rate_hz

    def _final(self, words: tuple[Word, ...], last: bool) -> Segment:
        state = self.state
        if words and state.segment_start_s < 0:
            state.segment_start_s = words[0].start_s
        long = state.segment_start_s >= 0 and self._now_s() - state.segment_start_s >= self.endpointing.max_segment_s
        if last or long:
            state.segment_start_s = -1.0
        return _segment(words, final=True, ends=last or long, at_s=self._now_s())


def _sound(samples: Any) -> Samples:
    """What was fed as float32 [n]."""
    array = np.asarray(samples)
    if array.ndim != 1:
        raise AudioError(f"a stream is fed one channel, samples [n], not an array of shape {array.shape}")
    if array.dtype == np.int16:
        return array.astype(np.float32) / np.float32(32768)
    if array.dtype.kind != "f":
        raise AudioError(f"a stream is fed float32 of full scale ±1 or int16, not {array.dtype}")
    sound: Samples = array.astype(np.float32)
    if not np.isfinite(sound).all():
        at = int(np.flatnonzero(~np.isfinite(sound))[0])
        raise AudioError(f"sample {at} of {len(sound)} is {sound[at]}: nothing of this piece was taken")
    return sound


def _after_last_space(ids: NDArray[np.int32], vocabulary: Vocabulary) -> int:
    """The frame after the last one that holds nothing but a space; 0 where there is none."""
    spaces = [
        at for at, token in enumerate(vocabulary.tokens) if at == vocabulary.delimiter or (token and not token.strip())
    ]
    found = np.flatnonzero(np.isin(ids, spaces))
    return int(found[-1]) + 1 if len(found) else 0


def _later(word: Word, by_s: float) -> Word:
    characters = tuple(replace(one, start_s=one.start_s + by_s, end_s=one.end_s + by_s) for one in word.characters)
    return replace(word, start_s=word.start_s + by_s, end_s=word.end_s + by_s, characters=characters)


def _segment(words: Sequence[Word], *, final: bool, ends: bool, stability: float = 1.0, at_s: float = 0.0) -> Segment:
    return Segment(
        text=ctc.join_words(words),
        start_s=words[0].start_s if words else at_s,
        end_s=words[-1].end_s if words else at_s,
        words=tuple(words),
        confidence=fmean(word.confidence for word in words) if words else 0.0,
        is_final=final,
        is_endpoint=ends,
        stability=stability,
    )


def _last_partial(found: list[Segment]) -> list[Segment]:
    """Partials that something followed are past."""
    return [one for at, one in enumerate(found) if one.is_final or at == len(found) - 1]


def _packed(state: StreamState) -> bytes:
    """The arrays of a state and, as JSON, what else there is: a .npz without pickle."""
    plain = {
        name: value
        for name in StreamState.__slots__
        if not isinstance(value := getattr(state, name), np.ndarray | dict)
    }
    arrays: Arrays = {
        name: value for name in StreamState.__slots__ if isinstance(value := getattr(state, name), np.ndarray)
    }
    for group in ("detector", "memory"):
        arrays |= {f"{group}.{name}": value for name, value in (getattr(state, group) or {}).items()}
    out = BytesIO()
    np.savez(out, plain=np.frombuffer(json.dumps(plain).encode(), np.uint8), **arrays)  # type: ignore[arg-type]
    return out.getvalue()


def _unpacked(saved: bytes) -> StreamState:
    try:
        with np.load(BytesIO(saved), allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        plain = json.loads(bytes(found.pop("plain")))
        groups: dict[str, Arrays] = {"detector": {}, "memory": {}}
        for name in [name for name in found if "." in name]:
            group, _, key = name.partition(".")
            groups[group][key] = found.pop(name)
        return StreamState(**plain | found | {"detector": groups["detector"], "memory": groups["memory"] or None})
    except (ValueError, KeyError, TypeError, OSError, EOFError, BadZipFile) as wrong:
        raise ModelError(f"this is no saved stream, or a damaged one ({wrong})") from None
