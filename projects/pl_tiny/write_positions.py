"""Absolute positions, from the positional convolution of a wav2vec2 net.

Whisper's blocks know where a frame lies: sinusoids are added to their input. A wav2vec2 net is said not to know; its
positional convolution h + GELU(conv(h)) sees sound only. But that convolution is padded with zeros: over a channel
that is constant, it gives at frame t the sum of the weights of the t + 1 taps that reach back to the beginning, and any
function of t can be had as such a sum, as far as half the kernel reaches. So the sinusoids move over as well.

A channel of each group has to be constant. A quarter of the channels below Whisper-base's blocks are: `ordered` brings
one into each group. The others are lowered by LOWERED, which the convolution gives back, for GELU has to stay where it
can be undone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mowa.errors import RecipeError
from projects.pl_tiny.transplant import Arrays

LOWERED, CONSTANT = 1.2, 2.0


def ordered(deviations: Tensor, groups: int) -> np.ndarray:
    """Channels [width] by how much they vary → an order in which the first of each group varies least."""
    width = len(deviations)
    by_size = deviations.argsort(stable=True).numpy()
    return np.concatenate([by_size[:groups, None], by_size[groups:].reshape(groups, width // groups - 1)], 1).ravel()


def reordered(arrays: Arrays, order: np.ndarray) -> dict[str, np.ndarray]:
    """The same Whisper encoder with the channels between its blocks in another order."""
    out = dict(arrays)
    for name, value in arrays.items():
        if not name.startswith("encoder/") or value.ndim == 0:
            continue
        if name.startswith("encoder/conv2/") or "norm/" in name:
            out[name] = value[order]
        elif name.endswith(("position_encodings/encodings", "linear_0/weight")):
            out[name] = value[:, order]
        elif "linear_1/" in name:
            out[name] = value[order]
    return out


@torch.no_grad()
def write(net: Any, positions: Tensor) -> None:
    """Positions [N, width] into `pos_conv_embed` and the projection's constants: frame t gets row t.

    From frame K / 2 of a kernel K on the row is K / 2. `net` is a Wav2Vec2ForCTC whose projection gives what the blocks
    see without positions, and whose positional convolution has no fewer groups than a channel in each can be spared.
    """
    conv, projection = net.wav2vec2.encoder.pos_conv_embed.conv, net.wav2vec2.feature_projection.projection
    width, per_group, kernel = conv.weight.shape
    reach = kernel // 2
    if kernel % 2 or len(positions) <= reach:
        raise RecipeError(f"net: num_conv_pos_embeddings must be even and less than {2 * len(positions)}")
    wanted = positions[: reach + 1].double() + LOWERED
    constant = slice(0, width, per_group)
    wanted[:, constant] += projection.bias[constant].double() - LOWERED + CONSTANT
    projection.weight[constant] = 0
    projection.bias -= LOWERED
    projection.bias[constant] = -CONSTANT
    sums = _before_gelu(wanted)  # what the convolution is to give at frame t
    taps = torch.diff(sums, dim=0, prepend=torch.zeros_like(sums[:1])) / -CONSTANT
    weight = torch.zeros(width, per_group, kernel, dtype=torch.double)
    weight[:, 0, : reach + 1] = taps.flip(0).T
    size = weight.square().sum((0, 1), keepdim=True).sqrt()
    conv.parametrizations.weight.original0.copy_(size)
    direction = torch.where(
        size > 0, weight / size.clamp(min=1e-12), torch.full_like(weight, (width * per_group) ** -0.5)
    )
    conv.parametrizations.weight.original1.copy_(direction)
    conv.bias.zero_()
    net.config.absolute_positions = reach


def _before_gelu(values: Tensor) -> Tensor:
    """x ≥ −0.5 where GELU(x) = values, by Newton's method."""
    with torch.enable_grad():
        x = values.clone().clamp(min=0.05)
        for _ in range(40):
            x = x.detach().requires_grad_()
            y = F.gelu(x)
            (slope,) = torch.autograd.grad(y.sum(), x)
            x = (x - (y - values) / slope).clamp(min=-0.5)
    return x.detach()
