"""Transcribe live audio: open a stream over a model, with cached or windowed streaming.

cached   for nets trained with chunked attention (`streaming` in their config). Keys and values of every frame are kept,
         so earlier frames are not computed again; `lookahead_s` of audio after each chunk is encoded with it and again
         with the next chunk. The output for a chunk equals that of the whole utterance under the chunk mask
         (`models.ctc_encoder.chunk_mask`). A frame is final `chunk_s` + `lookahead_s` + the receptive field of the
         front end after its audio. Where a net has absolute positions or unlimited left context, the cache is rebuilt
         every `CACHE_RESET_S` from the last `CACHE_OVERLAP_S`.
window   for all nets. Each chunk is encoded with `left_context_s` before and `lookahead_s` after it. Outputs of a
         layer-norm front end are kept; everything above is computed again for each chunk. A frame is final `chunk_s` +
         `lookahead_s` after its audio.

Samples are normalized with running statistics (`data.audio.running_norm`), not with those of audio still to come.
The encoders are in `streaming_encoders`. `StreamSession` runs a stream over a live source.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, cast

from mowa.data.audio.vad import SileroVAD
from mowa.data.inputs.source import AudioBlock, BufferedSource
from mowa.decode.stream import (
    DEFAULT_ENDPOINTING,
    EndpointConfig,
    StreamingEncoder,
    TranscriptionStream,
)
from mowa.engines.protocol import ChunkStep, Engine, SteppingEngine
from mowa.engines.pytorch import PyTorchEngine
from mowa.engines.registry import ENGINES
from mowa.engines.streaming_encoders import CachedEncoder, FeatureWindowEncoder, WaveformWindowEncoder
from mowa.errors import AudioError, ModelError
from mowa.models.ctc_encoder import chunk_mask
from mowa.models.ctc_encoder.anatomy import read_anatomy
from mowa.models.ctc_encoder.chunk_mask import TrainedChunking
from mowa.models.ctc_encoder.geometry import frame_geometry
from mowa.types import Segment

CACHED_CHUNK_S, WINDOW_CHUNK_S, WINDOW_LEFT_CONTEXT_S, WINDOW_LOOKAHEAD_S = 0.32, 1.28, 4.0, 1.28


@dataclass(frozen=True, slots=True)
class StreamingConfig:
    """How a stream is encoded. Times in seconds.

    mode            auto: cached for a net that was trained for it, else window
    chunk_s         audio per chunk; None: 0.32 cached, 1.28 window
    left_context_s  audio before the chunk; None: as in training cached, 4.0 window
    lookahead_s     audio after the chunk, which adds this much latency; None: cached, the longest of training up to one
                    chunk; window, 1.28, since the positional convolution of wav2vec2 looks 1.26 s ahead
    """

    mode: Literal["auto", "cached", "window"] = "auto"
    chunk_s: float | None = None
    left_context_s: float | None = None
    lookahead_s: float | None = None


def stream(
    engine: Engine, config: StreamingConfig = StreamingConfig(), endpointing: EndpointConfig = DEFAULT_ENDPOINTING
) -> TranscriptionStream:
    """Open a live stream over an engine. Each stream has its own VAD and state.

    Raises ModelError if the engine does not support the configuration.
    """
    encoder = create_streaming_encoder(engine, config)
    vad = SileroVAD(encoder.rate_hz) if endpointing.vad else None
    return TranscriptionStream(encoder, vad, endpointing)


def create_streaming_encoder(engine: Engine, config: StreamingConfig = StreamingConfig()) -> StreamingEncoder:
    """Return the encoder of a stream. It is stateless: several streams, in any threads, may share it.

    Raises ModelError as `stream` does.
    """
    frame_s = frame_geometry(engine.config).hop / engine.preprocessing.rate_hz
    trained, mode = chunk_mask.get_trained_chunking(engine.config), config.mode
    if mode == "auto":
        mode = "cached" if trained and _chunk_step(engine) is not None else "window"
    chunk_s = config.chunk_s or (CACHED_CHUNK_S if mode == "cached" else WINDOW_CHUNK_S)
    size = round(chunk_s / frame_s)
    if size < 1 or min(config.left_context_s or 0, config.lookahead_s or 0) < 0:
        raise ModelError(
            f"chunk_s is {chunk_s:g}: it must be at least one frame ({frame_s:g} s), and no time may be negative"
        )
    if mode == "cached":
        left, ahead = (None if s is None else round(s / frame_s) for s in (config.left_context_s, config.lookahead_s))
        return _cached(engine, trained, size, left, ahead)
    left_s = WINDOW_LEFT_CONTEXT_S if config.left_context_s is None else config.left_context_s
    lookahead_s = WINDOW_LOOKAHEAD_S if config.lookahead_s is None else config.lookahead_s
    left, ahead = (math.ceil(round(s / frame_s, 6) / size) * size for s in (left_s, lookahead_s))
    if isinstance(engine, PyTorchEngine) and not read_anatomy(engine.model.net).normalizes_over_time:
        return FeatureWindowEncoder(engine, size, left, ahead)
    return WaveformWindowEncoder(engine, size, left, ahead)


def _cached(
    engine: Engine, trained: TrainedChunking | None, size: int, left: int | None, ahead: int | None
) -> CachedEncoder:
    name = engine.origin.name
    if trained is None:
        raise ModelError(
            f"{name} was not trained with chunked attention (no {chunk_mask.STREAMING_CONFIG_KEY!r} in its config): use"
            " --mode window, or fine-tune it with `streaming` in the recipe"
        )
    step = _chunk_step(engine)
    if step is None:
        raise ModelError(
            f"the {engine.name} engine has no cached streaming for {name}: use --mode window, or --engine pytorch"
        )
    longest = max((one for one in trained.lookaheads if one <= size), default=0)
    return CachedEncoder(
        engine, step, size, trained.left_context if left is None else left, longest if ahead is None else ahead
    )


def _chunk_step(engine: Engine) -> ChunkStep | None:
    """Return the function that encodes one chunk, or None if the engine has none for this net."""
    info = ENGINES.find(engine.name)
    return cast(SteppingEngine, engine).chunk_step() if info and "step" in info.capabilities else None


# --- a stream over a live source --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TimedSegment:
    """A segment with times of the source, in seconds.

    `processed_s` is how much audio had been processed; `latency_s` the time since the end of its last word was
    recorded, None for a segment without words.
    """

    segment: Segment
    processed_s: float
    latency_s: float | None


class StreamSession:
    """A stream fed from a source; it tracks compute time, latency and lost audio.

    Where audio was lost, the stream is flushed and later segments are shifted by the length of the gap.
    """

    def __init__(self, stream: TranscriptionStream) -> None:
        self.stream = stream
        self.compute_s = self.lost_s = 0.0
        self.latency_s: float | None = None  # of the latest words
        self._captures: deque[tuple[float, float]] = deque(maxlen=8192)  # (end of block, when it was recorded)

    @property
    def processed_s(self) -> float:
        return self.stream.received_s + self.lost_s

    def events(self, blocks: BufferedSource) -> Iterator[list[TimedSegment]]:
        """Yield the segments that each block brings, often none; at the end, and before an AudioError, the open ones.

        Raises AudioError as the source does.
        """
        failure = None
        try:
            for block in blocks:
                yield self._feed(block)
        except AudioError as error:
            failure = error
        yield self._with_times(time.monotonic(), self.stream.close())
        if failure is not None:
            raise failure

    def _feed(self, block: AudioBlock) -> list[TimedSegment]:
        flushed = []
        if block.lost_s:
            flushed = self._with_times(time.monotonic(), self.stream.flush())
            self.lost_s += block.lost_s
        started_s = time.monotonic()
        found = self.stream.feed(block.samples)
        if len(block.samples):
            self._captures.append((self.processed_s, block.captured_at_s))
        return flushed + self._with_times(started_s, found)

    def _with_times(self, started_s: float, found: list[Segment]) -> list[TimedSegment]:
        now_s = time.monotonic()
        self.compute_s += now_s - started_s
        events = []
        for segment in found:
            shifted = _shift(segment, self.lost_s)
            latency_s = max(0.0, now_s - self._recorded_at_s(shifted.end_s)) if shifted.words else None
            self.latency_s = self.latency_s if latency_s is None else latency_s
            events.append(TimedSegment(shifted, self.processed_s, latency_s))
        return events

    def _recorded_at_s(self, position_s: float) -> float:
        """Return when the audio at `position_s` was recorded, interpolated within its block."""
        later_end_s, later_s = self._captures[-1]
        for end_s, captured_s in reversed(self._captures):
            if end_s < position_s:
                fraction = min(1.0, (position_s - end_s) / (later_end_s - end_s)) if later_end_s > end_s else 1.0
                return captured_s + fraction * (later_s - captured_s)
            later_end_s, later_s = end_s, captured_s
        return later_s


def _shift(segment: Segment, by_s: float) -> Segment:
    if not by_s:
        return segment
    words = tuple(replace(word, start_s=word.start_s + by_s, end_s=word.end_s + by_s) for word in segment.words)
    return replace(segment, start_s=segment.start_s + by_s, end_s=segment.end_s + by_s, words=words)
