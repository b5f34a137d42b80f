"""Transcribe a live stream: feed samples in pieces of any length, and get segments whose final words never change.

A `TranscriptionStream` detects speech (`VoiceActivityDetector`), encodes it (`StreamingEncoder`) and decodes frames
into words. A word is final when frames that later audio cannot change have ended it: with the space after it, with the
next word where the language has no spaces, or with a pause. Partial segments hold what follows the last final word, and
may change.

The whole state of a stream is a `StreamState`; `TranscriptionStream.save` returns it as bytes, from which any process
with the same model can continue. Audio is processed in steps of 32 ms, so that the words do not depend on how it is
split. Without speech, only the detector runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from threading import Lock
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mowa.decode import ctc
from mowa.decode.stream_state import Arrays, Samples, StreamState, deserialize, no_samples, serialize
from mowa.errors import AudioError, ModelError
from mowa.types import Segment, Vocabulary, Word

LogProbs = NDArray[np.float32]

MAX_PEAK = 16.0  # floats beyond it are integers of another scale (data.audio.values has the same)
STEP_S = 0.032  # one frame of the voice activity detector (data.audio.vad)
# speech begins at the first probability and may end below the second, as in Silero's own segmenter
SPEECH_THRESHOLD, SILENCE_THRESHOLD = 0.5, 0.35
# The detector depends on the level, and soft voices begin late in it: what is softer than this is amplified.
SOFT_DBFS, MAX_GAIN_DB, LEVEL_HALF_LIFE_S = -45.0, 40.0, 2.0


class VoiceActivityDetector(Protocol):
    """Returns the speech probability of each `STEP_S` seconds. Its state can be read and set."""

    state: Arrays

    def feed(self, samples: Samples) -> NDArray[np.float32]: ...


class StreamingEncoder(Protocol):
    """A model that encodes one utterance after another. Its state is passed in and returned as arrays.

    latency_s  the longest time between audio and the frames for it becoming final, without computing time
    """

    rate_hz: int
    hop_length: int
    vocabulary: Vocabulary
    latency_s: float

    def start_utterance(self, state: Arrays | None) -> Arrays:
        """Return the state at the start of an utterance. `state` is that of the previous one, None for the first."""

    def step(self, state: Arrays, samples: Samples, *, is_last: bool) -> tuple[Arrays, LogProbs, LogProbs]:
        """Encode samples [n] → new state, log-probabilities [T, V] of final frames, and [U, V] of frames after them.

        The latter may still change. With `is_last` the utterance ends and all its frames are final. `state` is not
        modified.
        """


@dataclass(frozen=True, slots=True)
class EndpointConfig:
    """Where utterances start and end, in seconds.

    min_silence_s  silence that ends an utterance
    max_segment_s  duration after which a segment ends at the next word; a longer word is broken at its longest pause
    speech_pad_s   audio before detected speech that is transcribed too
    vad            whether to detect speech; otherwise the stream is one utterance
    """

    min_silence_s: float = 0.6
    max_segment_s: float = 20.0
    speech_pad_s: float = 0.4
    vad: bool = True


DEFAULT_ENDPOINTING = EndpointConfig()


class TranscriptionStream:
    """One live stream. It may be fed from any thread, but from one at a time; streams can share a model.

    Final segments hold the words that became final with a feed. One with `is_endpoint` completes a text: that of all
    final segments since the previous endpoint; it may be empty itself. A feed returns at most one partial segment, as
    its last: what may follow the final words, until the next segment of either kind. Its `stability` is the fraction of
    its characters that are final.
    """

    def __init__(
        self,
        model: StreamingEncoder,
        vad: VoiceActivityDetector | None,
        endpointing: EndpointConfig = DEFAULT_ENDPOINTING,
    ) -> None:
        self.encoder, self.vad, self.endpointing = model, vad, endpointing
        self._step_samples = round(STEP_S * model.rate_hz)
        self.state = StreamState(vad_state=vad.state if vad is not None else {})
        self._feeding = Lock()

    @property
    def received_s(self) -> float:
        """Audio fed so far, in seconds."""
        return (self.state.num_samples + len(self.state.pending)) / self.encoder.rate_hz

    def feed(self, samples: Any, rate_hz: int | None = None) -> list[Segment]:
        """Process samples [n] (float32 of full scale ±1, or int16) and return the new segments.

        Raises AudioError, without taking any sample, if the stream is closed, if the rate or the shape is wrong, if a
        sample is NaN or infinite, or if another thread is feeding.
        """
        if self.state.closed:
            raise AudioError("this stream is closed; open a new one")
        if rate_hz is not None and rate_hz != self.encoder.rate_hz:
            raise AudioError(f"this stream needs {self.encoder.rate_hz} Hz, not {rate_hz} Hz. Resample the audio.")
        converted = _to_float32(samples)
        if not self._feeding.acquire(blocking=False):
            raise AudioError("another thread is feeding this stream; use one stream per thread")
        try:
            state = self.state
            state.pending = np.concatenate([state.pending, converted])
            segments: list[Segment] = []
            step = self._step_samples
            whole = len(state.pending) // step * step
            steps, state.pending = state.pending[:whole], state.pending[whole:].copy()
            for start in range(0, whole, step):
                segments += self._step(steps[start : start + step])
            return _drop_outdated_partials(segments)
        finally:
            self._feeding.release()

    def flush(self) -> list[Segment]:
        """Transcribe the rest as if a pause followed. Audio fed afterwards is another utterance."""
        if self.state.closed:
            raise AudioError("this stream is closed; open a new one")
        with self._feeding:
            state = self.state
            rest, state.pending = state.pending, no_samples()
            state.num_samples += len(rest)
            if state.utterance_start < 0 and (self.endpointing.vad or not len(rest)):
                return []
            return _drop_outdated_partials(self._decode(rest, is_last=True))

    def close(self) -> list[Segment]:
        """Flush the stream and close it. Closing it again returns nothing."""
        if self.state.closed:
            return []
        segments = self.flush()
        self.state.closed = True
        return segments

    def save(self) -> bytes:
        """Return the state as bytes, for `restore` of another stream with the same model."""
        with self._feeding:
            return serialize(self.state)

    def restore(self, saved: bytes) -> None:
        """Continue where the saved stream was. Raises ModelError if it was saved with another model or mode."""
        state = deserialize(saved)
        if state.encoder_state is not None:
            expected = self.encoder.start_utterance(None)
            if expected.keys() != state.encoder_state.keys():
                raise ModelError("this stream was saved with another model or mode; restore it with the same one")
        with self._feeding:
            self.state = state

    def _step(self, block: Samples) -> list[Segment]:
        state, config, rate_hz = self.state, self.endpointing, self.encoder.rate_hz
        speech_prob = 1.0
        if config.vad and self.vad is not None:
            self.vad.state = state.vad_state
            gain = self._follow_level(block)
            speech_prob = float(self.vad.feed(block if gain == 1 else block * np.float32(gain))[0])
            state.gain = gain if state.utterance_start < 0 else state.gain
            state.vad_state = self.vad.state
        state.num_samples += len(block)
        if state.utterance_start < 0 and speech_prob < SPEECH_THRESHOLD:
            padding = round(config.speech_pad_s * rate_hz)
            state.pre_speech = np.concatenate([state.pre_speech, block])[-padding:] if padding else state.pre_speech
            return []
        if speech_prob >= SPEECH_THRESHOLD:
            state.silence_start = -1
        elif speech_prob < SILENCE_THRESHOLD and state.silence_start < 0:
            state.silence_start = state.num_samples - len(block)
        paused = state.silence_start >= 0 and state.num_samples - state.silence_start >= config.min_silence_s * rate_hz
        return self._decode(block, is_last=paused)

    def _follow_level(self, block: Samples) -> float:
        """Update the level, which rises at once and halves in `LEVEL_HALF_LIFE_S`, and return the gain for it."""
        keep = 0.5 ** (STEP_S / LEVEL_HALF_LIFE_S)
        self.state.level = max(float(np.sqrt(np.mean(block.astype(np.float64) ** 2))), self.state.level * keep)
        wanted = 10 ** (SOFT_DBFS / 20) / max(self.state.level, 1e-9)
        return min(max(wanted, 1.0), 10 ** (MAX_GAIN_DB / 20))

    def _decode(self, samples: Samples, *, is_last: bool) -> list[Segment]:
        state, encoder = self.state, self.encoder
        if state.utterance_start < 0:
            samples, state.pre_speech = np.concatenate([state.pre_speech, samples]), no_samples()
            state.utterance_start = state.num_samples - len(samples)
            state.encoder_state = encoder.start_utterance(state.encoder_state)
        assert state.encoder_state is not None
        samples = samples if state.gain == 1 else samples * np.float32(state.gain)
        state.encoder_state, final, provisional = encoder.step(state.encoder_state, samples, is_last=is_last)
        if not (len(final) or len(provisional) or is_last):
            return []
        path = ctc.concat_paths(
            [ctc.TokenPath(state.stable_ids, state.stable_probs), ctc.best_path(final, encoder.vocabulary)]
        )
        end = len(path) if is_last else self._count_complete_frames(path)
        complete = ctc.TokenPath(path.ids[:end], path.probabilities[:end])
        words = self._words(complete)
        state.frames_decoded += end
        state.last_character = ctc.last_character(complete, encoder.vocabulary) or state.last_character
        state.stable_ids, state.stable_probs = path.ids[end:], path.probabilities[end:]
        segments = []
        if words or is_last:
            segments.append(self._final_segment(words, is_last))
        stable = ctc.TokenPath(state.stable_ids, state.stable_probs)
        partial_words: tuple[Word, ...] = ()
        if not is_last:
            partial_words = self._words(ctc.concat_paths([stable, ctc.best_path(provisional, encoder.vocabulary)]))
        partial = ctc.join_words(partial_words)
        if (partial or not segments) and (words or partial != state.last_partial):
            stability = len(ctc.join_words(self._words(stable))) / len(partial) if partial else 1.0
            segments.append(
                _to_segment(partial_words, is_final=False, is_endpoint=False, stability=min(1.0, stability))
            )
        state.last_partial = partial
        if is_last:
            state.utterance_start, state.silence_start, state.frames_decoded = -1, -1, 0
        return segments

    def _count_complete_frames(self, path: ctc.TokenPath) -> int:
        encoder = self.encoder
        if count := ctc.count_complete_frames(path, encoder.vocabulary):
            return count
        is_too_long = len(path) * encoder.hop_length >= self.endpointing.max_segment_s * encoder.rate_hz
        return ctc.find_longest_pause(path, encoder.vocabulary) if is_too_long else 0

    def _words(self, path: ctc.TokenPath) -> tuple[Word, ...]:
        """Return the words of the frames after `frames_decoded`, with times from the start of the stream."""
        state, encoder = self.state, self.encoder
        frame_s = encoder.hop_length / encoder.rate_hz
        start_s = state.utterance_start / encoder.rate_hz + state.frames_decoded * frame_s
        words = ctc.path_to_words(
            path,
            encoder.vocabulary,
            frame_s=frame_s,
            end_s=self._now_s() - start_s,
            before=state.last_character,
        )
        return tuple(_shift(word, start_s) for word in words)

    def _now_s(self) -> float:
        return self.state.num_samples / self.encoder.rate_hz

    def _final_segment(self, words: tuple[Word, ...], is_last: bool) -> Segment:
        state = self.state
        if words and state.segment_start_s < 0:
            state.segment_start_s = words[0].start_s
        now_s = self._now_s()
        too_long = state.segment_start_s >= 0 and now_s - state.segment_start_s >= self.endpointing.max_segment_s
        if is_last or too_long:
            state.segment_start_s = -1.0
        return _to_segment(words, is_final=True, is_endpoint=is_last or too_long, at_s=now_s)


def _to_float32(samples: Any) -> Samples:
    """Convert samples to float32 [n], or raise AudioError."""
    array = np.asarray(samples)
    if array.ndim != 1:
        raise AudioError(f"samples must have one channel, shape [n], not {array.shape}")
    if array.dtype == np.int16:
        return array.astype(np.float32) / np.float32(32768)
    if array.dtype.kind != "f":
        raise AudioError(f"samples must be float32 of full scale ±1, or int16, not {array.dtype}")
    converted: Samples = array.astype(np.float32)
    if not np.isfinite(converted).all():
        at = int(np.flatnonzero(~np.isfinite(converted))[0])
        raise AudioError(f"sample {at} of {len(converted)} is {converted[at]}; none of them was processed")
    if (peak := float(np.abs(converted).max(initial=0.0))) > MAX_PEAK:
        raise AudioError(
            f"samples reach {peak:.0f}, and full scale is 1: divide 16-bit values by 32768, or pass them as int16; none"
            " of them was processed"
        )
    return converted


def _shift(word: Word, by_s: float) -> Word:
    characters = tuple(replace(one, start_s=one.start_s + by_s, end_s=one.end_s + by_s) for one in word.characters)
    return replace(word, start_s=word.start_s + by_s, end_s=word.end_s + by_s, characters=characters)


def _to_segment(
    words: Sequence[Word], *, is_final: bool, is_endpoint: bool, stability: float = 1.0, at_s: float = 0.0
) -> Segment:
    return Segment(
        text=ctc.join_words(words),
        start_s=words[0].start_s if words else at_s,
        end_s=words[-1].end_s if words else at_s,
        words=tuple(words),
        confidence=fmean(word.confidence for word in words) if words else 0.0,
        is_final=is_final,
        is_endpoint=is_endpoint,
        stability=stability,
    )


def _drop_outdated_partials(segments: list[Segment]) -> list[Segment]:
    """Remove partial segments that another segment follows."""
    return [segment for index, segment in enumerate(segments) if segment.is_final or index == len(segments) - 1]
