"""Full attention of one sequence on a CPU, a few heads at a time so that the scores stay in its cache.

    o[t, h] = Σ_u softmax_u(q[t, h] · k[u, h] / √d) v[u, h]

Two oneDNN products are faster than torch's fused kernel, which multiplies small blocks one by one. In half precision
scores are rounded to it, as in transformers' eager attention: float32 scores would have a fifth of the error and take a
quarter longer.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_SCORE_BYTES = 4 << 20  # scores in memory at a time


def encoder_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, valid_length: int | None = None) -> Tensor:
    """Attend from every position to the first `valid_length` positions.

    Args:
        q: [T, H, D], any strides.
        k: [T, H, D], same dtype.
        v: [T, H, D], same dtype.
        scale: factor of q·k.
        valid_length: keys from here on are padding; None: all are valid.

    Returns:
        [T, H, D], contiguous.
    """
    length, heads, _ = q.shape
    valid_length = length if valid_length is None else valid_length
    q, k, v = (q * scale).transpose(0, 1), k.permute(1, 2, 0), v.transpose(0, 1)
    out = torch.empty(length, heads, v.shape[2], dtype=v.dtype)
    step = max(1, min(heads, MAX_SCORE_BYTES // (length * length * q.element_size())))
    scores = torch.empty(2, step, length, length, dtype=q.dtype)
    for first in range(0, heads, step):
        some = slice(first, min(first + step, heads))
        logits, weights = scores[:, : some.stop - first]
        torch.bmm(q[some], k[some], out=logits)
        if valid_length < length:
            logits[..., valid_length:] = -torch.inf
        torch.softmax(logits, -1, out=weights)
        out[:, some] = torch.bmm(weights, v[some]).transpose(0, 1)
    return out
