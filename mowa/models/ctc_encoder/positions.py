"""Swaps on one model that change its speed and nothing else. Other models in the process never notice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mowa.errors import RecipeError


@torch.no_grad()
def precompute_absolute_positions(net: Any, *, frozen: bool = False) -> bool:
    """Where the positional convolution of `net` (a Wav2Vec2ForCTC) gives absolute positions, look them up instead.

    Such a convolution (`projects.pl_tiny.write_positions` writes it; config key `absolute_positions`) sees only channels that are
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


@contextmanager
def freeze_absolute_positions(net: Any) -> Iterator[None]:
    """Train a Wav2Vec2ForCTC that `write` gave positions to, and keep them, as long as the context lasts.

    The convolution gets no gradient and is looked up in a table, which is much faster; the projection's constant
    channels stay constant, so the table is what the convolution gives.
    """
    module, projection = net.wav2vec2.encoder.pos_conv_embed, net.wav2vec2.feature_projection.projection
    width, per_group, _ = module.conv.weight.shape
    constant = torch.ones(width, device=projection.weight.device)
    constant[::per_group] = 0
    if not precompute_absolute_positions(net, frozen=True):
        raise RecipeError("net: its positional convolution gives no absolute positions; they cannot be held")
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.requires_grad_(False)
    shapes = ((projection.weight, constant[:, None]), (projection.bias, constant))
    hooks = [
        parameter.register_hook(lambda gradient, kept=kept: gradient * kept.to(gradient))
        for parameter, kept in shapes
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        del module.forward
        for parameter in learning:
            parameter.requires_grad_(True)
        for hook in hooks:
            hook.remove()
