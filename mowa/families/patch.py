"""Swaps on one model that change its speed and nothing else. Other models in the process never notice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mowa.kernels.dropout import cpu_dropout


class ChannelsLastGELU(nn.Module):
    """GELU of a transposed view, computed in the layout memory has. Same values, same gradients.

    The layer-norm front-end of wav2vec2 normalises over channels, so its activation sees [B, C, T] as a view of
    [B, T, C] and gets its gradient in the other order; PyTorch's strided gelu backward is several times slower there.
    """

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        active = functional.gelu(hidden.transpose(-2, -1))
        if active.requires_grad:
            active.register_hook(lambda gradient: gradient.contiguous())
        return active.transpose(-2, -1)


@contextmanager
def channels_last_front_end(net: nn.Module) -> Iterator[int]:
    """Swap the activation of every layer-norm convolution of `net`; gives how many were swapped."""
    swapped = []
    for layer in net.modules():
        if type(layer).__name__.endswith("LayerNormConvLayer") and type(layer.activation).__name__ == "GELUActivation":
            swapped.append((layer, layer.activation))
            layer.activation = ChannelsLastGELU()
    try:
        yield len(swapped)
    finally:
        for layer, activation in swapped:
            layer.activation = activation


@contextmanager
def fast_dropout(net: nn.Module) -> Iterator[None]:
    """Dropout by `kernels.dropout` in every `nn.Dropout` of a net on a processor: other masks, ten times as fast."""
    swapped = [layer for layer in net.modules() if isinstance(layer, nn.Dropout) and layer.p]
    if all(weight.device.type == "cpu" for weight in net.parameters()):
        for layer in swapped:
            layer.forward = partial(_dropped, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in swapped:
            vars(layer).pop("forward", None)


def _dropped(layer: nn.Dropout, hidden: torch.Tensor) -> torch.Tensor:
    return cpu_dropout(hidden, layer.p) if layer.training else hidden


def set_gradient_checkpointing(net: Any, enabled: bool = True) -> None:
    """Recompute the blocks of `net` in the backward pass, or no longer: less memory, more time."""
    renamed = hasattr(net, "activation_checkpointing_enable")  # since transformers 5.2x
    verb = "activation_checkpointing" if renamed else "gradient_checkpointing"
    if enabled:
        getattr(net, f"{verb}_enable")({"use_reentrant": False})
    else:
        getattr(net, f"{verb}_disable")()


@torch.no_grad()
def precompute_absolute_positions(net: Any, *, frozen: bool = False) -> bool:
    """Where the positional convolution of `net` (a Wav2Vec2ForCTC) gives absolute positions, look them up instead.

    Such a convolution (`mowa.train.positions` writes it; config key `absolute_positions`) sees only channels that are
    the same in every frame, so what it gives is a table by frame, and taps by the thousand need not be multiplied. True
    where this still is so; a net that was trained further may have lost it. The weights stay where they are, and are
    used outside inference mode, unless `training` says that they will not change.
    """
    if getattr(net.config, "absolute_positions", None) is None:
        return False
    module, projection = net.wav2vec2.encoder.pos_conv_embed, net.wav2vec2.feature_projection.projection
    weight = module.conv.weight
    width, per_group, kernel = weight.shape
    constant = slice(0, width, per_group)
    if weight[:, 1:].any() or weight[..., kernel // 2 + 1 :].any() or projection.weight[constant].any():
        return False
    quiet = projection.bias.new_zeros(1, kernel // 2 + 1, width, dtype=torch.float32)
    quiet[..., constant] = projection.bias[constant].float()
    table = functional.gelu(
        functional.conv1d(
            quiet.transpose(1, 2),
            weight.float(),
            module.conv.bias.float(),
            padding=kernel // 2,
            groups=width // per_group,
        )
    ).transpose(1, 2)[0, : kernel // 2 + 1]
    module.forward = partial(_look_up, table, module, frozen)
    return True


def absolute_position_table(net: Any) -> torch.Tensor | None:
    """Where `positions_by_table` looks up, [N, D], the last row for all frames from there on; None: nowhere."""
    forward = vars(net.base_model.encoder.pos_conv_embed).get("forward")
    return forward.args[0] if isinstance(forward, partial) and forward.func is _look_up else None


def _look_up(table: torch.Tensor, module: nn.Module, training: bool, hidden: torch.Tensor) -> torch.Tensor:
    if not (training or torch.is_inference_mode_enabled()):
        return type(module).forward(module, hidden)
    rows = torch.arange(hidden.shape[1]).clamp(max=len(table) - 1)
    return table[rows].to(hidden).expand_as(hidden)
