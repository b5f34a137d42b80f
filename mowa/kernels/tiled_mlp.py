"""A function of tokens, one by one, over tiles of the sequence, so that what is inside never exists for all of it.

An MLP's inner values are several times as wide as its input; over a long sequence they are what memory ends with. Each
tile is gone through again in the backward pass, and is forgotten before the next (arXiv:2506.13996, section 3.2).
It costs one more forward pass of the function. Which functions treat tokens one by one is not known here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def apply_tiled(function: Callable[[Tensor], Tensor], x: Tensor, tile_size: int, dim: int = -2) -> Tensor:
    """function(x), `tile` positions of `dim` at a time. x [..., T, D] → what `function` gives, tiles put end to end.

    Exact for whatever treats positions alone: gradients reach x and all that `function` uses (weights, low-rank
    updates), summed over tiles. Random numbers and autocast are the same when a tile is gone through again.

    Raises ValueError where tile < 1.
    """
    if tile_size < 1:
        raise ValueError(f"a tile has at least one position, not {tile_size}")
    if x.shape[dim] <= tile_size:
        return function(x)
    one = partial(checkpoint, function, use_reentrant=False) if torch.is_grad_enabled() else function
    return torch.cat([one(part) for part in x.split(tile_size, dim)], dim)
