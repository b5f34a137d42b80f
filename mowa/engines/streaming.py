"""Nets as listeners of live streams (`decode.stream`): in chunks with a memory, or through a window that slides.

- `cached`, for nets trained with chunks (`train`, `streaming`): of every frame the keys and values are kept, so what
  was before is never computed again; `right_s` of sound after each chunk is heard with it and once more with the next.
  What is said of a chunk is what the net says of the whole utterance under `chunks.chunked`. A frame can be final
  `chunk_s`, `right_s` and the front end's reach after its sound. Where a net has absolute positions, or sees everything
  to its left, an utterance is gone on with anew after `RENEW_S`, with `OVERLAP_S` heard again.
- `window`, for all nets: of every chunk the net hears `left_s` before it and `right_s` after it. What the front end
  makes of the sound is made once and kept, where it does not look beyond a frame's own samples; the rest is computed
  anew for every chunk. A frame can be final `chunk_s` + `right_s` after its sound.

Samples are normalised as they come (`data.level`), not by what nobody has heard yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from mowa import hardware
from mowa.data import audio
from mowa.data.audio import running_norm
from mowa.data.audio.vad import SileroVAD
from mowa.decode.stream import (
    DEFAULT_ENDPOINTING,
    Arrays,
    EndpointConfig,
    LogProbs,
    Samples,
    StreamingEncoder,
    TranscriptionStream,
)
from mowa.engines import pytorch, selection
from mowa.engines.onnx import OnnxEngine
from mowa.engines.protocol import Engine, hop_length, num_frames
from mowa.engines.pytorch import PyTorchEngine
from mowa.engines.transcription import DEFAULT_MODEL, resolve_artifact
from mowa.errors import ModelError
from mowa.loading.ctc import load
from mowa.models.ctc_encoder import chunk_mask, streaming
from mowa.models.ctc_encoder.chunk_mask import TrainedChunking
from mowa.models.ctc_encoder.streaming import CacheShape, EagerPlan
from mowa.types import Model

CACHE_RESET_S, CACHE_OVERLAP_S = 20.0, 1.92
CACHE_GROWTH_FRAMES = 256  # frames for which room is made at a time
FloatArray = NDArray[np.float32]


class ChunkStep(Protocol):
    """One chunk, as `streaming.hear` has it, in arrays."""

    cache_shape: CacheShape

    def __call__(
        self, samples: Samples, position: int, kv_cache: FloatArray, conv_cache: FloatArray
    ) -> tuple[LogProbs, FloatArray, FloatArray]: ...


@dataclass(frozen=True, slots=True)
class StreamingConfig:
    """How a stream is heard. `auto` is cached for a net that was trained for it, and window for others.

    `chunk_s` is how much is heard at a time (None: 0.32 s cached, 1.28 s in windows), `left_s` what is seen before that
    (None: as in training, or 4 s in windows), `right_s` what is heard after it, and again with the next chunk (None:
    the most that it was trained with, up to a chunk, or 1.28 s in windows: the positional convolution of wav2vec2
    looks 1.26 s ahead).
    """

    mode: Literal["auto", "cached", "window"] = "auto"
    chunk_s: float | None = None
    left_context_s: float | None = None
    lookahead_s: float | None = None


CACHED_CHUNK_S, WINDOW_CHUNK_S, WINDOW_LEFT_CONTEXT_S, WINDOW_LOOKAHEAD_S = 0.32, 1.28, 4.0, 1.28


def stream(
    model: str | Model | Engine | None = None,
    config: StreamingConfig = StreamingConfig(),
    rules: EndpointConfig = DEFAULT_ENDPOINTING,
) -> TranscriptionStream:
    """A live stream that a model hears: an alias, a folder, a hub id, what `load` or `engine` gave; None is pl-tiny.

    ModelError where the model or the engine cannot hear so. Streams over one engine share its weights, and may be fed
    in as many threads as there are streams; each has a detector and a memory of its own.
    """
    if model is None or isinstance(model, str):
        folder = resolve_artifact(model or DEFAULT_MODEL)
        model = load(model or DEFAULT_MODEL) if folder is None else selection.open_artifact(folder).engine
    engine = pytorch.open_engine(model) if isinstance(model, Model) else model
    return TranscriptionStream(create_streaming_encoder(engine, config), SileroVAD() if rules.vad else None, rules)


def create_streaming_encoder(engine: Engine, config: StreamingConfig = StreamingConfig()) -> StreamingEncoder:
    """What hears for `stream`; may be shared by many of them, in any threads."""
    frame_s = hop_length(engine.config) / engine.preprocessing.rate_hz
    trained, mode = chunk_mask.get_trained_chunking(engine.config), config.mode
    if mode == "auto":
        mode = "cached" if trained and _step(engine) is not None else "window"
    chunk_s = config.chunk_s or (CACHED_CHUNK_S if mode == "cached" else WINDOW_CHUNK_S)
    size = round(chunk_s / frame_s)
    if size < 1 or min(config.left_context_s or 0, config.lookahead_s or 0) < 0:
        raise ModelError(f"chunk_s is {chunk_s:g}: a chunk is {frame_s:g} s at least, and no time is below 0")
    if mode == "cached":
        left, ahead = (None if s is None else round(s / frame_s) for s in (config.left_context_s, config.lookahead_s))
        return _cached(engine, trained, size, left, ahead)
    left_s = WINDOW_LEFT_CONTEXT_S if config.left_context_s is None else config.left_context_s
    right_s = WINDOW_LOOKAHEAD_S if config.lookahead_s is None else config.lookahead_s
    left, right = (math.ceil(round(s / frame_s, 6) / size) * size for s in (left_s, right_s))
    if isinstance(engine, PyTorchEngine) and engine.config.feat_extract_norm == "layer":
        return FeatureWindowEncoder(engine, size, left, right)
    return WaveformWindowEncoder(engine, size, left, right)


def _cached(
    engine: Engine, trained: TrainedChunking | None, size: int, left: int | None, ahead: int | None
) -> CachedEncoder:
    name = engine.origin.name
    if trained is None:
        raise ModelError(
            f"{name} was not trained to hear in chunks (no {chunk_mask.STREAMING_CONFIG_KEY!r} in its config): use --mode window,"
            " or train it with `streaming` in the recipe"
        )
    step = _step(engine)
    if step is None:
        raise ModelError(f"the {engine.name} engine has no memory for {name}: use --mode window, or --engine pytorch")
    most = max((one for one in trained.lookaheads if one <= size), default=0)
    return CachedEncoder(
        engine, step, size, trained.left_context if left is None else left, most if ahead is None else ahead
    )


def _step(engine: Engine) -> ChunkStep | None:
    """What computes one chunk for `engine`; None where it cannot hear in chunks."""
    if isinstance(engine, PyTorchEngine) and not chunk_mask.unsupported_reason(engine.model.net):
        return _PyTorchStep(engine)
    return _OnnxStep(engine) if isinstance(engine, OnnxEngine) and engine.streaming_session is not None else None


class _PyTorchStep:
    def __init__(self, engine: PyTorchEngine) -> None:
        self._engine, self._parts = engine, engine.plan or EagerPlan(engine.model.net)
        self.cache_shape = streaming.cache_shape(engine.model.net)

    def __call__(
        self, samples: Samples, position: int, kv_cache: FloatArray, conv_cache: FloatArray
    ) -> tuple[LogProbs, FloatArray, FloatArray]:
        device = self._engine.device
        with torch.inference_mode(), hardware.matmul_precision(self._engine.precision.matmul):
            heard, kept, below = (torch.from_numpy(one).to(device) for one in (samples, kv_cache, conv_cache))
            logits, made, below = streaming.encode_chunk(self._parts, heard, position, kept, below)
            scores = torch.log_softmax(logits, -1)
            return scores.cpu().numpy(), made.float().cpu().numpy(), below.float().cpu().numpy()


class _OnnxStep:
    def __init__(self, engine: OnnxEngine) -> None:
        self._graph = engine.streaming_session
        given = {one.name: one.shape for one in self._graph.get_inputs()}
        layers, _, _, heads, width = given["cache"]
        self._names = list(given)
        self.cache_shape = CacheShape(layers, heads, width, *given.get("low", (0, 0)))

    def __call__(
        self, samples: Samples, position: int, kv_cache: FloatArray, conv_cache: FloatArray
    ) -> tuple[LogProbs, FloatArray, FloatArray]:
        given = (samples, np.array([position]), np.ascontiguousarray(kv_cache), conv_cache)
        logits, made, *below = self._graph.run(None, dict(zip(self._names, given, strict=False)))
        logits -= logits.max(-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        return logits, made, below[0] if below else np.zeros((len(logits), 0), np.float32)


class _ChunkedEncoder:
    """What all listeners share: samples normalised as they come, and frames counted in chunks of `size`."""

    def __init__(self, engine: Engine, chunk_frames: int, lookahead_frames: int) -> None:
        self.engine, self.chunk_frames = engine, chunk_frames
        self.vocabulary, self.rate_hz = engine.vocabulary, engine.preprocessing.rate_hz
        self.hop_length = hop_length(engine.config)
        self.receptive_field = chunk_mask.receptive_field(engine.config)
        self.latency_s = (
            (chunk_frames + lookahead_frames) * self.hop_length + self.receptive_field - self.hop_length
        ) / self.rate_hz

    def _fresh(self, memory: Arrays | None) -> Arrays:
        known = (
            running_norm.RunningStats.prior(rate_hz=self.rate_hz)
            if memory is None
            else running_norm.RunningStats(*memory["level"].tolist())
        )
        return {"level": _numbers(known), "raw": np.zeros(0, np.float32), "sound": np.zeros(0, np.float32)}

    def _normalised(self, memory: Arrays, samples: Samples, last: bool) -> Arrays:
        """The memory with the samples in it: those that a level is known for are `sound`, the rest `raw`."""
        raw = np.concatenate([memory["raw"], samples])
        whole = len(raw) if last else len(raw) // running_norm.BLOCK_SAMPLES * running_norm.BLOCK_SAMPLES
        ready, raw = raw[:whole], raw[whole:]
        if self.engine.preprocessing.normalize:
            ready, now = running_norm.normalize_running(
                ready, running_norm.RunningStats(*memory["level"].tolist()), self.rate_hz
            )
            memory = memory | {"level": _numbers(now)}
        return memory | {"raw": raw, "sound": np.concatenate([memory["sound"], ready])}

    def _none(self) -> LogProbs:
        return np.zeros((0, len(self.vocabulary)), np.float32)


class CachedEncoder(_ChunkedEncoder):
    """Chunk after chunk, with keys and values of what was before; `left` frames of it are seen, None: all. The `ahead`
    frames that are heard with a chunk are made again with the next one."""

    def __init__(
        self, engine: Engine, step: ChunkStep, chunk_frames: int, left_frames: int | None, lookahead_frames: int
    ) -> None:
        super().__init__(engine, chunk_frames, lookahead_frames)
        self._step, self.left_frames, self.lookahead_frames = step, left_frames, lookahead_frames
        frame_s = self.hop_length / self.rate_hz
        endless = left_frames is not None and step.cache_shape.conv_frames > 0
        self._renew = None if endless else int(CACHE_RESET_S / frame_s) // chunk_frames * chunk_frames
        self._overlap = math.ceil(CACHE_OVERLAP_S / frame_s / chunk_frames) * chunk_frames

    def start_utterance(self, state: Arrays | None) -> Arrays:
        """counts: frames that the cache holds, and frames that there were."""
        return self._fresh(state) | self._blank() | {"tape": np.zeros(0, np.float32)}

    def step(self, state: Arrays, samples: Samples, *, is_last: bool) -> tuple[Arrays, LogProbs, LogProbs]:
        """As `Listener.hear`. tape: the sound of the last frames that stay, to begin anew with."""
        state = self._normalised(state, samples, is_last)
        sound, found, unsure = state["sound"], [], self._none()
        whole = self.chunk_frames * self.hop_length
        wanted = whole + self.lookahead_frames * self.hop_length + self.receptive_field - self.hop_length
        while len(sound) >= (self.receptive_field if is_last else wanted):
            if self._renew is not None and state["counts"][1] >= self._renew:
                state = self._renewed(state, sound[: wanted - whole])
            state, scores = self._one(state, sound[:wanted])
            found.append(scores[: self.chunk_frames])
            unsure = scores[self.chunk_frames :]
            tape = np.concatenate([state["tape"], sound[:whole]])
            state["tape"], sound = tape[-self._overlap * self.hop_length :], sound[whole:]
        return (
            state | {"sound": sound},
            np.concatenate(found) if found else self._none(),
            self._none() if is_last else unsure,
        )

    def _one(self, memory: Arrays, sound: Samples) -> tuple[Arrays, LogProbs]:
        """One chunk with what is heard ahead of it, and the memory after the chunk."""
        filled, position = memory["counts"].tolist()
        cache, low = memory["cache"], memory["low"]
        first = 0 if self.left_frames is None else max(0, filled - self.left_frames)
        scores, made, below = self._step(sound, position, cache[:, :, first:filled], low)
        count = min(len(scores), self.chunk_frames)
        if filled + count > cache.shape[2]:
            kept = cache[:, :, first:filled]
            filled -= first
            room = -(-(filled + count) // CACHE_GROWTH_FRAMES) * CACHE_GROWTH_FRAMES + CACHE_GROWTH_FRAMES
            cache = np.empty((*cache.shape[:2], room, *cache.shape[3:]), np.float32)
            cache[:, :, :filled] = kept
        cache[:, :, filled : filled + count] = made[:, :, :count]
        low = np.concatenate([low, below[:count]])[count:]
        return memory | {"cache": cache, "low": low, "counts": np.array([filled + count, position + count])}, scores

    def _blank(self) -> Arrays:
        one = self._step.cache_shape
        return {
            "cache": np.zeros((one.num_layers, 2, 0, one.num_heads, one.head_dim), np.float32),
            "low": np.zeros((one.conv_frames, one.hidden_size), np.float32),
            "counts": np.zeros(2, np.int64),
        }

    def _renewed(self, memory: Arrays, after: Samples) -> Arrays:
        """A memory that begins with the last `OVERLAP_S`: positions and keys do not go on for ever."""
        tape, memory = memory["tape"], memory | self._blank()
        whole, sound = self.chunk_frames * self.hop_length, np.concatenate([tape, after])
        for start in range(0, len(tape), whole):
            memory, _ = self._one(memory, sound[start : start + whole + len(after)])
        return memory


class FeatureWindowEncoder(_ChunkedEncoder):
    """The whole net over a window of frames for every chunk; what the front end makes of the sound is kept."""

    def __init__(self, engine: PyTorchEngine, chunk_frames: int, left_frames: int, lookahead_frames: int) -> None:
        super().__init__(engine, chunk_frames, lookahead_frames)
        self._parts = engine.plan or EagerPlan(engine.model.net)
        self._native, self.left_frames, self.lookahead_frames = engine, left_frames, lookahead_frames
        longest = getattr(engine.config, "absolute_positions", None)
        if longest is not None and left_frames + chunk_frames + lookahead_frames > longest:
            raise ModelError(
                f"{engine.origin.name} hears {longest * self.hop_length / self.rate_hz:g} s at once; a window has"
                f" {(left_frames + chunk_frames + lookahead_frames) * self.hop_length / self.rate_hz:g} s: make left_s or right_s smaller"
            )

    def start_utterance(self, state: Arrays | None) -> Arrays:
        wide = int(self.engine.config.conv_dim[-1])
        return self._fresh(state) | {"features": np.zeros((0, wide), np.float32), "before": np.zeros(1, np.int64)}

    def step(self, state: Arrays, samples: Samples, *, is_last: bool) -> tuple[Arrays, LogProbs, LogProbs]:
        """As `Listener.hear`. before: of the features that are kept, how many are of frames that are final."""
        state = self._normalised(state, samples, is_last)
        sound, features, before = state["sound"], state["features"], int(state["before"][0])
        whole, found, unsure = self.chunk_frames * self.hop_length, [], self._none()
        while len(sound) >= whole + self.receptive_field - self.hop_length:
            features = np.concatenate(
                [features, self._features(sound[: whole + self.receptive_field - self.hop_length])]
            )
            sound = sound[whole:]
            if len(features) - before >= self.chunk_frames + self.lookahead_frames:
                scores = self._above(features)
                found.append(scores[before : before + self.chunk_frames])
                unsure = scores[before + self.chunk_frames :]
                features = features[max(0, before + self.chunk_frames - self.left_frames) :]
                before = min(before + self.chunk_frames, self.left_frames)
        if is_last:
            if len(sound) >= self.receptive_field:
                features = np.concatenate([features, self._features(sound)])
            if len(features) > before:
                found.append(self._above(features)[before:])
            unsure = self._none()
        state = state | {"sound": sound, "features": features, "before": np.array([before])}
        return state, np.concatenate(found) if found else self._none(), unsure

    def _features(self, sound: Samples) -> NDArray[np.float32]:
        with torch.inference_mode(), hardware.matmul_precision(self._native.precision.matmul):
            made: NDArray[np.float32] = self._parts.front_end(torch.from_numpy(sound)).float().cpu().numpy()
            return made

    def _above(self, features: NDArray[np.float32]) -> LogProbs:
        with torch.inference_mode(), hardware.matmul_precision(self._native.precision.matmul):
            net = self._native.model.net
            like = next(net.base_model.feature_projection.parameters())
            (logits,) = self._parts.logits_from_features([torch.from_numpy(features).to(like)])
            return torch.log_softmax(logits, -1).cpu().numpy()


class WaveformWindowEncoder(_ChunkedEncoder):
    """The whole engine over a window of samples for every chunk, each window normalised by itself."""

    def __init__(self, engine: Engine, chunk_frames: int, left_frames: int, lookahead_frames: int) -> None:
        super().__init__(engine, chunk_frames, lookahead_frames)
        self.left_frames, self.lookahead_frames = left_frames, lookahead_frames

    def start_utterance(self, state: Arrays | None) -> Arrays:
        return {"sound": np.zeros(0, np.float32), "before": np.zeros(1, np.int64)}

    def step(self, state: Arrays, samples: Samples, *, is_last: bool) -> tuple[Arrays, LogProbs, LogProbs]:
        """As `Listener.hear`. before: of the sound that is kept, how many frames are final."""
        sound, before = np.concatenate([state["sound"], samples]), int(state["before"][0])
        found, unsure = [], self._none()
        while True:
            ready = before + self.chunk_frames + self.lookahead_frames
            if len(sound) < ready * self.hop_length + self.receptive_field - self.hop_length:
                break
            scores = self._emissions(sound[: ready * self.hop_length + self.receptive_field - self.hop_length])
            found.append(scores[before : before + self.chunk_frames])
            unsure = scores[before + self.chunk_frames :]
            first = max(0, before + self.chunk_frames - self.left_frames)
            sound, before = sound[first * self.hop_length :], before + self.chunk_frames - first
        if is_last:
            if num_frames(self.engine.config, len(sound)) > before:
                found.append(self._emissions(sound)[before:])
            unsure = self._none()
        state = {"sound": sound, "before": np.array([before])}
        return state, np.concatenate(found) if found else self._none(), unsure

    def _emissions(self, sound: Samples) -> LogProbs:
        clip = audio.normalize(sound) if self.engine.preprocessing.normalize else sound
        (scores,) = self.engine.emissions([clip.astype(np.float32)])
        return scores


def _numbers(known: running_norm.RunningStats) -> NDArray[np.float64]:
    return np.array([known.count, known.total, known.sum_squares])
