"""Train a CTC encoder with chunked attention: chunk lengths in frames, and one draw of them per batch.

Source: chunks of varying size in training are from arXiv:2012.05481; `mowa.models.ctc_encoder.chunk_mask` says what
each frame attends to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mowa.data.audio import running_norm
from mowa.errors import RecipeError
from mowa.models.ctc_encoder import chunk_mask
from mowa.models.ctc_encoder.chunk_mask import ChunkConfig, TrainedChunking
from mowa.models.ctc_encoder.geometry import frame_geometry
from mowa.training.config.ctc import ChunkedTraining

LEVEL_ERROR_DB = 4.0  # standard deviation of the level that a stream assumes before it has measured one
FULL_CONTEXT = 0  # as a chunk length in frames


@dataclass(frozen=True, slots=True)
class ChunkSchedule:
    """Chunk and look-ahead lengths in frames, of which each batch draws one; FULL_CONTEXT is no chunk.

    Batches in chunks are normalized as live audio is: with the prior level of a stream, or, where `level_error_db` is
    set, with the level of the recording and a random error.
    """

    chunk_sizes: tuple[int, ...]
    lookaheads: tuple[int, ...] = (0,)
    left_context: int | None = None
    level_error_db: float | None = None

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """Draw the chunk length and look-ahead of a batch, in frames."""
        size, lookahead = int(rng.choice(self.chunk_sizes)), int(rng.choice(self.lookaheads))
        return size, lookahead if size else 0

    def normalize(self, samples: np.ndarray, rng: np.random.Generator, rate_hz: int) -> np.ndarray:
        """Normalize samples float32 [n] as a live stream does, by what came before each block."""
        prior = running_norm.RunningStats.prior(rate_hz=rate_hz)
        if self.level_error_db is not None:
            error = 10 ** (rng.normal(0, self.level_error_db) / 10)
            prior = running_norm.RunningStats.prior(float(samples.var()) * error, rate_hz)
        return running_norm.normalize_running(samples, prior, rate_hz)[0]

    def for_evaluation(self) -> ChunkSchedule:
        """Return the smallest chunk alone, with the longest look-ahead that is not longer, as `mowa.stream` uses it."""
        size = min(size for size in self.chunk_sizes if size)
        lookahead = max((one for one in self.lookaheads if one <= size), default=min(self.lookaheads))
        return ChunkSchedule((size,), (lookahead,), self.left_context)

    def trained_chunking(self) -> TrainedChunking:
        """Return what the checkpoint's config says about its training."""
        sizes = tuple(sorted({size for size in self.chunk_sizes if size}))
        return TrainedChunking(sizes, self.left_context, tuple(sorted(set(self.lookaheads))))

    def config(self, size: int, lookahead: int) -> ChunkConfig | None:
        """Return the chunk mask of a batch; None for full context."""
        return ChunkConfig(size, self.left_context, lookahead) if size else None


def resolve_schedule(config: ChunkedTraining, net: Any, rate_hz: int) -> ChunkSchedule | None:
    """Return the recipe's chunk lengths in frames of `net`; None where the recipe has none.

    Raises:
        RecipeError: the net cannot be computed in chunks, or a chunk is shorter than a frame.
    """
    if not config.chunk_s:
        return None
    if reason := chunk_mask.unsupported_reason(net):
        raise RecipeError(f"streaming: this checkpoint cannot stream: {reason}; leave out the section")
    frame_s = frame_geometry(net.config).hop / rate_hz

    def frames(seconds: float) -> int:
        return round(seconds / frame_s)

    sizes = [FULL_CONTEXT if math.isinf(seconds) else frames(seconds) for seconds in config.chunk_s]
    for size, seconds in zip(sizes, config.chunk_s, strict=True):
        if not size and not math.isinf(seconds):
            raise RecipeError(f"streaming: chunk_s: {seconds:g} is shorter than a frame of the net ({frame_s:g} s)")
    left = None if math.isinf(config.left_context_s) else frames(config.left_context_s)
    return ChunkSchedule(tuple(sizes), tuple(map(frames, config.lookahead_s)), left, LEVEL_ERROR_DB)
