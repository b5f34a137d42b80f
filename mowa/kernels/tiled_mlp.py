"""Apply a token-wise function to tiles of a sequence, to bound the memory of its intermediate values.

The intermediate values of an MLP are several times as large as its input. Each tile is recomputed in the backward pass
and freed before the next one (ALST, arXiv:2506.13996, section 3.2), for the cost of one more forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def apply_tiled(function: Callable[[Tensor], Tensor], x: Tensor, tile_size: int, dim: int = -2) -> Tensor:
    """Return function(x), computed `tile_size` positions of `dim` at a time and concatenated.

    Exact for functions that treat positions independently: gradients reach x and all parameters that `function` uses,
    summed over tiles. Random states and autocast are restored for the recomputation.

    Args:
        function: maps [..., tile, D] to [..., tile, E].
        x: [..., T, D].
        tile_size: positions per tile, at least 1.
        dim: dimension of positions.

    Raises:
        ValueError: tile_size < 1.
    """
    if tile_size < 1:
        raise ValueError(f"tile_size must be at least 1, not {tile_size}")
    if x.shape[dim] <= tile_size:
        return function(x)
    run = partial(checkpoint, function, use_reentrant=False) if torch.is_grad_enabled() else function
    return torch.cat([run(part) for part in x.split(tile_size, dim)], dim)
