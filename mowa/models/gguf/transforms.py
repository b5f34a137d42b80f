"""Changes of tensor layout between transformers and GGUF, each with its inverse.

Shapes are those of transformers: weights are [out, in], experts are stacked to [E, out, in].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mowa.models.gguf.architecture import Transform


def _keep(tensor: Tensor, _: Any) -> tuple[Tensor, ...]:
    return (tensor,)


def _take(tensors: Sequence[Tensor], _: Any) -> Tensor:
    return tensors[0]


KEEP = Transform(_keep, _take)


def interleave_rotary(tensor: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of each head, [heads · D, …], from (0 … D/2 - 1, D/2 … D - 1) to (0, D/2, 1, D/2 + 1, …).

    transformers rotates pairs of rows that are half a head apart, llama.cpp's "normal" RoPE pairs of neighbours.
    """
    return tensor.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def halve_rotary(tensor: Tensor, num_heads: int) -> Tensor:
    """Undo `interleave_rotary`."""
    return tensor.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)


INTERLEAVE_QUERY = Transform(
    lambda tensor, config: (interleave_rotary(tensor, config.num_attention_heads),),
    lambda tensors, config: halve_rotary(tensors[0], config.num_attention_heads),
)
INTERLEAVE_KEY = Transform(
    lambda tensor, config: (interleave_rotary(tensor, config.num_key_value_heads),),
    lambda tensors, config: halve_rotary(tensors[0], config.num_key_value_heads),
)

# Gemma scales by 1 + weight, llama.cpp by weight. In float32 the sum is exact for bfloat16 weights down to 2^-16.
ADD_ONE = Transform(lambda tensor, _: (tensor.float() + 1,), lambda tensors, _: tensors[0].float() - 1)

# [1, H] in transformers, [H] in GGUF
DROP_FIRST = Transform(lambda tensor, _: (tensor.squeeze(0),), lambda tensors, _: tensors[0].reshape(1, -1))

# gate and up projections in one tensor, [E, 2F, H]
SPLIT_GATE_UP = Transform(
    lambda tensor, _: tuple(tensor.chunk(2, dim=-2)), lambda tensors, _: torch.cat(tuple(tensors), dim=-2)
)

# gpt-oss: [E, H, 2F] and [E, 2F], gate and up in turns; [E, F, H]
TRANSPOSE = Transform(lambda tensor, _: (tensor.mT,), lambda tensors, _: tensors[0].mT.contiguous())
SPLIT_GATE_UP_IN_TURNS = Transform(
    lambda tensor, _: (tensor[..., ::2].mT, tensor[..., 1::2].mT),
    lambda tensors, _: torch.stack([tensor.mT for tensor in tensors], dim=-1).flatten(-2),
)
SPLIT_BIAS_IN_TURNS = Transform(
    lambda tensor, _: (tensor[..., ::2], tensor[..., 1::2]),
    lambda tensors, _: torch.stack(tuple(tensors), dim=-1).flatten(-2),
)


def _split_latent(tensor: Tensor, config: Any) -> tuple[Tensor, ...]:
    """Split kv_b, [heads · (K + V), L], into what the latent is multiplied by: [heads, L, K] and [heads, V, L]."""
    heads = tensor.unflatten(0, (config.num_attention_heads, -1))
    keys, values = heads.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
    return keys.mT, values


def _join_latent(tensors: Sequence[Tensor], _: Any) -> Tensor:
    keys, values = tensors
    return torch.cat([keys.mT, values], dim=1).flatten(0, 1)


SPLIT_LATENT = Transform(_split_latent, _join_latent)
