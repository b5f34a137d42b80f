"""Absolute positions: nets whose positional convolution gives the same output for any input, so that it is a table.

A checkpoint made by projects/pl_tiny has the config key `absolute_positions`: its positional convolution reads only
channels that are constant over time, with taps only for earlier frames. What it adds to frame t then depends on t
alone, and is constant from the last position on. This module computes that table, [N, D], and lets one net look it up
instead of multiplying thousands of taps. Other modules call `absolute_position_table(net)`, which returns the table
or None.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mowa.errors import RecipeError
from mowa.models.ctc_encoder.geometry import POSITIONS_CONFIG_KEY, max_absolute_position


class TableForward:
    """Replacement for `forward` of a positional convolution: states [B, T, D] → positions [B, T, D], from a table.

    Args:
        module: the convolution, used outside of inference mode unless `frozen`.
        table: [N, D].
        frozen: the weights do not change, so the table may be used in training too.
    """

    def __init__(self, module: nn.Module, table: Tensor, frozen: bool) -> None:
        self.module, self.table, self.frozen = module, table, frozen

    def __call__(self, states: Tensor) -> Tensor:
        if not (self.frozen or torch.is_inference_mode_enabled()):
            out: Tensor = type(self.module).forward(self.module, states)
            return out
        return look_up(self.table, torch.arange(states.shape[1]), states).expand_as(states)


def absolute_position_table(net: Any) -> Tensor | None:
    """Return the table [N, D] that `precompute_absolute_positions` installed in `net`, or None."""
    forward = vars(net.base_model.encoder.pos_conv_embed).get("forward")
    return forward.table if isinstance(forward, TableForward) else None


def look_up(table: Tensor, frames: Tensor, like: Tensor) -> Tensor:
    """Return the positions of `frames`, int [T], as [T, D] in dtype and device of `like`; the last row repeats."""
    return table.to(like.device)[frames.to(like.device).clamp(max=len(table) - 1)].to(like.dtype)


@torch.no_grad()
def precompute_absolute_positions(net: Any, *, frozen: bool = False) -> bool:
    """Let `net` look up its absolute positions in a table. Its weights and other nets do not change.

    Args:
        net: a wav2vec2-like CTC net; changed in place.
        frozen: the weights will not change. Otherwise the table is used in inference mode only.

    Returns:
        Whether the net has absolute positions. One that was trained further may have the config key but not the
        weights.
    """
    if max_absolute_position(net.config) is None:
        return False
    module, projection = _position_modules(net)
    weight = module.conv.weight
    width, per_group, kernel = weight.shape
    constant = slice(0, width, per_group)
    if weight[:, 1:].any() or weight[..., kernel // 2 + 1 :].any() or projection.weight[constant].any():
        return False
    states = projection.bias.new_zeros(1, kernel // 2 + 1, width, dtype=torch.float32)
    states[..., constant] = projection.bias[constant].float()
    convolved = functional.conv1d(
        states.transpose(1, 2),
        weight.float(),
        module.conv.bias.float(),
        padding=kernel // 2,
        groups=width // per_group,
    )
    table = functional.gelu(convolved).transpose(1, 2)[0, : kernel // 2 + 1]
    module.forward = TableForward(module, table, frozen)
    return True


@contextmanager
def freeze_absolute_positions(net: Any) -> Iterator[None]:
    """Train a net with absolute positions without changing these, inside the context.

    The positional convolution gets no gradient and is replaced by its table, which is much faster; the constant
    channels of the feature projection stay constant, so that the table stays what the convolution computes.

    Raises:
        RecipeError: the weights do not give absolute positions.
    """
    module, projection = _position_modules(net)
    width, per_group, _ = module.conv.weight.shape
    mask = torch.ones(width, device=projection.weight.device)
    mask[::per_group] = 0
    if not precompute_absolute_positions(net, frozen=True):
        raise RecipeError(
            f"net: config.json has {POSITIONS_CONFIG_KEY}, but its positional convolution depends on the input; "
            "remove the key"
        )
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.requires_grad_(False)
    shaped_masks = ((projection.weight, mask[:, None]), (projection.bias, mask))
    hooks = [
        parameter.register_hook(lambda gradient, mask=mask: gradient * mask.to(gradient))
        for parameter, mask in shaped_masks
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        del module.forward
        for parameter in trainable:
            parameter.requires_grad_(True)
        for hook in hooks:
            hook.remove()


def _position_modules(net: Any) -> tuple[Any, Any]:
    """The positional convolution, and the linear whose constant channels it reads."""
    return net.base_model.encoder.pos_conv_embed, net.base_model.feature_projection.projection
