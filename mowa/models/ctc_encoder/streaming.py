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

from mowa.models.ctc_encoder.cpu_plan import CpuPlan
from mowa.models.ctc_encoder.positions import absolute_position_table, look_up


class EncoderBlock(Protocol):
    """One block, in two parts around its attention."""

    scaling: float

    def qkv(self, states: Tensor) -> tuple[Tensor, ...]:
        """Return q, k and v, [T, H, d] each, of states [T, D]; q is not scaled."""

    def after_attention(self, states: Tensor, attended: Tensor) -> Tensor:
        """Return the states [T, D] after the block, given those before it and the attention's output [T, H, d]."""


class EagerPlan:
    """A net's own modules behind the interface of `CpuPlan`, on any device."""

    def __init__(self, net: Any) -> None:
        self.net = net
        self.blocks = [_EagerBlock(net, layer) for layer in net.base_model.encoder.layers]
        self.position_table = absolute_position_table(net)
        self._like = next(net.parameters())

    def front_end(self, samples: Tensor) -> Tensor:
        features: Tensor = self.net.base_model.feature_extractor(samples.to(self._like)[None])[0].transpose(0, 1)
        return features

    def logits_from_features(self, features: list[Tensor]) -> list[Tensor]:
        out = []
        for one in features:
            states = self.net.base_model.encoder(self.project(one)[None]).last_hidden_state
            out.append(self.net.lm_head(states[0]).float())
        return out

    def project(self, features: Tensor) -> Tensor:
        states = self.net.base_model.feature_projection(features[None])
        return (states[0] if isinstance(states, tuple) else states)[0]

    def input_norm(self, states: Tensor) -> Tensor:
        stable = self.net.config.do_stable_layer_norm
        return states if stable else self.net.base_model.encoder.layer_norm(states)

    def head(self, states: Tensor) -> Tensor:
        states = self.net.base_model.encoder.layer_norm(states) if self.net.config.do_stable_layer_norm else states
        logits: Tensor = self.net.lm_head(states).float()
        return logits


class _EagerBlock:
    def __init__(self, net: Any, layer: Any) -> None:
        self._layer, self._stable = layer, net.config.do_stable_layer_norm
        self.scaling = layer.attention.scaling

    def qkv(self, states: Tensor) -> tuple[Tensor, ...]:
        attention = self._layer.attention
        states = self._layer.layer_norm(states) if self._stable else states
        projected = (linear(states) for linear in (attention.q_proj, attention.k_proj, attention.v_proj))
        return tuple(one.unflatten(-1, (attention.num_heads, -1)) for one in projected)

    def after_attention(self, states: Tensor, attended: Tensor) -> Tensor:
        layer = self._layer
        states = states + layer.attention.out_proj(attended.flatten(1))
        if not self._stable:
            states = layer.layer_norm(states)
            out: Tensor = layer.final_layer_norm(states + layer.feed_forward(states))
            return out
        states = states + layer.feed_forward(layer.final_layer_norm(states))
        adapter = getattr(layer, "adapter_layer", None)
        return states if adapter is None else states + adapter(states)


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Sizes of the caches of a stream.

    Attributes:
        num_layers: blocks, each with cached keys and values.
        num_heads: attention heads.
        head_dim: size of a head.
        conv_frames: cached input frames of the positional convolution; 0 with absolute positions.
        hidden_size: size of such a frame; 0 with absolute positions.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    conv_frames: int
    hidden_size: int


def cache_shape(net: Any) -> CacheShape:
    """Return the sizes of the caches that `encode_chunk` needs for `net`."""
    config, heads = net.config, net.config.num_attention_heads
    absolute = absolute_position_table(net) is not None
    conv_frames, hidden_size = (0, 0) if absolute else (config.num_conv_pos_embeddings // 2, config.hidden_size)
    return CacheShape(config.num_hidden_layers, heads, config.hidden_size // heads, conv_frames, hidden_size)


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
        conv_cache: [P, D], input of the positional convolution for the P = `conv_frames` frames before the chunk,
            zeros before the beginning.

    Returns:
        logits float32 [c, V]; new keys and values [layers, 2, c, H, d]; new inputs of the convolution [c, D], or [c, 0]
        with absolute positions.
    """
    states = plan.project(plan.front_end(samples))
    positions, new_conv = _streaming_positions(plan, states, position, conv_cache)
    states = plan.input_norm(states + positions)
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
    if plan.position_table is not None:
        frames = torch.arange(states.shape[0], device=states.device) + position
        return look_up(plan.position_table, frames, states), states[:, :0]
    module = plan.net.base_model.encoder.pos_conv_embed
    conv = module.conv
    kernel = conv.kernel_size[0]
    padded = functional.pad(torch.cat([conv_cache.to(states), states]).T, (0, kernel - 1 - kernel // 2))
    weight, bias = conv.weight.to(states.dtype), conv.bias.to(states.dtype)
    positions = module.activation(functional.conv1d(padded[None], weight, bias, groups=conv.groups))
    return positions[0].T, states
