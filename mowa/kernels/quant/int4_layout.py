"""Pack 4-bit integers into larger words, in the layouts of compressed-tensors (int32) and ONNX (bytes)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

VALUES_PER_INT32 = 8
INT4_OFFSET = 8


def pack_to_int32(qweight: Tensor, dim: int = 1) -> Tensor:
    """Pack int8 [N, K] in -8 … 7 as compressed-tensors does → int32 [N, ⌈K / 8⌉], or [⌈N / 8⌉, K] along `dim` 0.

    Values are stored with an offset of 8, the first one in the lowest bits; unused bits of the last word are 0.
    """
    if dim == 0:
        return pack_to_int32(qweight.T).T.contiguous()
    padding = -qweight.shape[1] % VALUES_PER_INT32
    words = functional.pad(qweight.to(torch.int64) + INT4_OFFSET, (0, padding)).unflatten(1, (-1, VALUES_PER_INT32))
    return (words << _bit_offsets(qweight)).sum(-1).to(torch.int32)  # int64, as the last value may set the sign bit


def unpack_from_int32(packed: Tensor, num_values: int, dim: int = 1) -> Tensor:
    """Undo `pack_to_int32` → int8 [N, num_values], or [num_values, K] along `dim` 0."""
    if dim == 0:
        return unpack_from_int32(packed.T, num_values).T.contiguous()
    values = (packed[..., None].to(torch.int64) >> _bit_offsets(packed)) & 15
    return (values.flatten(1)[:, :num_values] - INT4_OFFSET).to(torch.int8)


def pack_nibbles(qweight: Tensor, *, high_nibble_first: bool = False) -> Tensor:
    """Pack pairs of uint8 [..., K] in 0 … 15, K even → [..., K / 2]; by default the first in the low nibble."""
    first, second = qweight[..., 0::2], qweight[..., 1::2]
    return first << 4 | second if high_nibble_first else second << 4 | first


def _bit_offsets(like: Tensor) -> Tensor:
    return 4 * torch.arange(VALUES_PER_INT32, device=like.device)
