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
The encoders are in `streaming_encoders`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from mowa import hardware
from mowa.data.audio.vad import SileroVAD
from mowa.decode.stream import (
    DEFAULT_ENDPOINTING,
    EndpointConfig,
    LogProbs,
    Samples,
    StreamingEncoder,
    TranscriptionStream,
)
from mowa.engines.onnx import OnnxEngine
from mowa.engines.protocol import Engine, log_softmax
from mowa.engines.pytorch import PyTorchEngine
from mowa.engines.streaming_encoders import (
    CachedEncoder,
    ChunkStep,
    FeatureWindowEncoder,
    FloatArray,
    WaveformWindowEncoder,
)
from mowa.errors import ModelError
from mowa.models.ctc_encoder import chunk_mask
from mowa.models.ctc_encoder import streaming as encoder_streaming
from mowa.models.ctc_encoder.anatomy import read_anatomy
from mowa.models.ctc_encoder.chunk_mask import TrainedChunking
from mowa.models.ctc_encoder.geometry import frame_geometry
from mowa.models.ctc_encoder.streaming import CacheShape, EagerPlan

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
    return TranscriptionStream(encoder, SileroVAD() if endpointing.vad else None, endpointing)


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
    if isinstance(engine, PyTorchEngine) and not chunk_mask.unsupported_reason(engine.model.net):
        return _PyTorchStep(engine)
    return _OnnxStep(engine) if isinstance(engine, OnnxEngine) and engine.streaming_session is not None else None


class _PyTorchStep:
    def __init__(self, engine: PyTorchEngine) -> None:
        self._engine, self._plan = engine, engine.plan or EagerPlan(engine.model.net)
        self.cache_shape = encoder_streaming.cache_shape(engine.model.net)

    def __call__(
        self, samples: Samples, position: int, kv_cache: FloatArray, conv_cache: FloatArray
    ) -> tuple[LogProbs, FloatArray, FloatArray]:
        device = self._engine.device
        with torch.inference_mode(), hardware.matmul_precision(self._engine.precision.matmul):
            sound, kv, conv = (torch.from_numpy(one).to(device) for one in (samples, kv_cache, conv_cache))
            logits, new_kv, new_conv = encoder_streaming.encode_chunk(self._plan, sound, position, kv, conv)
            scores = torch.log_softmax(logits, -1)
            return scores.cpu().numpy(), new_kv.float().cpu().numpy(), new_conv.float().cpu().numpy()


class _OnnxStep:
    """Inputs of the graph, in order: samples, position, key-value cache and, without absolute positions, conv cache."""

    def __init__(self, engine: OnnxEngine) -> None:
        self._session = engine.streaming_session
        inputs = self._session.get_inputs()
        layers, _, _, heads, head_dim = inputs[2].shape
        conv_frames, conv_size = inputs[3].shape if len(inputs) > 3 else (0, 0)
        self._names = [one.name for one in inputs]
        self.cache_shape = CacheShape(layers, heads, head_dim, conv_frames, conv_size)

    def __call__(
        self, samples: Samples, position: int, kv_cache: FloatArray, conv_cache: FloatArray
    ) -> tuple[LogProbs, FloatArray, FloatArray]:
        values = (samples, np.array([position]), np.ascontiguousarray(kv_cache), conv_cache)
        logits, new_kv, *new_conv = self._session.run(None, dict(zip(self._names, values, strict=False)))
        scores = log_softmax(logits)
        return scores, new_kv, new_conv[0] if new_conv else np.zeros((len(scores), 0), np.float32)
