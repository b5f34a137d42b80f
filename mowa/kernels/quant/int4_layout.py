"""Codes of four bits in fewer bytes, as two kinds of files lay them out. It knows tensors and no files.

- words, as compressed-tensors has them: eight codes of a row (or a column) in an int32, each 8 higher than it is, the
  first in the lowest bits; what is missing in the last word is 0.
- pairs, as bitsandbytes has them: two codes of the flattened matrix in a byte, the first in its high half.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

VALUES_PER_INT32 = 8
INT4_OFFSET = 8


def pack_to_int32(qweight: Tensor, dim: int = 1) -> Tensor:
    """int8 [N, K] of -8 … 7 → int32 [N, ⌈K / 8⌉]; along `dim` 0: [⌈N / 8⌉, K]."""
    if dim == 0:
        return pack_to_int32(qweight.T).T.contiguous()
    spare = -qweight.shape[1] % VALUES_PER_INT32
    whole = functional.pad(qweight.to(torch.int64) + INT4_OFFSET, (0, spare)).unflatten(1, (-1, VALUES_PER_INT32))
    return (whole << _places(qweight)).sum(-1).to(torch.int32)  # the last code may reach the sign: int64 wraps to it


def unpack_from_int32(packed: Tensor, num_values: int, dim: int = 1) -> Tensor:
    """What `words` made of `count` codes a row (along `dim` 0: a column)."""
    if dim == 0:
        return unpack_from_int32(packed.T, num_values).T.contiguous()
    whole = (packed[..., None].to(torch.int64) >> _places(packed)) & 15
    return (whole.flatten(1)[:, :num_values] - INT4_OFFSET).to(torch.int8)


def pack_bnb_4bit(qweight: Tensor) -> Tensor:
    """Codes of 0 … 15, an even number → uint8 [half as many, 1]."""
    return pack_nibbles(qweight.flatten().to(torch.uint8), high_nibble_first=True)[:, None]


def pack_nibbles(qweight: Tensor, *, high_nibble_first: bool = False) -> Tensor:
    """uint8 [..., K] of 0 … 15, K even → [..., K / 2]: two and two in a byte, the first in its low half, or `high`."""
    first, second = qweight[..., 0::2], qweight[..., 1::2]
    return first << 4 | second if high_nibble_first else second << 4 | first


def unpack_bnb_4bit(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What `pairs` made of codes of this shape, int8."""
    flat = packed.flatten()
    return torch.stack([flat >> 4, flat & 15], 1).view(torch.int8).view(shape)


def _places(like: Tensor) -> Tensor:
    return 4 * torch.arange(VALUES_PER_INT32, device=like.device)
