"""Quantize a weight matrix to 4-bit NormalFloat, and pack it as bitsandbytes stores it.

Source: QLoRA, arXiv:2305.14314.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mowa.kernels.quant.int4_layout import pack_nibbles
from mowa.kernels.quant.weights import FP16_TINY, NF4_LEVELS, QuantizedWeight


def quantize_nf4(weight: Tensor, group_size: int = 64) -> QuantizedWeight:
    """Quantize W [N, K], any float dtype, to nf4. K must be a multiple of `group_size`: blocks do not cross rows."""
    blocks = weight.float().reshape(len(weight), -1, group_size)
    scale = blocks.abs().amax(-1).half().float().clamp(min=FP16_TINY)
    levels = torch.tensor(NF4_LEVELS, device=weight.device)
    midpoints = (levels[1:] + levels[:-1]) / 2
    indices = torch.bucketize(blocks / scale[..., None], midpoints)
    return QuantizedWeight(indices.reshape(weight.shape).to(torch.int8), scale, None, 4, group_size, "nf4")


def pack_bnb_4bit(qweight: Tensor) -> Tensor:
    """Pack indices 0 … 15 of any shape, an even number n of them, as bitsandbytes does → uint8 [n / 2, 1]."""
    return pack_nibbles(qweight.flatten().to(torch.uint8), high_nibble_first=True)[:, None]


def unpack_bnb_4bit(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo `pack_bnb_4bit` → int8 of `shape`."""
    flat = packed.flatten()
    return torch.stack([flat >> 4, flat & 15], 1).view(torch.int8).view(shape)
