"""A CTC net on a processor as a plan: what the net says, by fewer and better matrix products. The net stays untouched.

- Convolutions of the front end are products of weights with a view of the frames, [T, channels], in which windows
  overlap; a piece of the recording goes through all of them while it is in the cache.
- q, k and v are one product; weights are packed (`kernels.packed_linear`); GELU and sums are made with the product.
- Recordings that share a batch are end to end in the linears and apart in all that looks along time. None is padded to
  another's length, so none needs the net's mask, and front ends that normalise over time may share a batch too.

`float32` differs from the net by rounding alone. `bfloat16` computes as the net in bfloat16 would, but for the first
convolution. `int8` multiplies the blocks' linears in integers and the front end and attention in bfloat16; the states
between blocks, norms, projection and head stay float32.

Of a shrunk net, `int8` multiplies linears in int8 by row as they are, by the range of inputs that was seen before where
there is one, and other linears in bfloat16. In the other kinds of arithmetic all weights are made wide once, and inputs
are not rounded.

A plan never writes to the net or hangs anything on it: nets that share tensors (adapters over one base,
`adapt.store.twin`) share packed weights too (`like`).
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

FRONT_END_CHUNK_FRAMES = 64  # frames of the front end made at a time
FRAME_MULTIPLE = 16  # every recording gets a multiple of so many frames: oneDNN prepares anew for every new shape
SUPPORTED_CLASSES = ("Wav2Vec2ForCTC", "HubertForCTC")
PackedWeights = dict[tuple[object, ...], "PrepackedLinear | _Cast"]


def unsupported_reason(net: Any, kind: ComputeDtype) -> str:
    """Why `net` cannot be planned in this kind of arithmetic; empty where it can."""
    config, name = net.config, type(net).__name__
    if any(weight.device.type != "cpu" for weight in net.parameters()):
        return "plans are for processors"
    if name not in SUPPORTED_CLASSES:
        return f"{name} attends in a way of its own"
    if getattr(config, "conv_pos_batch_norm", False):
        return "its positional convolution normalises over the batch"
    if {config.hidden_act, config.feat_extract_activation} != {"gelu"}:
        return "its activation is not GELU"
    if odd := [name for name, module in net.named_modules() if _odd(module)]:
        return f"{odd[0]} computes in a way of its own"
    return "" if is_supported(kind) and is_supported("float32") else f"torch does not multiply in {kind} here"


def _odd(module: Any) -> bool:
    """A linear with updates that are not a plain product of two matrices (DoRA and the like)."""
    return bool(getattr(module, "lora_variant", None)) or bool(getattr(module, "use_dora", {}).get("default", False))


class CpuPlan:
    """`net` as planned. `like` is the plan of a net with which it shares weights.

    Called with recordings float32 [n_i], normalised, in inference mode → logits float32 [T_i, V] each.
    """

    def __init__(self, net: Any, kind: ComputeDtype, share_weights_with: CpuPlan | None = None) -> None:
        core = net.base_model
        self.net, self.kind = net, kind
        self._packs: PackedWeights = (
            share_weights_with._packs if share_weights_with is not None and share_weights_with.kind == kind else {}
        )
        self._states = torch.bfloat16 if kind == "bfloat16" else torch.float32  # what goes from block to block
        self._half = torch.float32 if kind == "float32" else torch.bfloat16  # front end, positions and attention
        self._quantized = any(isinstance(module, QuantizedLinear) for module in net.modules())
        self._front = self._build_front_end(core.feature_extractor)
        projection = core.feature_projection.projection
        narrow = isinstance(projection, QuantizedLinear)  # it would make its weights wide for every chunk
        self._projection = self._packed([projection], kind="float32") if narrow else None
        self._along = self._build_positions(core.encoder.pos_conv_embed)
        self.blocks = [_Block(self, layer) for layer in core.encoder.layers]

    def __call__(self, clips: Sequence[Tensor]) -> list[Tensor]:
        return self.logits_from_features([self.front_end(sound) for sound in clips])

    def front_end(self, samples: Tensor) -> Tensor:
        """Normalised samples float32 [n] → what the front end makes of them, [T, C]: each frame of its own samples."""
        like = next(self.net.base_model.feature_projection.parameters(), None)
        return self._front(samples).to(self._states if like is None else like.dtype)

    def logits_from_features(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Features [T_i, C] of each recording → logits float32 [T_i, V] each."""
        counts, features = [len(part) for part in features], [_pad_to_frame_multiple(part) for part in features]
        bounds = list(zip(pairwise([0, *accumulate(map(len, features))]), counts, strict=True))
        states = self.project(torch.cat(features))
        states = states + torch.cat(
            [_pad_to_frame_multiple(self._along(states[a : a + count])) for (a, _), count in bounds]
        )
        states = self.input_norm(states)
        for block in self.blocks:
            q, k, v = block.qkv(states)
            heard = [encoder_attention(q[a:b], k[a:b], v[a:b], block.scaling, count) for (a, b), count in bounds]
            states = block.after_attention(states, heard[0] if len(heard) == 1 else torch.cat(heard))
        adapter = getattr(self.net.base_model, "adapter", None)
        return [self.head(states[a : a + count], adapter) for (a, _), count in bounds]

    def project(self, features: Tensor) -> Tensor:
        """Features [T, C] → states [T, D], positions not yet added."""
        module = self.net.base_model.feature_projection
        if self._projection is not None:
            normed = module.layer_norm(features) if getattr(module, "feat_proj_layer_norm", True) else features
            return self._projection(normed.float()).to(self._states)
        states = module(features[None])
        return (states[0] if isinstance(states, tuple) else states)[0].to(self._states)

    def input_norm(self, states: Tensor) -> Tensor:
        """What is done between positions and the first block."""
        stable = self.net.config.do_stable_layer_norm
        return states if stable else self.net.base_model.encoder.layer_norm(states)

    def head(self, states: Tensor, adapter: Any = None) -> Tensor:
        """States [T, D] after the last block → logits float32 [T, V]; `adapter` are convolutions to fewer frames."""
        states = self.net.base_model.encoder.layer_norm(states) if self.net.config.do_stable_layer_norm else states
        states = states if adapter is None else adapter(states[None])[0]
        logits: Tensor = self.net.lm_head(states).float()
        return logits

    def linear_kind(self, layer: Any) -> tuple[ComputeDtype, tuple[float, int] | None]:
        """In which arithmetic a linear of a block is multiplied, and the range of its inputs where that is known."""
        if self.kind != "int8" or not self._quantized:
            return self.kind, None
        if isinstance(layer, QuantizedLinear) and layer.bits == 8 and layer.group_size >= layer.in_features:
            return "int8", layer.input_qparams
        return "bfloat16", None

    def _packed(
        self, layers: Sequence[Any], out: torch.dtype | None = None, kind: ComputeDtype | None = None
    ) -> PrepackedLinear | _Cast:
        """The linears, all of one input and sort, as one; packed once for all nets that share their weights."""
        narrow = isinstance(layers[0], QuantizedLinear)
        key = (*(_tensor(layer).data_ptr() for layer in layers), out, kind)
        if key in self._packs:
            return self._packs[key]
        made, range_ = self.linear_kind(layers[0])
        made = kind or made
        bias = torch.cat([_bias(layer) for layer in layers])
        if made == "int8" and narrow:
            codes, scales = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("codes", "scales"))
            self._packs[key] = PrepackedLinear.from_qweight(codes, scales[:, 0], bias, out, range_)
        else:
            packed = PrepackedLinear(torch.cat([layer.weight.detach() for layer in layers]), bias, made, out)
            cast = made == "bfloat16" and self.kind == "int8"
            self._packs[key] = _Cast(packed, out or torch.float32) if cast else packed
        return self._packs[key]

    def _build_front_end(self, module: Any) -> Callable[[Tensor], Tensor]:
        layers = [self._build_convolution(layer, first=index == 0) for index, layer in enumerate(module.conv_layers)]
        hop, reach = 1, 1
        for layer in module.conv_layers:
            reach += (layer.conv.kernel_size[0] - 1) * hop
            hop *= layer.conv.stride[0]
        over_time = any(isinstance(layer.layer_norm, nn.GroupNorm) for layer in module.conv_layers[:1])

        def through(samples: Tensor) -> Tensor:
            frames = samples.float()[:, None]
            for layer in layers:
                frames = layer(frames)
            return frames

        def in_pieces(samples: Tensor) -> Tensor:
            total = (len(samples) - reach) // hop + 1
            starts = range(0, total, FRONT_END_CHUNK_FRAMES)
            ends = [
                (min(start + FRONT_END_CHUNK_FRAMES, -(-total // FRAME_MULTIPLE) * FRAME_MULTIPLE) - 1) * hop + reach
                for start in starts
            ]
            samples = functional.pad(samples, (0, max(0, ends[-1] - len(samples))))
            made = [through(samples[start * hop : end]) for start, end in zip(starts, ends, strict=True)]
            return torch.cat(made)[:total]

        return through if over_time else in_pieces

    def _build_convolution(self, layer: Any, *, first: bool) -> Callable[[Tensor], Tensor]:
        """Frames [T, C] → [T', C'], norm and GELU included. The first one, of samples, stays float32."""
        conv, norm = layer.conv, getattr(layer, "layer_norm", None)
        kernel, stride, half = conv.kernel_size[0], conv.stride[0], self._half
        key = (conv.weight.data_ptr(), "front")
        if key not in self._packs:
            flat = conv.weight.detach().permute(0, 2, 1).flatten(1)  # [C', kernel · C]
            bias = None if conv.bias is None else conv.bias.detach()
            narrow = half is torch.bfloat16 and not first
            self._packs[key] = PrepackedLinear(flat, bias, "bfloat16" if narrow else "float32")
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
                spread, mean = torch.var_mean(out, 0, correction=0)
                scale = torch.rsqrt(spread + norm.eps) * affine[0]
                out = functional.gelu(torch.addcmul(affine[1] - mean * scale, out, scale))
            else:
                out = functional.gelu(functional.layer_norm(out, (out.shape[1],), affine[0], affine[1], norm.eps))
            return out.to(half) if first else out

        return apply

    def _build_positions(self, module: Any) -> Callable[[Tensor], Tensor]:
        """States [T, C] → what the positional convolution adds to them."""
        if "forward" in vars(module):  # looked up in a table (`patch.positions_by_table`)
            return lambda states: module(states[None])[0]
        conv, half = module.conv, self._half
        kernel, groups = conv.kernel_size[0], conv.groups
        weight = conv.weight.detach().to(half)[:, :, None].to(memory_format=torch.channels_last)
        bias = conv.bias.detach().to(half)

        def along(states: Tensor) -> Tensor:
            row = _pad_to_frame_multiple(states.to(half))[None, None].permute(0, 3, 1, 2)  # [1, C, 1, T], channels last
            wide = functional.conv2d(row, weight, bias, padding=(0, kernel // 2), groups=groups)
            return functional.gelu(wide.permute(0, 2, 3, 1)[0, 0, : len(states)]).to(states.dtype)

        return along


class _Block:
    """One block, but for what its frames see of each other: that lies between `qkv` and `rest`."""

    def __init__(self, plan: CpuPlan, layer: Any) -> None:
        attention, feed = layer.attention, layer.feed_forward
        self._layer, self._stable, self._states = layer, plan.net.config.do_stable_layer_norm, plan._states
        self._before = _Linears(plan, (attention.q_proj, attention.k_proj, attention.v_proj), plan._half)
        self._after, self._up, self._down = (
            _Linears(plan, (one,)) for one in (attention.out_proj, feed.intermediate_dense, feed.output_dense)
        )
        self._heads, self.scaling = attention.num_heads, attention.scaling

    def qkv(self, states: Tensor) -> tuple[Tensor, ...]:
        """States [T, D] → q, k and v, [T, H, d] each, not scaled."""
        made = self._before(self._layer.layer_norm(states) if self._stable else states)
        return made.unflatten(-1, (3, self._heads, -1)).unbind(1)

    def after_attention(self, states: Tensor, attended: Tensor) -> Tensor:
        """States before the block and what its attention gave, [T, H, d] → states after it."""
        layer, attended = self._layer, attended.flatten(1).to(self._states)
        if not self._stable:
            states = layer.layer_norm(self._after.linear_add(attended, states))
            out: Tensor = layer.final_layer_norm(self._down.linear_add(self._up(states, gelu=True), states))
            return out
        states = self._after.linear_add(attended, states)
        states = self._down.linear_add(self._up(layer.final_layer_norm(states), gelu=True), states)
        extra = getattr(layer, "adapter_layer", None)
        return states if extra is None else states + extra(states)


class _Cast:
    """A product in bfloat16 where others are in int8: x, and what comes of it, are as they are there."""

    def __init__(self, product: PrepackedLinear, out: torch.dtype) -> None:
        self._product, self._out = product, out

    def __call__(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        return self._product(x.bfloat16(), gelu=gelu).to(self._out)

    def linear_add(self, x: Tensor, r: Tensor) -> Tensor:
        return self(x) + r


class _Linears:
    """Linears of one input as one product, where they are of one sort, with the low-rank updates that some of them may
    have beside it."""

    def __init__(self, plan: CpuPlan, modules: Sequence[Any], out: torch.dtype | None = None) -> None:
        plain = [getattr(module, "base_layer", module) for module in modules]
        alike = len({plan.linear_kind(layer) for layer in plain}) == 1
        self.products = [plan._packed(some, out) for some in ([plain] if alike else [[one] for one in plain])]
        bounds = pairwise([0, *accumulate(layer.out_features for layer in plain)])
        self.updated = [
            (slice(*bound), module)
            for bound, module in zip(bounds, modules, strict=True)
            if hasattr(module, "base_layer") and not module.merged and not module.disable_adapters
        ]

    def __call__(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        if not self.updated:
            return self._made(x, gelu=gelu)
        out = self._update(x, self._made(x))
        return functional.gelu(out) if gelu else out

    def linear_add(self, x: Tensor, states: Tensor) -> Tensor:
        """Of one linear alone: what it gives, and `states`."""
        (product,) = self.products
        return self._update(x, product.linear_add(x, states))

    def _made(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        made = [product(x, gelu=gelu) for product in self.products]
        return made[0] if len(made) == 1 else torch.cat(made, -1)

    def _update(self, x: Tensor, out: Tensor) -> Tensor:
        for columns, module in self.updated:
            for name in module.active_adapters:
                out[:, columns] += module.lora_B[name](module.lora_A[name](x)) * module.scaling[name]
        return out


def _pad_to_frame_multiple(rows: Tensor) -> Tensor:
    """[T, …] and zeros up to the next multiple of `GRID`."""
    spare = -len(rows) % FRAME_MULTIPLE
    return torch.cat([rows, rows.new_zeros(spare, *rows.shape[1:])]) if spare else rows


def _tensor(layer: Any) -> Tensor:
    """What a linear is known by: of those that are narrow, `weight` is another tensor each time."""
    tensor: Tensor = layer.qweight if isinstance(layer, QuantizedLinear) else layer.weight
    return tensor


def _bias(layer: Any) -> Tensor:
    bias: Tensor = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
    return bias
