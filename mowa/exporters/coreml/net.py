"""Rewrite a CTC net for Core ML, so that nothing but the number of frames varies, up to a maximum.

Values that depend on the number of frames are computed once, for the longest input, and sliced: computed in the program
they would pass through float16, which cannot represent all integers beyond 2048. Tensors are shared with the net where
possible.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mowa.exporters.prepare import dequantize_linear
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.models.ctc_encoder.anatomy import read_anatomy
from mowa.models.ctc_encoder.geometry import frame_geometry
from mowa.models.ctc_encoder.positions import replace_position_module

MASK_VALUE = -3e4  # added to attention scores of padding; the largest float16 is 65504


class LengthTable(nn.Module):
    """A table for the frames of the longest input, [T, ...], called with states [1, t, C] → its first t rows.

    With a single length it returns the whole table, because coremltools cannot slice at a constant.
    """

    values: Tensor

    def __init__(self, values: Tensor, fixed_length: bool) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.fixed_length = fixed_length

    def forward(self, states: Tensor) -> Tensor:
        return self.values if self.fixed_length else self.values[: states.shape[1]]


class CoreMLNet(nn.Module):
    """A net as a function (input_values [1, N], samples [1]) → logits [1, T, V], with its modules called one by one.

    Frame t is valid if t · hop + receptive_field ≤ samples.
    """

    def __init__(self, net: Any, frames: Tensor, fixed_length: bool) -> None:
        super().__init__()
        self.net, geometry = net, frame_geometry(net.config)
        self.frame_ends = LengthTable(geometry.num_samples(frames + 1), fixed_length)

    def forward(self, input_values: Tensor, samples: Tensor | None = None) -> Tensor:
        anatomy = read_anatomy(self.net)
        states, valid = anatomy.project(anatomy.features(input_values)), None
        if samples is not None:
            valid = (self.frame_ends(states) <= samples).to(states.dtype)[None]
        return anatomy.masked_logits(states, valid, MASK_VALUE)


class Float32Module(nn.Module):
    """A module that is computed in float32 in a float16 program; the exporter finds it by the name of this class."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(x)
        return output


class InstanceNormOverTime(nn.Module):
    """Normalize each channel of [B, C, T] over time. coremltools converts a group norm of this shape incorrectly
    (github.com/apple/coremltools, issue 1607)."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        scaled = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + self.eps)
        return scaled * self.weight[:, None] + self.bias[:, None]


class WavLMGatedAttention(nn.Module):
    """WavLM's attention, softmax(q kᵀ / √d + gate ⊙ bias + mask) v, with biases from a table by frame distance.

    transformers computes the bucket of each distance in the forward pass.
    """

    position_bias_table: Tensor

    def __init__(self, attention: Any, frames: Tensor, fixed_length: bool) -> None:
        super().__init__()
        self.attention, self.frames, self.max_distance = attention, LengthTable(frames, fixed_length), len(frames) - 1
        if hasattr(attention, "rel_attn_embed"):
            buckets = attention._relative_positions_bucket(torch.arange(-self.max_distance, self.max_distance + 1))
            self.register_buffer("position_bias_table", attention.rel_attn_embed(buckets).detach())

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, position_bias: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None, Tensor]:
        attention = self.attention
        if position_bias is None:
            frames = self.frames(hidden_states)
            distances = frames[None] - frames[:, None] + self.max_distance
            position_bias = functional.embedding(distances, self.position_bias_table).permute(2, 0, 1)[None]
        gates = attention.gru_rel_pos_linear(self._split_heads(hidden_states)).unflatten(3, (2, 4)).sum(-1).sigmoid()
        gate = gates[..., :1] * (gates[..., 1:] * attention.gru_rel_pos_const - 1) + 2
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (self._split_heads(project(hidden_states)) for project in projections)
        scores = q * attention.scaling @ k.transpose(2, 3) + gate * position_bias
        scores = scores if attention_mask is None else scores + attention_mask
        context = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return attention.out_proj(context), None, position_bias

    def _split_heads(self, states: Tensor) -> Tensor:
        return states.unflatten(2, (self.attention.num_heads, self.attention.head_dim)).transpose(1, 2)


class StaticQuantLinear(nn.Module):
    """A linear layer whose inputs are quantized to uint8 with a calibrated range."""

    def __init__(self, linear: nn.Linear, input_scale: float, input_zero_point: int) -> None:
        super().__init__()
        self.linear, self.input_scale, self.input_zero_point = linear, input_scale, input_zero_point

    def forward(self, x: Tensor) -> Tensor:
        quantized = torch.quantize_per_tensor(x, self.input_scale, self.input_zero_point, torch.quint8)
        output: Tensor = self.linear(quantized.dequantize())
        return output


def prepare_for_coreml(
    net: Any, lengths: Sequence[int], *, per_group_scales: bool, float32_norms: Collection[str] = ()
) -> CoreMLNet:
    """Rewrite `net`, in place, for inputs of these lengths in samples.

    `per_group_scales`: whether the deployment target supports several scales per row. `float32_norms`: names of the
    norms that are computed in float32.
    """
    fixed_length = len(lengths) == 1
    frames = torch.arange(frame_geometry(net.config).num_frames(lengths[-1]), dtype=torch.int32)
    if (positions := read_anatomy(net).absolute_positions) is not None:
        replace_position_module(net, LengthTable(positions.at(frames, positions.table), fixed_length))
    for name, module in list(net.named_modules()):
        if isinstance(module, QuantizedLinear):
            net.set_submodule(name, _convert_linear(module, per_group_scales))
        elif isinstance(module, nn.GroupNorm):
            net.set_submodule(name, Float32Module(InstanceNormOverTime(module)))
        elif name in float32_norms:
            net.set_submodule(name, Float32Module(module))
        elif type(module).__name__ == "WavLMAttention":
            net.set_submodule(name, WavLMGatedAttention(module, frames, fixed_length))
    return CoreMLNet(net, frames, fixed_length).eval()


def _convert_linear(quantized: QuantizedLinear, per_group_scales: bool) -> nn.Module:
    """Return a linear layer with the buffers from which coremltools stores quantized weights.

    Without support for its groups there are no such buffers, and the weights are stored in half precision.
    """
    linear = dequantize_linear(quantized)
    is_per_row = quantized.group_size >= quantized.in_features
    if is_per_row or (per_group_scales and quantized.in_features % quantized.group_size == 0):
        quantization = 3  # coremltools' number for it
        linear.register_buffer("_COREML_/weight/compression_type", torch.tensor([quantization]))
        linear.register_buffer("_COREML_/weight/quantization_n_bits", torch.tensor(quantized.bits))
        linear.register_buffer("_COREML_/weight/quantization_scale", quantized.scale)
        if quantized.zero_point is not None:
            linear.register_buffer("_COREML_/weight/zero_point", quantized.zero_point)
    return linear if quantized.input_qparams is None else StaticQuantLinear(linear, *quantized.input_qparams)
