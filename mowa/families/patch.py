"""Swaps on one model, each undone when its context ends. Other models in the process never notice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional


class ChannelLastGelu(nn.Module):
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
def channel_last_front_end(net: nn.Module) -> Iterator[int]:
    """Swap the activation of every layer-norm convolution of `net`; gives how many were swapped."""
    swapped = []
    for layer in net.modules():
        if type(layer).__name__.endswith("LayerNormConvLayer") and type(layer.activation).__name__ == "GELUActivation":
            swapped.append((layer, layer.activation))
            layer.activation = ChannelLastGelu()
    try:
        yield len(swapped)
    finally:
        for layer, activation in swapped:
            layer.activation = activation
