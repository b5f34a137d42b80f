"""A CTC net one chunk at a time: every sample goes through it once, and what was before is in its keys and values.

What `hear` says of chunk after chunk is what the net says of all of them under `chunks.chunked`. It knows tensors and
where they lie; it refuses to know streams, words and engines. A net is computed by its `Plan`, or by its own modules
(`Stock`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from mowa.models.ctc_encoder.cpu_plan import CpuPlan
from mowa.models.ctc_encoder.positions import absolute_position_table


class EncoderBlock(Protocol):
    scaling: float

    def qkv(self, states: Tensor) -> tuple[Tensor, ...]: ...

    def after_attention(self, states: Tensor, attended: Tensor) -> Tensor: ...


class EagerPlan:
    """A net's own modules under the names of `Plan`'s parts, on whatever device they are."""

    def __init__(self, net: Any) -> None:
        self.net = net
        self.blocks = [_EagerBlock(net, layer) for layer in net.base_model.encoder.layers]
        self._like = next(net.parameters())

    def front_end(self, samples: Tensor) -> Tensor:
        made: Tensor = self.net.base_model.feature_extractor(samples.to(self._like)[None])[0].transpose(0, 1)
        return made

    def logits_from_features(self, features: list[Tensor]) -> list[Tensor]:
        out = []
        for part in features:
            states = self.net.base_model.encoder(self.project(part)[None]).last_hidden_state
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
        made = (linear(states) for linear in (attention.q_proj, attention.k_proj, attention.v_proj))
        return tuple(one.unflatten(-1, (attention.num_heads, -1)) for one in made)

    def after_attention(self, states: Tensor, attended: Tensor) -> Tensor:
        layer = self._layer
        states = states + layer.attention.out_proj(attended.flatten(1))
        if not self._stable:
            states = layer.layer_norm(states)
            out: Tensor = layer.final_layer_norm(states + layer.feed_forward(states))
            return out
        states = states + layer.feed_forward(layer.final_layer_norm(states))
        extra = getattr(layer, "adapter_layer", None)
        return states if extra is None else states + extra(states)


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What a net remembers of a stream, in numbers: `layers` of `heads` keys and values `width` wide for every frame,
    and `low` frames below the blocks, `wide` each (0 where positions are absolute)."""

    num_layers: int
    num_heads: int
    head_dim: int
    conv_frames: int
    hidden_size: int


def cache_shape(net: Any) -> CacheShape:
    config, heads = net.config, net.config.num_attention_heads
    low, wide = config.num_conv_pos_embeddings // 2, config.hidden_size
    low, wide = (0, 0) if absolute_position_table(net) is not None else (low, wide)
    return CacheShape(config.num_hidden_layers, heads, config.hidden_size // heads, low, wide)


def encode_chunk(
    plan: CpuPlan | EagerPlan, samples: Tensor, position: int | Tensor, kv_cache: Tensor, conv_cache: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One chunk, and what is heard ahead of it: `sound` float32 [n], of which c frames are made, `position` before it.

    cache [layers, 2, S, H, d]: keys and values of the S frames before the chunk that it sees; low [P, D]: the states
    below the blocks of the P frames before it, zeros where there were none (`Shape`).
    → logits float32 [c, V]; and [layers, 2, c, H, d] and [c, D], which of frames that stay are to be put behind the
    cache and behind `low`.
    """
    states = plan.project(plan.front_end(samples))
    along, below = _streaming_positions(plan.net, states, position, conv_cache)
    states = plan.input_norm(states + along)
    made = []
    blocks: Sequence[EncoderBlock] = plan.blocks
    for depth, block in enumerate(blocks):
        q, k, v = block.qkv(states)
        made.append(torch.stack([k, v]))
        keys, values = (torch.cat([old, new]) for old, new in zip(kv_cache[depth].to(k.dtype), (k, v), strict=True))
        q, keys, values = (one.transpose(0, 1) for one in (q, keys, values))
        heard = torch.softmax((q * block.scaling) @ keys.transpose(1, 2), -1) @ values
        states = block.after_attention(states, heard.transpose(0, 1))
    return plan.head(states), torch.stack(made), below


def _streaming_positions(net: Any, states: Tensor, position: int | Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """What the positional convolution adds to a chunk, and the states that it will have to see again."""
    absolute = absolute_position_table(net)
    if absolute is not None:
        rows = (torch.arange(states.shape[0], device=states.device) + position).clamp(max=len(absolute) - 1)
        return absolute.to(states)[rows], states[:, :0]
    module = net.base_model.encoder.pos_conv_embed
    conv = module.conv
    kernel = conv.kernel_size[0]
    row = functional.pad(torch.cat([low.to(states), states]).T, (0, kernel - 1 - kernel // 2))
    weight, bias = conv.weight.to(states.dtype), conv.bias.to(states.dtype)
    made = module.activation(functional.conv1d(row[None], weight, bias, groups=conv.groups))
    return made[0].T, states
