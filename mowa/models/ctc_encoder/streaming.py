"""Run a CTC net chunk by chunk with cached keys and values: every sample passes through the net once.

The logits of `encode_chunk` over successive chunks equal those of the whole recording under
`chunk_mask.apply_chunk_mask`. A net is computed by its `CpuPlan`, or by its own modules (`EagerPlan`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from mowa.models.ctc_encoder.anatomy import BlockParts, read_anatomy
from mowa.models.ctc_encoder.cpu_plan import CpuPlan


class EncoderBlock(Protocol):
    """One block, in two parts around its attention."""

    @property
    def scaling(self) -> float: ...

    def qkv(self, states: Tensor) -> tuple[Tensor, ...]:
        """Return q, k and v, [T, H, d] each, of states [T, D]; q is not scaled."""

    def after_attention(self, states: Tensor, attended: Tensor) -> Tensor:
        """Return the states [T, D] after the block, given those before it and the attention's output [T, H, d]."""


class EagerPlan:
    """A net's own modules behind the interface of `CpuPlan`, on any device."""

    def __init__(self, net: Any) -> None:
        self.anatomy = read_anatomy(net)
        self.blocks = [_EagerBlock(parts) for parts in self.anatomy.block_parts()]
        self._like = next(net.parameters())

    def front_end(self, samples: Tensor) -> Tensor:
        return self.anatomy.features(samples.to(self._like)[None])[0]

    def logits_from_features(self, features: list[Tensor]) -> list[Tensor]:
        out = []
        for one in features:
            states = self.anatomy.encoder(self.project(one)[None]).last_hidden_state
            out.append(self.anatomy.head(states[0]).float())
        return out

    def project(self, features: Tensor) -> Tensor:
        return self.anatomy.project(features[None])[0]

    def head(self, states: Tensor) -> Tensor:
        logits: Tensor = self.anatomy.head(self.anatomy.after_blocks(states[None])[0]).float()
        return logits


class _EagerBlock:
    def __init__(self, parts: BlockParts) -> None:
        self._parts, self.scaling = parts, parts.scaling

    def qkv(self, states: Tensor) -> tuple[Tensor, ...]:
        parts = self._parts
        states = parts.attention_input(states)
        projected = (linear(states) for linear in (parts.q, parts.k, parts.v))
        return tuple(one.unflatten(-1, (parts.num_heads, -1)) for one in projected)

    def after_attention(self, states: Tensor, attended: Tensor) -> Tensor:
        parts = self._parts
        return parts.after_attention(
            states,
            attended.flatten(1),
            add_output=lambda x, residual: residual + parts.out(x),
            add_feed_forward=lambda x, residual: residual + parts.feed_forward(x),
        )


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Sizes of the caches of a stream.

    Attributes:
        num_layers: blocks, each with cached keys and values.
        num_heads: attention heads.
        head_dim: size of a head.
        conv_frames: cached input frames of the positional convolutions; 0 with absolute positions.
        conv_size: size of such a frame, the inputs of all these convolutions; 0 with absolute positions.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    conv_frames: int
    conv_size: int


def cache_shape(net: Any) -> CacheShape:
    """Return the sizes of the caches that `encode_chunk` needs for `net`."""
    config, parts, conv_frames, conv_size = net.config, read_anatomy(net), 0, 0
    if parts.absolute_positions is None:
        layers = parts.position_layers
        conv_frames, conv_size = layers[0].conv.kernel_size[0] // 2, len(layers) * config.hidden_size
    heads = config.num_attention_heads
    return CacheShape(config.num_hidden_layers, heads, config.hidden_size // heads, conv_frames, conv_size)


def encode_chunk(
    plan: CpuPlan | EagerPlan, samples: Tensor, position: int | Tensor, kv_cache: Tensor, conv_cache: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute one chunk with its look-ahead.

    The caller appends the results for the chunk's own frames, not the look-ahead, to the caches.

    Args:
        plan: the net.
        samples: float32 [n], of c frames: the chunk, its look-ahead and the rest of the receptive field.
        position: number of frames before the chunk.
        kv_cache: [layers, 2, S, H, d], keys and values of the S frames before the chunk that it attends to.
        conv_cache: [P, L D], inputs of the L positional convolutions for the P = `conv_frames` frames before the chunk,
            zeros before the beginning.

    Returns:
        logits float32 [c, V]; new keys and values [layers, 2, c, H, d]; new inputs of the convolutions [c, L D], or
        [c, 0] with absolute positions.
    """
    states = plan.project(plan.front_end(samples))
    positions, new_conv = _streaming_positions(plan, states, position, conv_cache)
    states = plan.anatomy.before_blocks(states + positions)
    new_kv = []
    blocks: Sequence[EncoderBlock] = plan.blocks
    for index, block in enumerate(blocks):
        q, k, v = block.qkv(states)
        new_kv.append(torch.stack([k, v]))
        keys, values = (torch.cat([old, new]) for old, new in zip(kv_cache[index].to(k.dtype), (k, v), strict=True))
        q, keys, values = (one.transpose(0, 1) for one in (q, keys, values))
        attended = torch.softmax((q * block.scaling) @ keys.transpose(1, 2), -1) @ values
        states = block.after_attention(states, attended.transpose(0, 1))
    return plan.head(states), torch.stack(new_kv), new_conv


def _streaming_positions(
    plan: CpuPlan | EagerPlan, states: Tensor, position: int | Tensor, conv_cache: Tensor
) -> tuple[Tensor, Tensor]:
    """Positions [c, D] of a chunk, and the states to append to `conv_cache`."""
    parts = plan.anatomy
    if parts.absolute_positions is not None:
        frames = torch.arange(states.shape[0], device=states.device) + position
        return parts.absolute_positions.at(frames, states), states[:, :0]
    inputs, layers = [], parts.position_layers
    for layer, cache in zip(layers, conv_cache.to(states).unflatten(1, (len(layers), -1)).unbind(1), strict=True):
        inputs.append(states)
        conv = layer.conv
        kernel = conv.kernel_size[0]
        padded = functional.pad(torch.cat([cache, states]).T, (0, kernel - 1 - kernel // 2))
        weight, bias = conv.weight.to(states.dtype), conv.bias.to(states.dtype)
        states = layer.activate(functional.conv1d(padded[None], weight, bias, groups=conv.groups))[0].T
    return states, torch.cat(inputs, 1)
