"""Run a CTC net on a CPU through a plan: the same output from fewer and faster matrix products. The net is not changed.

- Convolutions of the front end become products with an overlapping view of the frames, [T, kernel · C]; a chunk of the
  recording passes through all of them while it is in the cache.
- q, k and v are one product; weights are prepacked (`kernels.prepacked_linear`); GELU and residual sums are fused.
- Recordings of a batch are concatenated in the linears and separate in everything that looks along time. None is padded
  to another's length, so no mask is needed, and front ends that normalize over time may share a batch too.

`float32` differs from the net by rounding only. `bfloat16` computes as the net in bfloat16 does, except for the first
convolution. `int8` computes the blocks' linears in int8, front end and attention in bfloat16; hidden states, norms,
feature projection and head stay float32.

For a quantized net, `int8` uses per-row int8 weights as they are, with static input ranges where there are any, and
computes other linears in bfloat16. In the other compute dtypes weights are dequantized once and inputs not quantized.

A plan attaches nothing to the net. Nets that share tensors (adapters over one base) can share packed weights, see
`share_weights_with`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mowa.kernels.attention.encoder import encoder_attention
from mowa.kernels.prepacked_linear import ComputeDtype, PrepackedLinear, is_supported
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.models.ctc_encoder import anatomy
from mowa.models.ctc_encoder.anatomy import BlockParts, PositionLayer, read_anatomy

FRONT_END_CHUNK_FRAMES = 64  # frames of the front end computed at a time
FRAME_MULTIPLE = 16  # recordings are padded to a multiple of this many frames: oneDNN prepares anew for every shape
PackedWeights = dict[tuple[object, ...], "PrepackedLinear | _Bfloat16Linear"]


def unsupported_reason(net: Any, compute_dtype: ComputeDtype) -> str:
    """Return why there is no plan for `net` in this compute dtype, or an empty string where there is.

    A net on the meta device gets the answer for the CPU.
    """
    config = net.config
    if any(weight.device.type not in ("cpu", "meta") for weight in net.parameters()):
        return "the CPU plan needs a net on the CPU"
    if reason := anatomy.unsupported_reason(net, "cpu_plan"):
        return reason
    if getattr(config, "conv_pos_batch_norm", False):
        return "its positional convolution has batch norm"
    if {config.hidden_act, config.feat_extract_activation} != {"gelu"}:
        return "its activation is not GELU"
    if variants := [name for name, module in net.named_modules() if _is_lora_variant(module)]:
        return f"{variants[0]} has an update other than plain LoRA"
    supported = is_supported(compute_dtype) and is_supported("float32")
    return "" if supported else f"torch on this CPU has no prepacked products in {compute_dtype}"


def _is_lora_variant(module: Any) -> bool:
    """Whether a linear has an update that is not a plain product of two matrices (DoRA and the like)."""
    return bool(getattr(module, "lora_variant", None)) or bool(getattr(module, "use_dora", {}).get("default", False))


class CpuPlan:
    """A net prepared for inference on a CPU.

    Called in inference mode with normalized recordings, float32 [n_i] each → logits float32 [T_i, V] each.

    Args:
        net: a transformers CTC net for which `unsupported_reason` is empty; not changed.
        compute_dtype: float32, bfloat16 or int8.
        share_weights_with: the plan of a net that shares weights with this one.
    """

    def __init__(self, net: Any, compute_dtype: ComputeDtype, share_weights_with: CpuPlan | None = None) -> None:
        self.anatomy, self.compute_dtype = read_anatomy(net), compute_dtype
        other = share_weights_with
        share = other is not None and other.compute_dtype == compute_dtype
        self._packs: PackedWeights = other._packs if other is not None and share else {}
        # dtypes of the hidden states between blocks, and of front end, positions and attention
        self._states = torch.bfloat16 if compute_dtype == "bfloat16" else torch.float32
        self._half = torch.float32 if compute_dtype == "float32" else torch.bfloat16
        self._quantized = any(isinstance(module, QuantizedLinear) for module in net.modules())
        self._front = self._build_front_end()
        projection = self.anatomy.projection.projection
        is_quantized = isinstance(projection, QuantizedLinear)  # which would dequantize its weights in every call
        self._projection = self._packed([projection], compute_dtype="float32") if is_quantized else None
        self._position_layers = [self._build_position_layer(layer) for layer in self.anatomy.position_layers]
        self.blocks = [_Block(self, parts) for parts in self.anatomy.block_parts()]

    def __call__(self, clips: Sequence[Tensor]) -> list[Tensor]:
        return self.logits_from_features([self.front_end(clip) for clip in clips])

    def front_end(self, samples: Tensor) -> Tensor:
        """Return the front end's frames [T, C] of normalized samples, float32 [n]."""
        like = next(self.anatomy.projection.parameters(), None)
        return self._front(samples).to(self._states if like is None else like.dtype)

    def logits_from_features(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return logits, float32 [T_i, V], of each recording's frames [T_i, C]."""
        counts, features = [len(one) for one in features], [_pad_to_frame_multiple(one) for one in features]
        bounds = list(zip(pairwise([0, *accumulate(map(len, features))]), counts, strict=True))
        states = self.project(torch.cat(features))
        positions = [_pad_to_frame_multiple(self._positions(states[a : a + count])) for (a, _), count in bounds]
        states = self.anatomy.before_blocks(states + torch.cat(positions))
        for block in self.blocks:
            q, k, v = block.qkv(states)
            attended = [encoder_attention(q[a:b], k[a:b], v[a:b], block.scaling, count) for (a, b), count in bounds]
            states = block.after_attention(states, attended[0] if len(attended) == 1 else torch.cat(attended))
        return [self.head(states[a : a + count]) for (a, _), count in bounds]

    def project(self, features: Tensor) -> Tensor:
        """Return hidden states [T, D] of frames [T, C], without positions."""
        if self._projection is not None:
            module = self.anatomy.projection
            normed = module.layer_norm(features) if getattr(module, "feat_proj_layer_norm", True) else features
            return self._projection(normed.float()).to(self._states)
        return self.anatomy.project(features[None])[0].to(self._states)

    def head(self, states: Tensor) -> Tensor:
        """Return logits, float32 [T', V], of the last block's states [T, D]."""
        logits: Tensor = self.anatomy.head(self.anatomy.after_blocks(states[None])[0]).float()
        return logits

    def linear_kind(self, layer: Any) -> tuple[ComputeDtype, tuple[float, int] | None]:
        """Return the compute dtype of a linear in a block, and its static input scale and zero point, if any."""
        if self.compute_dtype != "int8" or not self._quantized:
            return self.compute_dtype, None
        if isinstance(layer, QuantizedLinear) and layer.bits == 8 and layer.group_size >= layer.in_features:
            return "int8", layer.input_qparams
        return "bfloat16", None

    def _packed(
        self, layers: Sequence[Any], out_dtype: torch.dtype | None = None, compute_dtype: ComputeDtype | None = None
    ) -> PrepackedLinear | _Bfloat16Linear:
        """Return linears with one input as one packed product, from the cache if another net has packed them."""
        key = (*(_weight_tensor(layer).data_ptr() for layer in layers), out_dtype, compute_dtype)
        if key in self._packs:
            return self._packs[key]
        chosen, input_qparams = self.linear_kind(layers[0])
        chosen = compute_dtype or chosen
        bias = torch.cat([_bias(layer) for layer in layers])
        if chosen == "int8" and isinstance(layers[0], QuantizedLinear):
            qweight, scale = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("qweight", "scale"))
            self._packs[key] = PrepackedLinear.from_qweight(qweight, scale[:, 0], bias, out_dtype, input_qparams)
        else:
            packed = PrepackedLinear(torch.cat([layer.weight.detach() for layer in layers]), bias, chosen, out_dtype)
            cast = chosen == "bfloat16" and self.compute_dtype == "int8"
            self._packs[key] = _Bfloat16Linear(packed, out_dtype or torch.float32) if cast else packed
        return self._packs[key]

    def _build_front_end(self) -> Callable[[Tensor], Tensor]:
        convolutions = self.anatomy.front_end.conv_layers
        layers = [self._build_convolution(layer, first=index == 0) for index, layer in enumerate(convolutions)]
        geometry = self.anatomy.geometry

        def whole(samples: Tensor) -> Tensor:
            frames = samples.float()[:, None]
            for layer in layers:
                frames = layer(frames)
            return frames

        def in_chunks(samples: Tensor) -> Tensor:
            total = geometry.num_features(len(samples))
            padded = -(-total // FRAME_MULTIPLE) * FRAME_MULTIPLE
            starts = range(0, total, FRONT_END_CHUNK_FRAMES)
            ends = [geometry.num_feature_samples(min(start + FRONT_END_CHUNK_FRAMES, padded)) for start in starts]
            samples = functional.pad(samples, (0, max(0, ends[-1] - len(samples))))
            chunks = [
                whole(samples[start * geometry.feature_hop : end]) for start, end in zip(starts, ends, strict=True)
            ]
            return torch.cat(chunks)[:total]

        return whole if self.anatomy.normalizes_over_time else in_chunks

    def _build_convolution(self, layer: Any, *, first: bool) -> Callable[[Tensor], Tensor]:
        """Return a function of frames [T, C] → [T', C'], norm and GELU included. The first one stays in float32."""
        conv, norm = layer.conv, getattr(layer, "layer_norm", None)
        kernel, stride, half = conv.kernel_size[0], conv.stride[0], self._half
        key = (conv.weight.data_ptr(), "front")
        if key not in self._packs:
            flat = conv.weight.detach().permute(0, 2, 1).flatten(1)  # [C', kernel · C]
            bias = None if conv.bias is None else conv.bias.detach()
            bfloat16 = half is torch.bfloat16 and not first
            self._packs[key] = PrepackedLinear(flat, bias, "bfloat16" if bfloat16 else "float32")
        product = self._packs[key]
        affine: list[Tensor] = []
        if norm is not None:
            affine = [p.detach().to(torch.float32 if first else half) for p in (norm.weight, norm.bias)]

        def apply(frames: Tensor) -> Tensor:
            count, width = (len(frames) - kernel) // stride + 1, frames.shape[1]
            rows = frames.as_strided((count, kernel * width), (stride * width, 1))
            if norm is None:
                return product(rows, gelu=True)
            out = product(rows)
            if isinstance(norm, nn.GroupNorm):
                variance, mean = torch.var_mean(out, 0, correction=0)
                scale = torch.rsqrt(variance + norm.eps) * affine[0]
                out = functional.gelu(torch.addcmul(affine[1] - mean * scale, out, scale))
            else:
                out = functional.gelu(functional.layer_norm(out, (out.shape[1],), affine[0], affine[1], norm.eps))
            return out.to(half) if first else out

        return apply

    def _positions(self, states: Tensor) -> Tensor:
        """Return the positions [T, D] of one recording's states [T, D]."""
        if (table := self.anatomy.absolute_positions) is not None:
            return table.at(torch.arange(len(states)), states)
        for layer in self._position_layers:
            states = layer(states)
        return states

    def _build_position_layer(self, layer: PositionLayer) -> Callable[[Tensor], Tensor]:
        """Return a function of states [T, D] → [T, D]."""
        conv, norm, half = layer.conv, layer.norm, self._half
        kernel, groups = conv.kernel_size[0], conv.groups
        weight = conv.weight.detach().to(half)[:, :, None].to(memory_format=torch.channels_last)
        bias = conv.bias.detach().to(half)

        def convolve(states: Tensor) -> Tensor:
            row = _pad_to_frame_multiple(states.to(half))[None, None].permute(0, 3, 1, 2)  # [1, C, 1, T], channels last
            out = functional.conv2d(row, weight, bias, padding=(0, kernel // 2), groups=groups)
            out = out.permute(0, 2, 3, 1)[0, 0, : len(states)]
            return functional.gelu(out if norm is None else norm(out)).to(states.dtype)

        return convolve


class _Block:
    """One block, in two parts around its attention."""

    def __init__(self, plan: CpuPlan, parts: BlockParts) -> None:
        self._parts, self._states, self.scaling = parts, plan._states, parts.scaling
        self._qkv = _Linears(plan, (parts.q, parts.k, parts.v), plan._half)
        self._out, self._up, self._down = (_Linears(plan, (one,)) for one in (parts.out, parts.up, parts.down))

    def qkv(self, states: Tensor) -> tuple[Tensor, ...]:
        """Return q, k and v, [T, H, d] each, of states [T, D]; q is not scaled."""
        projected = self._qkv(self._parts.attention_input(states))
        return projected.unflatten(-1, (3, self._parts.num_heads, -1)).unbind(1)

    def after_attention(self, states: Tensor, attended: Tensor) -> Tensor:
        """Return the states after the block, given those before it [T, D] and the attention's output [T, H, d]."""
        return self._parts.after_attention(
            states,
            attended.flatten(1).to(self._states),
            add_output=self._out.linear_add,
            add_feed_forward=lambda x, residual: self._down.linear_add(self._up(x, gelu=True), residual),
        )


class _Bfloat16Linear:
    """A bfloat16 product in an int8 plan: inputs are cast to it, outputs to `out_dtype`."""

    def __init__(self, product: PrepackedLinear, out_dtype: torch.dtype) -> None:
        self._product, self._out_dtype = product, out_dtype

    def __call__(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        return self._product(x.bfloat16(), gelu=gelu).to(self._out_dtype)

    def linear_add(self, x: Tensor, residual: Tensor) -> Tensor:
        return self(x) + residual


class _Linears:
    """Linears with one input, as one product where they have one compute dtype, plus their LoRA updates."""

    def __init__(self, plan: CpuPlan, modules: Sequence[Any], out_dtype: torch.dtype | None = None) -> None:
        layers = [getattr(module, "base_layer", module) for module in modules]
        alike = len({plan.linear_kind(layer) for layer in layers}) == 1
        groups = [layers] if alike else [[layer] for layer in layers]
        self.products = [plan._packed(group, out_dtype) for group in groups]
        bounds = pairwise([0, *accumulate(layer.out_features for layer in layers)])
        self.updated = [
            (slice(*bound), module)
            for bound, module in zip(bounds, modules, strict=True)
            if hasattr(module, "base_layer") and not module.merged and not module.disable_adapters
        ]

    def __call__(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        if not self.updated:
            return self._multiply(x, gelu=gelu)
        out = self._add_updates(x, self._multiply(x))
        return functional.gelu(out) if gelu else out

    def linear_add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return the output of the only linear plus `residual`."""
        (product,) = self.products
        return self._add_updates(x, product.linear_add(x, residual))

    def _multiply(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        outs = [product(x, gelu=gelu) for product in self.products]
        return outs[0] if len(outs) == 1 else torch.cat(outs, -1)

    def _add_updates(self, x: Tensor, out: Tensor) -> Tensor:
        for columns, module in self.updated:
            for name in module.active_adapters:
                out[:, columns] += module.lora_B[name](module.lora_A[name](x)) * module.scaling[name]
        return out


def _pad_to_frame_multiple(rows: Tensor) -> Tensor:
    """Pad [T, …] with zeros to a multiple of `FRAME_MULTIPLE` frames."""
    padding = -len(rows) % FRAME_MULTIPLE
    return torch.cat([rows, rows.new_zeros(padding, *rows.shape[1:])]) if padding else rows


def _weight_tensor(layer: Any) -> Tensor:
    """The tensor that identifies a linear; `weight` of a quantized one is a new tensor at every access."""
    tensor: Tensor = layer.qweight if isinstance(layer, QuantizedLinear) else layer.weight
    return tensor


def _bias(layer: Any) -> Tensor:
    bias: Tensor = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
    return bias
