"""4-bit NormalFloat weights (QLoRA, arXiv:2305.14314)."""

from __future__ import annotations

import torch
from torch import Tensor

from mowa.kernels.quant.weights import FP16_TINY, NF4_LEVELS, QuantizedWeight


def quantize_nf4(weight: Tensor, group_size: int = 64) -> QuantizedWeight:
    """W [N, K] in nf4; K must be a multiple of `group`, as bitsandbytes lays blocks one after another."""
    blocks = weight.float().reshape(len(weight), -1, group_size)
    scales = blocks.abs().amax(-1).half().float().clamp(min=FP16_TINY)
    levels = torch.tensor(NF4_LEVELS, device=weight.device)
    between = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / scales[..., None], between)
    return QuantizedWeight(codes.reshape(weight.shape).to(torch.int8), scales, None, 4, group_size, "nf4")
