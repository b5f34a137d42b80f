"""GPTQ (arXiv:2210.17323): quantize column by column and propagate each column's rounding error to the remaining ones."""

from __future__ import annotations

import torch
from torch import Tensor

from mowa.kernels.quant.weights import FP32_TINY, QuantizedWeight, choose_qparams, join_zero_points, quantize_dequantize


def quantize_gptq(
    weight: Tensor, hessian: Tensor, bits: int, group_size: int = 0, *, symmetric: bool = True, damping: float = 0.01
) -> QuantizedWeight:
    """W [N, K] in integers, column after column, each error made good by the columns that are still wide.

    hessian float32 [K, K] = Σ x xᵀ over inputs x. GPTQ (arXiv:2210.17323): with U the upper Cholesky factor of the
    damped hessian's inverse, column k rounded to ŵ leaves e = (w - ŵ) / U[k, k], and w[j] -= e U[k, j] for j > k. What
    no input ever reached is rounded plainly.
    """
    weight, columns = weight.float().clone(), weight.shape[1]
    group_size = group_size or columns
    hessian = hessian.double().clone()
    diagonal = hessian.diagonal()
    importance = diagonal.float() / max(float(diagonal.mean()), FP32_TINY)
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True).float()
    codes = torch.empty_like(weight)
    scales: list[Tensor] = []
    zeros: list[Tensor | None] = []
    step: Tensor = weight.new_ones(len(weight), 1)
    zero: Tensor | None = None
    block = min(group_size, 128)
    for first in range(0, columns, block):
        last = min(first + block, columns)
        errors = weight.new_zeros(len(weight), last - first)
        for k in range(first, last):
            if k % group_size == 0:
                part = weight[:, k : k + group_size]
                step, zero = choose_qparams(part, bits, symmetric=symmetric, importance=importance[k : k + group_size])
                scales.append(step)
                zeros.append(zero)
            codes[:, k : k + 1], made = quantize_dequantize(weight[:, k : k + 1], step, zero, bits)
            error = (weight[:, k] - made[:, 0]) / upper[k, k]
            weight[:, k:last] -= error[:, None] * upper[k, k:last]
            errors[:, k - first] = error
        weight[:, last:] -= errors @ upper[first:last, last:]
    return QuantizedWeight(
        codes.to(torch.int8), torch.cat(scales, 1), None if symmetric else join_zero_points(zeros), bits, group_size
    )
