"""The graph of one chunk, for live streams: what `families.streaming.hear` computes, as ONNX beside `model.onnx`.

- inputs: `input_values` float32 [N], the samples of one chunk, of what is heard ahead of it, and what the front end
  reaches beyond that; `position` int64 [1], how many frames there were before; `cache` float32 [layers, 2, S, heads,
  d], keys and values of the S frames before it that are seen, S from 0 on; where positions are not absolute, `low`
  float32 [P, D], the `below` of the P frames before, zeros where there were none.
- outputs, of each frame: `logits` float32 [c, V], `made` [layers, 2, c, heads, d], and `below` [c, D] where there is
  `low`. What is made of frames that stay is to be put behind `cache` and `low`.

Who keeps the cache is not known here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mowa.data.audio import running_norm
from mowa.exporters import verify
from mowa.models.ctc_encoder import streaming
from mowa.models.ctc_encoder.chunk_mask import ChunkConfig, apply_chunk_mask, receptive_field
from mowa.models.ctc_encoder.streaming import CacheShape, EagerPlan

CHUNK_GRAPH_FILE = "chunk.onnx"
TRACE_SAMPLES = 16_000  # samples that are long enough to trace a chunk of any net with


class ChunkNet(nn.Module):
    """A net, one chunk at a time, as a function of tensors alone."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        self._parts = (EagerPlan(net),)  # in a tuple: not a part of this module twice
        self.cache_shape = streaming.cache_shape(net)

    def forward(
        self, input_values: Tensor, position: Tensor, cache: Tensor, conv_cache: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        (parts,) = self._parts
        before = cache.new_zeros(0, 0) if conv_cache is None else conv_cache
        logits, made, below = streaming.encode_chunk(parts, input_values, position, cache, before)
        return (logits, made) if conv_cache is None else (logits, made, below)


def make_chunk_inputs(cache_shape: CacheShape, samples: Tensor, cached_frames: int) -> tuple[Tensor, ...]:
    """What a graph is given at the beginning, or with a cache of `frames`."""
    cache = torch.zeros(cache_shape.num_layers, 2, cached_frames, cache_shape.num_heads, cache_shape.head_dim)
    given = (samples, torch.tensor([cached_frames]), cache)
    return (*given, torch.zeros(cache_shape.conv_frames, cache_shape.hidden_size)) if cache_shape.conv_frames else given


def export_chunk_graph(net: Any, file: Path, opset: int) -> None:
    """Trace `net` (as `plain` gives it, narrow products in their place) into `file`."""
    graph = ChunkNet(net).eval()
    sound = torch.from_numpy(np.random.default_rng(0).standard_normal(TRACE_SAMPLES, np.float32))
    given = make_chunk_inputs(graph.cache_shape, sound, 5)
    axes: list[Any] = [{0: "samples"}, None, {2: "seen"}]
    names, made = ["input_values", "position", "cache"], ["logits", "made"]
    if graph.cache_shape.conv_frames:
        axes, names, made = [*axes, None], [*names, "low"], [*made, "below"]
    torch.onnx.export(
        graph,
        given,
        str(file),
        input_names=names,
        output_names=made,
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=tuple(axes),
        verbose=False,
    )


@torch.inference_mode()
def compare_chunked(net: Any, session: Any, speech: np.ndarray, chunks: ChunkConfig) -> tuple[float, float]:
    """`compare.apart` of what the graph says of `speech`, float32 [n], chunk by chunk, and the net under `chunked`."""
    stride, far = math.prod(net.config.conv_stride), receptive_field(net.config)
    speech, _ = running_norm.normalize_running(speech, running_norm.RunningStats.prior())
    with apply_chunk_mask(net, chunks):
        truth = verify.compute_logits(net, [speech])
    _, _, cache, *low = (one.numpy() for one in make_chunk_inputs(streaming.cache_shape(net), torch.zeros(0), 0))
    said = []
    for first in range(0, len(speech) - far + 1, chunks.size * stride):
        piece = speech[first : first + (chunks.size + chunks.lookahead) * stride + far - stride]
        given = [
            piece,
            np.array([first // stride]),
            cache[:, :, -chunks.left_context :] if chunks.left_context else cache,
            *low,
        ]
        feed = dict(zip((one.name for one in session.get_inputs()), given, strict=True))
        logits, made, *below = session.run(None, feed)
        cache = np.concatenate([cache, made[:, :, : chunks.size]], 2)
        low = [np.concatenate([a, b[: chunks.size]])[-len(a) :] for a, b in zip(low, below, strict=True)]
        said.append(torch.from_numpy(logits[: chunks.size]))
    return verify.compare_logits([torch.cat(said)], truth)
