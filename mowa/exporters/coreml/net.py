"""A CTC net in modules that Core ML can have: nothing but the number of frames changes in it, and that up to an end.

What depends on the number of frames is made once, for the longest recording, and a part of it is taken: computed as it
goes it would pass through float16, which has no whole numbers beyond 2048. Tensors are those of the net, where they can
be. How a program is written is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mowa.exporters.prepare import dequantize_linear
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.models.ctc_encoder.chunk_mask import receptive_field
from mowa.models.ctc_encoder.positions import absolute_position_table

MASK_VALUE = -3e4  # added to the scores of what is not there; float16 ends at 65504


class LengthTable(nn.Module):
    """Of what is made for all frames of the longest recording, [T, ...], that for the frames of `states` [1, t, C].

    With a single length that is all of it; coremltools cannot cut at a number that it knows already.
    """

    values: Tensor

    def __init__(self, values: Tensor, fixed_length: bool) -> None:
        super().__init__()
        self.register_buffer("whole", values)
        self.fixed_length = fixed_length

    def forward(self, states: Tensor) -> Tensor:
        return self.values if self.fixed_length else self.values[: states.shape[1]]


class CoreMLNet(nn.Module):
    """A fitted net as a function of tensors, its parts called one by one. Frame t is there where its samples are:
    t · hop + reach ≤ n."""

    def __init__(self, net: Any, count: Tensor, fixed_length: bool) -> None:
        super().__init__()
        self.net = net
        self.frame_ends = LengthTable(
            count * math.prod(net.config.conv_stride) + receptive_field(net.config), fixed_length
        )

    def forward(self, input_values: Tensor, samples: Tensor | None = None) -> Tensor:
        base, stable, mask = self.net.base_model, self.net.config.do_stable_layer_norm, None
        states = _first(base.feature_projection(base.feature_extractor(input_values).transpose(1, 2)))
        if samples is not None:
            there = (self.frame_ends(states) <= samples).to(states.dtype)
            states = states * there[None, :, None]
            mask = (1 - there)[None, None, None] * MASK_VALUE
        states = states + base.encoder.pos_conv_embed(states)
        states = states if stable else base.encoder.layer_norm(states)
        more: dict[str, Any] = {}
        for layer in base.encoder.layers:
            made = layer(states, attention_mask=mask, **more)
            states = _first(made)
            more = {"position_bias": made[1]} if isinstance(made, tuple) and len(made) > 1 else {}
        states = base.encoder.layer_norm(states) if stable else states
        logits: Tensor = self.net.lm_head(states)
        return logits


def _first(made: Any) -> Any:
    return made[0] if isinstance(made, tuple) else made


class Float32Module(nn.Module):
    """What is computed in float32, whatever the program is computed in: it is known by the name of this type."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.inner(x)
        return made


class InstanceNormOverTime(nn.Module):
    """A norm of each channel over time, made of means: coremltools' norm of groups was another over [B, C, T]
    (github.com/apple/coremltools, issue 1607)."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        apart = x - x.mean(-1, keepdim=True)
        scaled = apart * torch.rsqrt(apart.square().mean(-1, keepdim=True) + self.eps)
        return scaled * self.weight[:, None] + self.bias[:, None]


class WavLMGatedAttention(nn.Module):
    """WavLM's attention: softmax(q kᵀ / √d + gate ⊙ bias + mask) v. Biases are looked up by the distance of frames, of
    which there are so many; stock ones are made of logarithms as it goes."""

    position_bias_table: Tensor

    def __init__(self, attention: Any, count: Tensor, fixed_length: bool) -> None:
        super().__init__()
        self.attention, self.count, self.max_distance = attention, LengthTable(count, fixed_length), len(count) - 1
        if hasattr(attention, "rel_attn_embed"):
            buckets = attention._relative_positions_bucket(torch.arange(-self.max_distance, self.max_distance + 1))
            self.register_buffer("biases", attention.rel_attn_embed(buckets).detach())

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, position_bias: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None, Tensor]:
        stock = self.attention
        if position_bias is None:
            count = self.count(hidden_states)
            apart = count[None] - count[:, None] + self.max_distance
            position_bias = functional.embedding(apart, self.position_bias_table).permute(2, 0, 1)[None]
        gates = stock.gru_rel_pos_linear(self._heads(hidden_states)).unflatten(3, (2, 4)).sum(-1).sigmoid()
        gate = gates[..., :1] * (gates[..., 1:] * stock.gru_rel_pos_const - 1) + 2
        q, k, v = (self._heads(project(hidden_states)) for project in (stock.q_proj, stock.k_proj, stock.v_proj))
        scores = q * stock.scaling @ k.transpose(2, 3) + gate * position_bias
        scores = scores if attention_mask is None else scores + attention_mask
        made = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return stock.out_proj(made), None, position_bias

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(2, (self.attention.num_heads, self.attention.head_dim)).transpose(1, 2)


class StaticQuantLinear(nn.Module):
    """A linear and its inputs in eight bits, by a range that was seen before."""

    def __init__(self, linear: nn.Linear, input_scale: float, input_zero_point: int) -> None:
        super().__init__()
        self.linear, self.input_scale, self.input_zero_point = linear, input_scale, input_zero_point

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.linear(
            torch.quantize_per_tensor(x, self.input_scale, self.input_zero_point, torch.quint8).dequantize()
        )
        return made


def prepare_for_coreml(
    net: Any, lengths: Sequence[int], *, per_group_scales: bool, float32_norms: Collection[str] = ()
) -> CoreMLNet:
    """`net`, which is changed, for recordings of these lengths, in samples. `grouped`: whether groups of a row may have
    steps of their own; `loud`: the norms that are computed in float32."""
    single = len(lengths) == 1
    count = torch.arange(
        (lengths[-1] - receptive_field(net.config)) // math.prod(net.config.conv_stride) + 1, dtype=torch.int32
    )
    if (rows := absolute_position_table(net)) is not None:
        net.base_model.encoder.pos_conv_embed = LengthTable(rows[count.clamp(max=len(rows) - 1)], single)
    for name, module in list(net.named_modules()):
        if isinstance(module, QuantizedLinear):
            net.set_submodule(name, _kept(module, per_group_scales))
        elif isinstance(module, nn.GroupNorm):
            net.set_submodule(name, Float32Module(InstanceNormOverTime(module)))
        elif name in float32_norms:
            net.set_submodule(name, Float32Module(module))
        elif type(module).__name__ == "WavLMAttention":
            net.set_submodule(name, WavLMGatedAttention(module, count, single))
    return CoreMLNet(net, count, single).eval()


def _kept(narrow: QuantizedLinear, grouped: bool) -> nn.Module:
    """A linear that says in which codes its weights are kept, in buffers that coremltools looks for; it says nothing
    where there may be no such groups, and weights are then kept in half precision."""
    linear = dequantize_linear(narrow)
    if narrow.group_size >= narrow.in_features or (grouped and narrow.in_features % narrow.group_size == 0):
        quantisation = 3  # in coremltools' own numbers
        linear.register_buffer("_COREML_/weight/compression_type", torch.tensor([quantisation]))
        linear.register_buffer("_COREML_/weight/quantization_n_bits", torch.tensor(narrow.bits))
        linear.register_buffer("_COREML_/weight/quantization_scale", narrow.scale)
        if narrow.zero_point is not None:
            linear.register_buffer("_COREML_/weight/zero_point", narrow.zero_point)
    return linear if narrow.input_qparams is None else StaticQuantLinear(linear, *narrow.input_qparams)
