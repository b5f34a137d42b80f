"""The anatomy of wav2vec2-like CTC nets: read the parts of a stock transformers net, and the order they are called in.

    features = front_end(samples)                       [B, N] → [B, T, C], convolutions
    states = project(features)                          [B, T, D]
    states = before_blocks(states + positions(states))  a stack of convolutions, or a table (`positions`)
    states = blocks(states)                             `BlockParts` names what is in one
    logits = head(after_blocks(states))                 [B, T', V]

All strategies of this package, the exporters and training read nets through `read_anatomy`, from the modules that are
there: configs also have keys that a net ignores. Sizes that follow from the config alone are in `geometry`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mowa.families import list_families
from mowa.models.ctc_encoder.geometry import FrameGeometry, frame_geometry


@dataclass(frozen=True, slots=True)
class AbsolutePositions:
    """Positions of a net whose positional convolution gives the same output for any input: `table` [N, D]."""

    table: Tensor

    def at(self, frames: Tensor, like: Tensor) -> Tensor:
        """Return the positions of `frames`, int [T], as [T, D] in dtype and device of `like`; the last row repeats."""
        rows = frames.to(like.device).clamp(max=len(self.table) - 1)
        return self.table.to(like.device)[rows].to(like.dtype)


@dataclass(frozen=True, slots=True)
class PositionLayer:
    """One positional convolution: `activation(norm(conv(x)))`, cut to the frames of x; most nets have no norm."""

    module: Any
    conv: Any
    norm: Any | None
    activation: Any
    channels_first: bool  # whether `module` takes [B, D, T]

    def __call__(self, states: Tensor) -> Tensor:
        """Compute the positions of hidden states, [B, T, D] → [B, T, D]."""
        if self.channels_first:
            return self.module(states.transpose(1, 2)).transpose(1, 2)
        out: Tensor = self.module(states)
        return out

    def activate(self, convolved: Tensor) -> Tensor:
        """Apply norm and activation to the output of the convolution, [B, D, T]."""
        if self.norm is not None:
            convolved = self.norm(convolved.transpose(1, 2)).transpose(1, 2)
        out: Tensor = self.activation(convolved)
        return out


@dataclass(frozen=True, slots=True)
class BlockParts:
    """The parts of one block, and how they are put together around its attention."""

    norm: Any  # before the attention where `stable`, else after it
    q: Any
    k: Any
    v: Any
    out: Any
    num_heads: int
    scaling: float
    final_norm: Any  # before the MLP where `stable`, else after it
    feed_forward: Any
    up: Any
    down: Any
    adapter: Any | None  # bottleneck adapter
    stable: bool

    def attention_input(self, states: Tensor) -> Tensor:
        """Return the input of q, k and v."""
        return self.norm(states) if self.stable else states

    def after_attention(
        self,
        states: Tensor,
        attended: Tensor,
        add_output: Callable[[Tensor, Tensor], Tensor],
        add_feed_forward: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Return the states [T, D] after the block, given those before it and the attention's output [T, D].

        `add_output` computes out(x) + residual of (x, residual), `add_feed_forward` the same with the MLP.
        """
        states = add_output(attended, states)
        if not self.stable:
            states = self.norm(states)
            out: Tensor = self.final_norm(add_feed_forward(states, states))
            return out
        states = add_feed_forward(self.final_norm(states), states)
        return states if self.adapter is None else states + self.adapter(states)


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The modules of a net. Reading it costs nothing, so read it again after modules of the net were replaced."""

    config: Any
    geometry: FrameGeometry
    front_end: Any  # [B, N] → [B, C, T]; its `conv_layers` have `conv`, `activation` and, in part, `layer_norm`
    projection: Any  # layer norm, `projection` and dropout
    mask_embedding: Tensor | None  # of SpecAugment
    encoder: Any  # positions, blocks and norm, as transformers calls them
    position_module: Any
    position_layers: tuple[PositionLayer, ...]
    absolute_positions: AbsolutePositions | None
    blocks: Any  # nn.ModuleList
    norm: Any  # after the blocks where `stable`, else before them
    stable: bool
    adapter: Any | None  # convolutional, after the blocks
    head: Any

    @property
    def normalizes_over_time(self) -> bool:
        """Whether the front end has group norm: each frame depends on all samples, padding included."""
        return isinstance(getattr(self.front_end.conv_layers[0], "layer_norm", None), nn.GroupNorm)

    @property
    def is_padding_exact(self) -> bool:
        """Whether an attention mask keeps padding out of every frame of a recording.

        It does not with group norm over time, nor where a convolution sees values other than zero in padding: a
        positional one after another one or after a batch norm, and an adapter after the blocks.
        """
        has_batch_norm = getattr(self.position_module, "batch_norm", None) is not None
        changes_padding = len(self.position_layers) > 1 or has_batch_norm or self.adapter is not None
        return not (self.normalizes_over_time or changes_padding)

    def features(self, samples: Tensor) -> Tensor:
        """Return the frames of the front end, [B, T, C], of normalized samples [B, N]."""
        return self.front_end(samples).transpose(1, 2)

    def project(self, features: Tensor) -> Tensor:
        """Return hidden states [B, T, D], without positions, of frames [B, T, C]."""
        states: Tensor = _first(self.projection(features))
        return states

    def before_blocks(self, states: Tensor) -> Tensor:
        """Return the input of the first block, given states with positions added."""
        return states if self.stable else self.norm(states)

    def after_blocks(self, states: Tensor) -> Tensor:
        """Return the input of the head, [B, T', D], given the output of the last block [B, T, D]."""
        states = self.norm(states) if self.stable else states
        return states if self.adapter is None else self.adapter(states)

    def block_parts(self) -> list[BlockParts]:
        """Return the parts of every block."""
        return [_block_parts(block, self.stable) for block in self.blocks]

    def masked_logits(self, states: Tensor, valid: Tensor | None, mask_value: float) -> Tensor:
        """Return logits [B, T, V] of projected states, in operators that every exporter has.

        `valid`, [B, T] of ones and zeros, marks frames that are not padding: others are zeroed, and `mask_value` is
        added to attention scores. transformers computes the same mask with operators that some formats lack.
        """
        mask = None
        if valid is not None:
            states = states * valid[..., None]
            mask = (1 - valid[:, None, None]) * mask_value
        states = self.before_blocks(states + self.position_module(states))
        position_bias: dict[str, Any] = {}  # WavLM's first block computes it for the others
        for block in self.blocks:
            output = block(states, attention_mask=mask, **position_bias)
            states = _first(output)
            position_bias = {"position_bias": output[1]} if isinstance(output, tuple) and len(output) > 1 else {}
        logits: Tensor = self.head(self.after_blocks(states))
        return logits


def read_anatomy(net: Any) -> Anatomy:
    """Return the parts of `net`, a transformers net with a CTC head, or its base model."""
    core = net.base_model
    encoder = core.encoder
    module = encoder.pos_conv_embed
    return Anatomy(
        config=net.config,
        geometry=frame_geometry(net.config),
        front_end=core.feature_extractor,
        projection=core.feature_projection,
        mask_embedding=getattr(core, "masked_spec_embed", None),
        encoder=encoder,
        position_module=module,
        position_layers=_position_layers(module),
        absolute_positions=getattr(module, "absolute_positions", None),
        blocks=encoder.layers,
        norm=encoder.layer_norm,
        stable=type(encoder).__name__.endswith("StableLayerNorm"),
        adapter=getattr(core, "adapter", None),
        head=getattr(net, "lm_head", None),
    )


def _position_layers(module: Any) -> tuple[PositionLayer, ...]:
    stacked = getattr(module, "layers", None)
    return tuple(
        PositionLayer(one, one.conv, getattr(one, "layer_norm", None), one.activation, stacked is not None)
        for one in (stacked if stacked is not None else [module])
        if hasattr(one, "conv")  # exporters put a table in its place
    )


def _block_parts(block: Any, stable: bool) -> BlockParts:
    attention, feed_forward = block.attention, block.feed_forward
    return BlockParts(
        norm=block.layer_norm,
        q=attention.q_proj,
        k=attention.k_proj,
        v=attention.v_proj,
        out=attention.out_proj,
        num_heads=attention.num_heads,
        scaling=attention.scaling,
        final_norm=block.final_layer_norm,
        feed_forward=feed_forward,
        up=feed_forward.intermediate_dense,
        down=feed_forward.output_dense,
        adapter=getattr(block, "adapter_layer", None),
        stable=stable,
    )


def copy_with_blocks(net: Any, kept: Sequence[int]) -> Any:
    """Return a copy of `net` that has only these of its blocks; all weights are copied."""
    encoder = net.base_model.encoder
    blocks = encoder.layers
    encoder.layers = nn.ModuleList()  # copy no block twice
    try:
        copied = copy.deepcopy(net)
    finally:
        encoder.layers = blocks
    shared = {id(net.config): copied.config}  # blocks refer to the config, of which the net has one
    copied.base_model.encoder.layers = nn.ModuleList(copy.deepcopy(blocks[index], shared) for index in kept)
    copied.config.num_hidden_layers = len(kept)
    return copied


def unsupported_reason(net: Any, capability: str) -> str:
    """Return why `net` lacks a capability of `Family.supports`, or an empty string where it has it."""
    name, families = type(net).__name__, list_families()
    family = next((one for one in families if name in one.architectures), None)
    if family is not None and capability in family.supports:
        return ""
    if family is not None and capability in family.unsupported:
        return family.unsupported[capability]
    others = ", ".join(kind for one in families if capability in one.supports for kind in one.architectures)
    return f"{name} is not supported, only {others}"


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output
