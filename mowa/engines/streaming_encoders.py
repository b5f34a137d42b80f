"""Streaming encoders: implementations of `decode.stream.StreamingEncoder` that encode audio chunk by chunk.

All of them are stateless; the state of an utterance is a dict of arrays that `step` takes and returns.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from mowa import hardware
from mowa.data import audio
from mowa.data.audio import running_norm
from mowa.decode.stream import LogProbs
from mowa.decode.stream_state import Arrays, Samples
from mowa.engines.protocol import ChunkStep, Engine, FloatArray
from mowa.engines.pytorch import PyTorchEngine
from mowa.errors import ModelError
from mowa.models.ctc_encoder.geometry import frame_geometry, max_absolute_position
from mowa.models.ctc_encoder.streaming import EagerPlan

CACHE_RESET_S, CACHE_OVERLAP_S = 20.0, 1.92
CACHE_GROWTH_FRAMES = 256  # frames by which the key-value cache is enlarged


class _ChunkedEncoder:
    """Base of the encoders: normalizes samples as they arrive and counts frames in chunks of `chunk_frames`."""

    def __init__(self, engine: Engine, chunk_frames: int, lookahead_frames: int) -> None:
        self.engine, self.chunk_frames = engine, chunk_frames
        self.vocabulary, self.rate_hz = engine.vocabulary, engine.preprocessing.rate_hz
        self._geometry = frame_geometry(engine.config)
        self.hop_length, self.receptive_field = self._geometry.hop, self._geometry.receptive_field
        self.latency_s = self._geometry.num_samples(chunk_frames + lookahead_frames) / self.rate_hz

    def _initial_state(self, state: Arrays | None) -> Arrays:
        """norm_stats: running statistics; pending_samples: not normalized yet; samples: normalized, not encoded yet."""
        stats = (
            running_norm.RunningStats.prior(rate_hz=self.rate_hz)
            if state is None
            else running_norm.RunningStats(*state["norm_stats"].tolist())
        )
        empty = np.zeros(0, np.float32)
        return {"norm_stats": _stats_array(stats), "pending_samples": empty, "samples": empty}

    def _normalize(self, state: Arrays, samples: Samples, is_last: bool) -> Arrays:
        """Return the state with `samples` added; whole blocks are normalized, the rest is pending."""
        pending = np.concatenate([state["pending_samples"], samples])
        whole = len(pending) if is_last else len(pending) // running_norm.BLOCK_SAMPLES * running_norm.BLOCK_SAMPLES
        ready, pending = pending[:whole], pending[whole:]
        if self.engine.preprocessing.normalize:
            stats = running_norm.RunningStats(*state["norm_stats"].tolist())
            ready, stats = running_norm.normalize_running(ready, stats, self.rate_hz)
            state = state | {"norm_stats": _stats_array(stats)}
        return state | {"pending_samples": pending, "samples": np.concatenate([state["samples"], ready])}

    def _no_frames(self) -> LogProbs:
        return np.zeros((0, len(self.vocabulary)), np.float32)


class CachedEncoder(_ChunkedEncoder):
    """Encodes each chunk once, with the cached keys and values of the `left_frames` before it (None: all).

    The `lookahead_frames` that are encoded with a chunk are encoded again with the next one.
    """

    def __init__(
        self, engine: Engine, step: ChunkStep, chunk_frames: int, left_frames: int | None, lookahead_frames: int
    ) -> None:
        super().__init__(engine, chunk_frames, lookahead_frames)
        self._step, self.left_frames, self.lookahead_frames = step, left_frames, lookahead_frames
        frame_s = self.hop_length / self.rate_hz
        unbounded = left_frames is not None and step.cache_shape.conv_frames > 0
        self._reset_frames = None if unbounded else int(CACHE_RESET_S / frame_s) // chunk_frames * chunk_frames
        self._overlap_frames = math.ceil(CACHE_OVERLAP_S / frame_s / chunk_frames) * chunk_frames

    def start_utterance(self, state: Arrays | None) -> Arrays:
        """As `StreamingEncoder.start_utterance`. frame_counts: int64 [2], frames in the cache and frames so far."""
        return self._initial_state(state) | self._empty_cache() | {"recent_samples": np.zeros(0, np.float32)}

    def step(self, state: Arrays, samples: Samples, *, is_last: bool) -> tuple[Arrays, LogProbs, LogProbs]:
        """As `StreamingEncoder.step`. recent_samples: the audio from which the cache is rebuilt."""
        state = self._normalize(state, samples, is_last)
        sound, stable, unstable = state["samples"], [], self._no_frames()
        chunk = self.chunk_frames * self.hop_length
        needed = self._geometry.num_samples(self.chunk_frames + self.lookahead_frames)
        while len(sound) >= (self.receptive_field if is_last else needed):
            if self._reset_frames is not None and state["frame_counts"][1] >= self._reset_frames:
                state = self._rebuild_cache(state, sound[: needed - chunk])
            state, scores = self._encode_chunk(state, sound[:needed])
            stable.append(scores[: self.chunk_frames])
            unstable = scores[self.chunk_frames :]
            recent = np.concatenate([state["recent_samples"], sound[:chunk]])
            state["recent_samples"], sound = recent[-self._overlap_frames * self.hop_length :], sound[chunk:]
        return (
            state | {"samples": sound},
            np.concatenate(stable) if stable else self._no_frames(),
            self._no_frames() if is_last else unstable,
        )

    def _encode_chunk(self, state: Arrays, sound: Samples) -> tuple[Arrays, LogProbs]:
        """Encode a chunk with its look-ahead; return the state after the chunk and log-probabilities [T, V]."""
        filled, position = state["frame_counts"].tolist()
        kv_cache, conv_cache = state["kv_cache"], state["conv_cache"]
        first = 0 if self.left_frames is None else max(0, filled - self.left_frames)
        scores, new_kv, new_conv = self._step(sound, position, kv_cache[:, :, first:filled], conv_cache)
        count = min(len(scores), self.chunk_frames)
        if filled + count > kv_cache.shape[2]:
            kept = kv_cache[:, :, first:filled]
            filled -= first
            capacity = -(-(filled + count) // CACHE_GROWTH_FRAMES) * CACHE_GROWTH_FRAMES + CACHE_GROWTH_FRAMES
            kv_cache = np.empty((*kv_cache.shape[:2], capacity, *kv_cache.shape[3:]), np.float32)
            kv_cache[:, :, :filled] = kept
        kv_cache[:, :, filled : filled + count] = new_kv[:, :, :count]
        conv_cache = np.concatenate([conv_cache, new_conv[:count]])[count:]
        counts = np.array([filled + count, position + count])
        return state | {"kv_cache": kv_cache, "conv_cache": conv_cache, "frame_counts": counts}, scores

    def _empty_cache(self) -> Arrays:
        shape = self._step.cache_shape
        return {
            "kv_cache": np.zeros((shape.num_layers, 2, 0, shape.num_heads, shape.head_dim), np.float32),
            "conv_cache": np.zeros((shape.conv_frames, shape.conv_size), np.float32),
            "frame_counts": np.zeros(2, np.int64),
        }

    def _rebuild_cache(self, state: Arrays, lookahead: Samples) -> Arrays:
        """Return a state whose cache holds only the last CACHE_OVERLAP_S, with positions from 0."""
        recent, state = state["recent_samples"], state | self._empty_cache()
        chunk, sound = self.chunk_frames * self.hop_length, np.concatenate([recent, lookahead])
        for start in range(0, len(recent), chunk):
            state, _ = self._encode_chunk(state, sound[start : start + chunk + len(lookahead)])
        return state


class FeatureWindowEncoder(_ChunkedEncoder):
    """Encodes each chunk with its context again, over cached outputs of the front end."""

    def __init__(self, engine: PyTorchEngine, chunk_frames: int, left_frames: int, lookahead_frames: int) -> None:
        super().__init__(engine, chunk_frames, lookahead_frames)
        self._plan = engine.plan or EagerPlan(engine.model.net)
        self._pytorch, self.left_frames, self.lookahead_frames = engine, left_frames, lookahead_frames
        max_frames = max_absolute_position(engine.config)
        frames = left_frames + chunk_frames + lookahead_frames
        if max_frames is not None and frames > max_frames:
            frame_s = self.hop_length / self.rate_hz
            raise ModelError(
                f"{engine.origin.name} takes at most {max_frames * frame_s:g} s at once, and a window has"
                f" {frames * frame_s:g} s: lower left_context_s or lookahead_s"
            )

    def start_utterance(self, state: Arrays | None) -> Arrays:
        dim = int(self.engine.config.conv_dim[-1])
        return self._initial_state(state) | {
            "features": np.zeros((0, dim), np.float32),
            "final_frames": np.zeros(1, np.int64),
        }

    def step(self, state: Arrays, samples: Samples, *, is_last: bool) -> tuple[Arrays, LogProbs, LogProbs]:
        """As `StreamingEncoder.step`. final_frames: how many of the kept features belong to frames already final."""
        state = self._normalize(state, samples, is_last)
        sound, features, final = state["samples"], state["features"], int(state["final_frames"][0])
        chunk, stable, unstable = self.chunk_frames * self.hop_length, [], self._no_frames()
        needed = self._geometry.num_samples(self.chunk_frames)
        while len(sound) >= needed:
            features = np.concatenate([features, self._features(sound[:needed])])
            sound = sound[chunk:]
            if len(features) - final >= self.chunk_frames + self.lookahead_frames:
                scores = self._scores(features)
                stable.append(scores[final : final + self.chunk_frames])
                unstable = scores[final + self.chunk_frames :]
                features = features[max(0, final + self.chunk_frames - self.left_frames) :]
                final = min(final + self.chunk_frames, self.left_frames)
        if is_last:
            if len(sound) >= self.receptive_field:
                features = np.concatenate([features, self._features(sound)])
            if len(features) > final:
                stable.append(self._scores(features)[final:])
            unstable = self._no_frames()
        state = state | {"samples": sound, "features": features, "final_frames": np.array([final])}
        return state, np.concatenate(stable) if stable else self._no_frames(), unstable

    def _features(self, sound: Samples) -> FloatArray:
        """Run the front end: float32 [n] → [T, C]."""
        with torch.inference_mode(), hardware.matmul_precision(self._pytorch.precision.matmul):
            features: FloatArray = self._plan.front_end(torch.from_numpy(sound)).float().cpu().numpy()
            return features

    def _scores(self, features: FloatArray) -> LogProbs:
        """Run the encoder and head: features [T, C] → log-probabilities [T, V]."""
        with torch.inference_mode(), hardware.matmul_precision(self._pytorch.precision.matmul):
            parameter = next(self._plan.anatomy.projection.parameters())
            (logits,) = self._plan.logits_from_features([torch.from_numpy(features).to(parameter)])
            return torch.log_softmax(logits, -1).cpu().numpy()


class WaveformWindowEncoder(_ChunkedEncoder):
    """Runs the whole engine on a window of samples for each chunk; each window is normalized by itself."""

    def __init__(self, engine: Engine, chunk_frames: int, left_frames: int, lookahead_frames: int) -> None:
        super().__init__(engine, chunk_frames, lookahead_frames)
        self.left_frames, self.lookahead_frames = left_frames, lookahead_frames

    def start_utterance(self, state: Arrays | None) -> Arrays:
        return {"samples": np.zeros(0, np.float32), "final_frames": np.zeros(1, np.int64)}

    def step(self, state: Arrays, samples: Samples, *, is_last: bool) -> tuple[Arrays, LogProbs, LogProbs]:
        """As `StreamingEncoder.step`. final_frames: how many frames of the kept samples are already final."""
        sound, final = np.concatenate([state["samples"], samples]), int(state["final_frames"][0])
        stable, unstable = [], self._no_frames()
        while True:
            needed = self._geometry.num_samples(final + self.chunk_frames + self.lookahead_frames)
            if len(sound) < needed:
                break
            scores = self._scores(sound[:needed])
            stable.append(scores[final : final + self.chunk_frames])
            unstable = scores[final + self.chunk_frames :]
            first = max(0, final + self.chunk_frames - self.left_frames)
            sound, final = sound[first * self.hop_length :], final + self.chunk_frames - first
        if is_last:
            if self._geometry.num_frames(len(sound)) > final:
                stable.append(self._scores(sound)[final:])
            unstable = self._no_frames()
        state = {"samples": sound, "final_frames": np.array([final])}
        return state, np.concatenate(stable) if stable else self._no_frames(), unstable

    def _scores(self, sound: Samples) -> LogProbs:
        clip = audio.preprocess(sound, self.engine.preprocessing)
        (scores,) = self.engine.emissions([clip.astype(np.float32)])
        return scores


def _stats_array(stats: running_norm.RunningStats) -> np.ndarray:
    return np.array([stats.count, stats.total, stats.sum_squares])
