"""Codes of four bits in fewer bytes, as two kinds of files lay them out. It knows tensors and no files.

- words, as compressed-tensors has them: eight codes of a row (or a column) in an int32, each 8 higher than it is, the
  first in the lowest bits; what is missing in the last word is 0.
- pairs, as bitsandbytes has them: two codes of the flattened matrix in a byte, the first in its high half.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

IN_WORD = 8
MIDDLE = 8


def words(codes: Tensor, dim: int = 1) -> Tensor:
    """int8 [N, K] of -8 … 7 → int32 [N, ⌈K / 8⌉]; along `dim` 0: [⌈N / 8⌉, K]."""
    if dim == 0:
        return words(codes.T).T.contiguous()
    spare = -codes.shape[1] % IN_WORD
    whole = functional.pad(codes.to(torch.int64) + MIDDLE, (0, spare)).unflatten(1, (-1, IN_WORD))
    return (whole << _places(codes)).sum(-1).to(torch.int32)  # the last code may reach the sign: int64 wraps to it


def from_words(packed: Tensor, count: int, dim: int = 1) -> Tensor:
    """What `words` made of `count` codes a row (along `dim` 0: a column)."""
    if dim == 0:
        return from_words(packed.T, count).T.contiguous()
    whole = (packed[..., None].to(torch.int64) >> _places(packed)) & 15
    return (whole.flatten(1)[:, :count] - MIDDLE).to(torch.int8)


def pairs(codes: Tensor) -> Tensor:
    """Codes of 0 … 15, an even number → uint8 [half as many, 1]."""
    return halves(codes.flatten().to(torch.uint8), high=True)[:, None]


def halves(codes: Tensor, *, high: bool = False) -> Tensor:
    """uint8 [..., K] of 0 … 15, K even → [..., K / 2]: two and two in a byte, the first in its low half, or `high`."""
    first, second = codes[..., 0::2], codes[..., 1::2]
    return first << 4 | second if high else second << 4 | first


def from_pairs(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What `pairs` made of codes of this shape, int8."""
    flat = packed.flatten()
    return torch.stack([flat >> 4, flat & 15], 1).view(torch.int8).view(shape)


def _places(like: Tensor) -> Tensor:
    return 4 * torch.arange(IN_WORD, device=like.device)
