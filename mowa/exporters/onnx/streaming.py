"""Export the ONNX graph of one chunk, for live streams: `encode_chunk` of `models.ctc_encoder.streaming`.

Inputs
- `input_values` float32 [N]: samples of the chunk, of its look-ahead, and of the remaining receptive field
- `position` int64 [1]: number of frames before the chunk
- `kv_cache` float32 [layers, 2, S, heads, head_dim]: keys and values of the S frames before it, S ≥ 0
- `conv_cache` float32 [P, D], only without absolute positions: inputs of the positional convolutions for the P frames
  before it, initially zeros

Outputs, per frame of chunk and look-ahead
- `logits` float32 [c, V]
- `new_kv` [layers, 2, c, heads, head_dim]
- `new_conv` [c, D], only with `conv_cache`

The caller appends the outputs of the chunk's own frames, without the look-ahead, to the caches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mowa.data.audio import running_norm
from mowa.exporters import verify
from mowa.models.ctc_encoder import streaming
from mowa.models.ctc_encoder.chunk_mask import ChunkConfig, apply_chunk_mask
from mowa.models.ctc_encoder.geometry import frame_geometry
from mowa.models.ctc_encoder.streaming import CacheShape, EagerPlan
from mowa.models.diff import ModelDiff, compare

CHUNK_GRAPH_FILE = "chunk.onnx"
TRACE_SAMPLES = 16_000  # longer than the receptive field of any supported net
TRACE_CACHED_FRAMES = 5


class ChunkNet(nn.Module):
    """`encode_chunk` as a module over tensors, for tracing."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        self._plan = (EagerPlan(net),)  # in a tuple, so that it is not a submodule
        self.cache_shape = streaming.cache_shape(net)

    def forward(
        self, input_values: Tensor, position: Tensor, kv_cache: Tensor, conv_cache: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        (plan,) = self._plan
        conv = kv_cache.new_zeros(0, 0) if conv_cache is None else conv_cache
        logits, new_kv, new_conv = streaming.encode_chunk(plan, input_values, position, kv_cache, conv)
        return (logits, new_kv) if conv_cache is None else (logits, new_kv, new_conv)


def make_chunk_inputs(cache_shape: CacheShape, samples: Tensor, cached_frames: int) -> tuple[Tensor, ...]:
    """Return inputs of the graph with zero caches of `cached_frames` frames."""
    kv_cache = torch.zeros(cache_shape.num_layers, 2, cached_frames, cache_shape.num_heads, cache_shape.head_dim)
    inputs = (samples, torch.tensor([cached_frames]), kv_cache)
    if not cache_shape.conv_frames:
        return inputs
    return (*inputs, torch.zeros(cache_shape.conv_frames, cache_shape.conv_size))


def export_chunk_graph(net: Any, file: Path, opset: int) -> None:
    """Trace the chunk graph of `net`, a prepared net with `QuantMatMul` layers, into `file`."""
    graph = ChunkNet(net).eval()
    samples = torch.from_numpy(np.random.default_rng(0).standard_normal(TRACE_SAMPLES, np.float32))
    inputs = make_chunk_inputs(graph.cache_shape, samples, TRACE_CACHED_FRAMES)
    dynamic_shapes: list[Any] = [{0: "samples"}, None, {2: "cached_frames"}]
    input_names, output_names = ["input_values", "position", "kv_cache"], ["logits", "new_kv"]
    if graph.cache_shape.conv_frames:
        dynamic_shapes.append(None)
        input_names.append("conv_cache")
        output_names.append("new_conv")
    torch.onnx.export(
        graph,
        inputs,
        str(file),
        input_names=input_names,
        output_names=output_names,
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=tuple(dynamic_shapes),
        verbose=False,
    )


@torch.inference_mode()
def compare_chunked(net: Any, session: Any, speech: np.ndarray, chunks: ChunkConfig) -> ModelDiff:
    """Compare the graph, chunk by chunk over `speech` (float32 [n]), with the net under `apply_chunk_mask`."""
    geometry = frame_geometry(net.config)
    speech, _ = running_norm.normalize_running(speech, running_norm.RunningStats.prior())
    with apply_chunk_mask(net, chunks):
        reference = verify.compute_logits(net, [speech])
    empty = make_chunk_inputs(streaming.cache_shape(net), torch.zeros(0), 0)
    _, _, kv_cache, *conv_cache = (tensor.numpy() for tensor in empty)
    names = [one.name for one in session.get_inputs()]
    parts = []
    for start in range(0, len(speech) - geometry.receptive_field + 1, chunks.size * geometry.hop):
        samples = speech[start : start + geometry.num_samples(chunks.size + chunks.lookahead)]
        first = 0 if chunks.left_context is None else max(0, kv_cache.shape[2] - chunks.left_context)
        inputs = (samples, np.array([start // geometry.hop]), kv_cache[:, :, first:], *conv_cache)
        logits, new_kv, *new_conv = session.run(None, dict(zip(names, inputs, strict=True)))
        kv_cache = np.concatenate([kv_cache, new_kv[:, :, : chunks.size]], 2)
        caches = zip(conv_cache, new_conv, strict=True)
        conv_cache = [np.concatenate([old, new[: chunks.size]])[-len(old) :] for old, new in caches]
        parts.append(torch.from_numpy(logits[: chunks.size]))
    return compare(reference, [torch.cat(parts)])
