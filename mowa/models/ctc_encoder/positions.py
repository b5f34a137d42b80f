"""Absolute positions: nets whose positional convolution gives the same output for any input, so that it is a table.

A checkpoint made by projects/pl_tiny has the config key `absolute_positions`: its positional convolution reads only
channels that are constant over time, with taps only for earlier frames. What it adds to frame t then depends on t
alone, and is constant from the last position on. This module computes that table and stores it, an `AbsolutePositions`,
beside the convolution of one net, which then looks positions up instead of multiplying thousands of taps. Other modules
find it as `read_anatomy(net).absolute_positions`, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mowa.errors import RecipeError
from mowa.models.ctc_encoder.anatomy import AbsolutePositions, read_anatomy
from mowa.models.ctc_encoder.geometry import POSITIONS_CONFIG_KEY, max_absolute_position


class _TableForward:
    """Replacement for `forward` of a positional convolution: states [B, T, D] → positions, from its table.

    Outside of inference mode the convolution itself is used, unless `frozen`.
    """

    def __init__(self, module: Any, frozen: bool) -> None:
        self.module, self.frozen = module, frozen

    def __call__(self, states: Tensor) -> Tensor:
        if not (self.frozen or torch.is_inference_mode_enabled()):
            out: Tensor = type(self.module).forward(self.module, states)
            return out
        positions: AbsolutePositions = self.module.absolute_positions
        return positions.at(torch.arange(states.shape[1]), states).expand_as(states)


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
    module.absolute_positions = AbsolutePositions(table)
    module.forward = _TableForward(module, frozen)
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
        del module.forward, module.absolute_positions
        for parameter in trainable:
            parameter.requires_grad_(True)
        for hook in hooks:
            hook.remove()


@contextmanager
def replace_positions(net: Any, compute: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let `net` compute its positions with `compute`, states [B, T, D] → positions, inside the context."""
    module = read_anatomy(net).position_module
    installed = vars(module).get("forward")
    module.forward = compute
    try:
        yield
    finally:
        del module.forward
        if installed is not None:
            module.forward = installed


def replace_position_module(net: Any, module: Any) -> None:
    """Put `module`, states [B, T, D] → positions, in the place of the positional convolution, for good."""
    read_anatomy(net).encoder.pos_conv_embed = module


def _position_modules(net: Any) -> tuple[Any, Any]:
    """The positional convolution, and the linear whose constant channels it reads."""
    anatomy = read_anatomy(net)
    return anatomy.position_module, anatomy.projection.projection
