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

from mowa.data import level
from mowa.export import compare
from mowa.families import streaming
from mowa.families.chunks import Chunks, chunked, reach
from mowa.families.streaming import Shape, Stock

GRAPH = "chunk.onnx"
REACH = 16_000  # samples that are long enough to trace a chunk of any net with


class Chunk(nn.Module):
    """A net, one chunk at a time, as a function of tensors alone."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        self._parts = (Stock(net),)  # in a tuple: not a part of this module twice
        self.kept = streaming.shape(net)

    def forward(
        self, input_values: Tensor, position: Tensor, cache: Tensor, low: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        (parts,) = self._parts
        before = cache.new_zeros(0, 0) if low is None else low
        logits, made, below = streaming.hear(parts, input_values, position, cache, before)
        return (logits, made) if low is None else (logits, made, below)


def inputs(kept: Shape, sound: Tensor, frames: int) -> tuple[Tensor, ...]:
    """What a graph is given at the beginning, or with a cache of `frames`."""
    cache = torch.zeros(kept.layers, 2, frames, kept.heads, kept.width)
    given = (sound, torch.tensor([frames]), cache)
    return (*given, torch.zeros(kept.low, kept.wide)) if kept.low else given


def write(net: Any, file: Path, opset: int) -> None:
    """Trace `net` (as `plain` gives it, narrow products in their place) into `file`."""
    graph = Chunk(net).eval()
    sound = torch.from_numpy(np.random.default_rng(0).standard_normal(REACH, np.float32))
    given = inputs(graph.kept, sound, 5)
    axes: list[Any] = [{0: "samples"}, None, {2: "seen"}]
    names, made = ["input_values", "position", "cache"], ["logits", "made"]
    if graph.kept.low:
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
def compared(net: Any, session: Any, speech: np.ndarray, how: Chunks) -> tuple[float, float]:
    """`compare.apart` of what the graph says of `speech`, float32 [n], chunk by chunk, and the net under `chunked`."""
    stride, far = math.prod(net.config.conv_stride), reach(net.config)
    speech, _ = level.normalised(speech, level.Level.typical())
    with chunked(net, how):
        truth = compare.said(net, [speech])
    _, _, cache, *low = (one.numpy() for one in inputs(streaming.shape(net), torch.zeros(0), 0))
    said = []
    for first in range(0, len(speech) - far + 1, how.size * stride):
        piece = speech[first : first + (how.size + how.ahead) * stride + far - stride]
        given = [piece, np.array([first // stride]), cache[:, :, -how.left :] if how.left else cache, *low]
        feed = dict(zip((one.name for one in session.get_inputs()), given, strict=True))
        logits, made, *below = session.run(None, feed)
        cache = np.concatenate([cache, made[:, :, : how.size]], 2)
        low = [np.concatenate([a, b[: how.size]])[-len(a) :] for a, b in zip(low, below, strict=True)]
        said.append(torch.from_numpy(logits[: how.size]))
    return compare.apart([torch.cat(said)], truth)
