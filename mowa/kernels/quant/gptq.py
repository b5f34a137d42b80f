"""Quantize a weight matrix by GPTQ: column by column, each rounding error compensated by the remaining columns.

Source: GPTQ, arXiv:2210.17323.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mowa.kernels.quant.weights import FP32_TINY, QuantizedWeight, choose_qparams, join_zero_points, quantize_dequantize

MAX_BLOCK_COLUMNS = 128  # columns between two updates of the whole remaining matrix


def quantize_gptq(
    weight: Tensor, hessian: Tensor, bits: int, group_size: int = 0, *, symmetric: bool = True, damping: float = 0.01
) -> QuantizedWeight:
    """Quantize W to integers so that W x changes little on the calibration inputs x.

    With U the upper Cholesky factor of the damped Hessian's inverse, rounding column k to ŵ leaves the error
    e = (w - ŵ) / U[k, k], and each later column j becomes w[j] - e U[k, j]. Columns whose input was always 0 are
    rounded to nearest.

    Args:
        weight: [N, K], any float dtype.
        hessian: float32 [K, K], Σ x xᵀ over calibration inputs x.
        bits: 4 or 8.
        group_size: columns that share a scale; 0: the whole row.
        symmetric: no zero points.
        damping: fraction of the mean of the Hessian's diagonal that is added to its diagonal.
    """
    weight, columns = weight.float().clone(), weight.shape[1]
    group_size = group_size or columns
    hessian = hessian.double().clone()
    diagonal = hessian.diagonal()
    importance = diagonal.float() / max(float(diagonal.mean()), FP32_TINY)
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True).float()
    qweight = torch.empty_like(weight)
    scales: list[Tensor] = []
    zero_points: list[Tensor | None] = []
    scale: Tensor = weight.new_ones(len(weight), 1)
    zero_point: Tensor | None = None
    block = min(group_size, MAX_BLOCK_COLUMNS)
    for first in range(0, columns, block):
        last = min(first + block, columns)
        errors = weight.new_zeros(len(weight), last - first)
        for k in range(first, last):
            if k % group_size == 0:
                group = slice(k, k + group_size)
                scale, zero_point = choose_qparams(
                    weight[:, group], bits, symmetric=symmetric, importance=importance[group]
                )
                scales.append(scale)
                zero_points.append(zero_point)
            column = weight[:, k : k + 1]
            qweight[:, k : k + 1], dequantized = quantize_dequantize(column, scale, zero_point, bits)
            error = (weight[:, k] - dequantized[:, 0]) / upper[k, k]
            weight[:, k:last] -= error[:, None] * upper[k, k:last]
            errors[:, k - first] = error
        weight[:, last:] -= errors @ upper[first:last, last:]
    return QuantizedWeight(
        qweight.to(torch.int8),
        torch.cat(scales, 1),
        None if symmetric else join_zero_points(zero_points),
        bits,
        group_size,
    )
