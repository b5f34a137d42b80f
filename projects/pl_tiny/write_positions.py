"""Write absolute positions into the positional convolution of a wav2vec2 net.

Whisper adds sinusoids to the input of its blocks. A wav2vec2 net has h + GELU(conv(h)) instead, which depends on the
content only, except that the convolution is zero-padded: over a constant channel, its output at frame t is the sum of
the weights of the t + 1 taps that reach inside the recording. Any function of t can be written as such a sum, up to
half the kernel size, so the sinusoids can be reproduced.

This needs one constant channel per group of the convolution. A quarter of the channels below Whisper base's blocks are
nearly constant; `order_channels` puts one into each group. The other channels are lowered by SHIFT, and the convolution
adds it back, because GELU has to stay in the range where it can be inverted. `mowa.models.ctc_encoder.positions` reads
the positions back as a table.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mowa.errors import RecipeError
from projects.pl_tiny.whisper_encoder import Arrays

SHIFT, CONSTANT = 1.2, 2.0


def order_channels(deviations: Tensor, groups: int) -> np.ndarray:
    """Return a permutation of the channels in which the first of each group varies least.

    `deviations` [D]: standard deviation of each channel.
    """
    width = len(deviations)
    by_size = deviations.argsort(stable=True).numpy()
    return np.concatenate([by_size[:groups, None], by_size[groups:].reshape(groups, width // groups - 1)], 1).ravel()


def permute_channels(arrays: Arrays, order: np.ndarray) -> dict[str, np.ndarray]:
    """Permute the channels between the blocks of a Whisper encoder. The function it computes stays the same."""
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
def write_positions(net: Any, positions: Tensor) -> None:
    """Write positions [N, D] into `pos_conv_embed` and the constants of the projection: frame t gets row t.

    With a kernel of size K, frames from K / 2 on get row K / 2. `net` is a Wav2Vec2ForCTC whose projection gives the
    input of the blocks without positions, and in which every group of the convolution can spare a channel. Raise
    RecipeError if K is odd or the positions are too few.
    """
    conv, projection = net.wav2vec2.encoder.pos_conv_embed.conv, net.wav2vec2.feature_projection.projection
    width, per_group, kernel = conv.weight.shape
    half = kernel // 2
    if kernel % 2 or len(positions) <= half:
        raise RecipeError(f"model_config: num_conv_pos_embeddings must be even and less than {2 * len(positions)}")
    targets = positions[: half + 1].double() + SHIFT
    constant = slice(0, width, per_group)
    targets[:, constant] += projection.bias[constant].double() - SHIFT + CONSTANT
    projection.weight[constant] = 0
    projection.bias -= SHIFT
    projection.bias[constant] = -CONSTANT
    sums = _inverse_gelu(targets)  # what the convolution has to give at frame t
    taps = torch.diff(sums, dim=0, prepend=torch.zeros_like(sums[:1])) / -CONSTANT
    weight = torch.zeros(width, per_group, kernel, dtype=torch.double)
    weight[:, 0, : half + 1] = taps.flip(0).T
    norm = weight.square().sum((0, 1), keepdim=True).sqrt()
    conv.parametrizations.weight.original0.copy_(norm)
    direction = torch.where(
        norm > 0, weight / norm.clamp(min=1e-12), torch.full_like(weight, (width * per_group) ** -0.5)
    )
    conv.parametrizations.weight.original1.copy_(direction)
    conv.bias.zero_()
    net.config.absolute_positions = half


def _inverse_gelu(values: Tensor) -> Tensor:
    """Return x ≥ −0.5 with GELU(x) = values, by Newton's method."""
    with torch.enable_grad():
        x = values.clone().clamp(min=0.05)
        for _ in range(40):
            x = x.detach().requires_grad_()
            y = F.gelu(x)
            (slope,) = torch.autograd.grad(y.sum(), x)
            x = (x - (y - values) / slope).clamp(min=-0.5)
    return x.detach()
