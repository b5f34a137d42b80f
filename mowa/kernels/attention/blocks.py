"""Attention that works on any device: one document at a time, and in blocks of queries where scores must be modified.

Scores are not saved: the backward pass recomputes them from the logarithm of the softmax's denominator, as
FlashAttention (arXiv:2205.14135) does. Used on CPUs, and for what a device's fused kernels do not support.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mowa.kernels.dropout import cpu_dropout

MAX_SCORES = 1 << 20  # attention scores in memory at a time, over all heads
MIN_BLOCK_QUERIES = 16  # queries per block, even if that exceeds MAX_SCORES


@dataclass(frozen=True, slots=True)
class ScoreParams:
    """How scores are computed, and which keys of a slice a query sees.

    Attributes:
        scale: factor of q·k.
        dropout: probability of dropping a weight.
        softcap: c of c · tanh(score / c), or None.
        left_window: number of keys visible before the query's own position; None: all.
        right_window: the same after it; 0: causal.
        query_offset: position of the first query among the keys.
    """

    scale: float
    dropout: float = 0.0
    softcap: float | None = None
    left_window: int | None = None
    right_window: int | None = None
    query_offset: int = 0


def band_mask(
    queries: int,
    keys: int,
    left_window: int | None,
    right_window: int | None,
    query_offset: int,
    device: torch.device | str,
) -> Tensor:
    """Return bool [queries, keys]: whether query i, at key position i + query_offset, sees each key."""
    query_positions = torch.arange(query_offset, query_offset + queries, device=device)
    distance = torch.arange(keys, device=device) - query_positions[:, None]
    visible = torch.ones_like(distance, dtype=torch.bool)
    if left_window is not None:
        visible &= distance >= -left_window
    if right_window is not None:
        visible &= distance <= right_window
    return visible


def attend_documents(
    q: Tensor, k: Tensor, v: Tensor, lengths_by_row: Sequence[Sequence[int]], params: ScoreParams, sinks: Tensor | None
) -> Tensor:
    """Attend within each document of packed rows.

    Args:
        q: [B, H, T, D].
        k: [B, G, T, D], G a divisor of H.
        v: [B, G, T, E].
        lengths_by_row: for each row, the lengths of its documents, which sum to T.
        params: how scores are computed.
        sinks: [H] or None.

    Returns:
        [B, T, H, E].
    """
    out = []
    for row, lengths in enumerate(lengths_by_row):
        split = [part[row : row + 1].split(list(lengths), dim=2) for part in (q, k, v)]
        documents = zip(split[0], split[1], split[2], strict=True)
        out.append(torch.cat([attend_slice(*document, params, sinks) for document in documents], dim=1))
    return out[0] if len(out) == 1 else torch.cat(out)


def attend_slice(
    q: Tensor, k: Tensor, v: Tensor, params: ScoreParams, sinks: Tensor | None, mask: Tensor | None = None
) -> Tensor:
    """Attend over one slice: q [B, H, Q, D], k [B, G, K, D], v [B, G, K, E] → [B, Q, H, E].

    mask: bool or additive, [B|1, H|1, Q, K]; given one, the windows of `params` are ignored.
    """
    if params.dropout and (q.device.type == "cpu" or params.softcap is not None or sinks is not None):
        return _attend_with_dropout(q, k, v, params, sinks, mask)
    queries, keys = q.shape[2], k.shape[2]
    unmodified = (
        params.softcap is None and sinks is None and mask is None and queries == keys and not params.query_offset
    )
    full_left = params.left_window is None or params.left_window >= keys - 1
    full_right = params.right_window is None or params.right_window >= keys - 1
    if unmodified and full_left and (full_right or params.right_window == 0):
        return sdpa(q, k, v, params.scale, params.dropout, is_causal=not full_right)
    if params.dropout:
        return _attend_with_dropout(q, k, v, params, sinks, mask)
    out: Tensor = _Blocks.apply(q, k, v, sinks, mask, params)
    return out.transpose(1, 2)


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    dropout: float,
    *,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """Call torch's scaled_dot_product_attention and return [B, Q, H, E].

    On CPUs the narrower of keys and values is zero-padded, as the fused kernel needs equal head sizes; on GPUs keys and
    values are repeated over grouped heads where the fused kernels do not support grouping.
    """
    heads, groups, width, v_width = q.shape[1], k.shape[1], q.shape[-1], v.shape[-1]
    if q.device.type == "cpu" and width != v_width:
        if v_width < width:
            v = F.pad(v, (0, width - v_width))
        else:
            q, k = F.pad(q, (0, v_width - width)), F.pad(k, (0, v_width - width))
    queries, grouped = q.shape[2], heads != groups
    if grouped and queries == 1 and not is_causal and (attn_mask is None or attn_mask.shape[1] == 1):
        q, grouped = q.reshape(len(q), groups, heads // groups, q.shape[-1]), False
    elif grouped and q.device.type != "cpu" and (attn_mask is not None or width != v_width or width > 256):
        k, v = (part.repeat_interleave(heads // groups, dim=1) for part in (k, v))
        grouped = False
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )
    return out.reshape(len(out), heads, queries, -1).transpose(1, 2)[..., :v_width]


def attention_weights(q: Tensor, k: Tensor, params: ScoreParams, sinks: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return softmax weights [B, H, Q, K] in q's dtype; where a bool mask hides every key of a query, zeros."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.transpose(-2, -1) * params.scale
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    if params.softcap is not None:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    if mask is None and (params.left_window is not None or params.right_window is not None):
        mask = band_mask(
            q.shape[2], k.shape[2], params.left_window, params.right_window, params.query_offset, q.device
        )[None, None]
    bool_mask = mask is not None and mask.dtype == torch.bool
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if bool_mask else scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : k.shape[2]]
    if bool_mask and mask is not None:
        weights = weights * mask.any(-1, keepdim=True)
    return weights.to(q.dtype)


def _attend_with_dropout(
    q: Tensor, k: Tensor, v: Tensor, params: ScoreParams, sinks: Tensor | None, mask: Tensor | None
) -> Tensor:
    weights = attention_weights(q, k, params, sinks, mask)
    dropped = cpu_dropout(weights, params.dropout) if q.device.type == "cpu" else F.dropout(weights, params.dropout)
    return (dropped @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)).transpose(1, 2)


class _Blocks(torch.autograd.Function):
    """Attention in blocks of queries: q [B, H, Q, D], k [B, G, K, D], v [B, G, K, E], sinks [H] → [B, H, Q, E]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask: Tensor | None, params: ScoreParams
    ) -> Tensor:
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)
        log_norm = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for queries, keys in _query_blocks(q, k, params):
            scores, _ = _scores(q, k, mask, params, queries, keys)
            high = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
            if sinks is not None:
                high = torch.maximum(high, sinks.to(scores).view(1, -1, 1, 1))
            weights = scores.sub_(high).exp_()
            norm = weights.sum(-1, keepdim=True)
            if sinks is not None:
                norm = norm + (sinks.to(scores).view(1, -1, 1, 1) - high).exp()
            norm = torch.where(norm > 0, norm, 1)
            out[:, :, queries] = _grouped_matmul(weights.div_(norm).to(v.dtype), v[:, :, keys])
            log_norm[:, :, queries] = (high + norm.log())[..., 0]
        ctx.save_for_backward(q, k, v, sinks, mask, out, log_norm)
        ctx.params = params
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        q, k, v, sinks, mask, out, log_norm = ctx.saved_tensors
        (gradient,), params, high_dtype = gradients, ctx.params, log_norm.dtype
        d_q = torch.zeros_like(q)
        d_k, d_v = (torch.zeros_like(part, dtype=high_dtype) for part in (k, v))
        d_sinks = None if sinks is None else torch.zeros_like(sinks, dtype=high_dtype)
        for queries, keys in _query_blocks(q, k, params):
            scores, slope = _scores(q, k, mask, params, queries, keys)
            lse, d_out = log_norm[:, :, queries, None], gradient[:, :, queries]
            weights = scores.sub_(lse).exp_()
            common = (d_out.to(high_dtype) * out[:, :, queries].to(high_dtype)).sum(-1, keepdim=True)
            if d_sinks is not None:
                d_sinks -= ((sinks.to(high_dtype).view(1, -1, 1, 1) - lse).exp() * common).sum((0, 2, 3))
            d_v[:, :, keys] += _sum_over_group(weights.to(v.dtype), d_out, v.shape[1])
            d_scores = _grouped_matmul(d_out, v[:, :, keys].transpose(-2, -1)).to(high_dtype).sub_(common).mul_(weights)
            if slope is not None:
                d_scores.mul_(slope)
            d_scores_low = d_scores.mul_(params.scale).to(q.dtype)
            d_q[:, :, queries] = _grouped_matmul(d_scores_low, k[:, :, keys])
            d_k[:, :, keys] += _sum_over_group(d_scores_low, q[:, :, queries], k.shape[1])
        d_sinks = None if d_sinks is None else d_sinks.to(sinks.dtype)
        return d_q, d_k.to(k.dtype), d_v.to(v.dtype), d_sinks, None, None


def _query_blocks(q: Tensor, k: Tensor, params: ScoreParams) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of queries, each with the keys that some query of it may see."""
    queries, keys, heads = q.shape[2], k.shape[2], q.shape[0] * q.shape[1]
    left, right, offset = params.left_window, params.right_window, params.query_offset
    visible = keys if left is None or right is None else min(keys, 2 * (left + right + 1))
    block = max(MIN_BLOCK_QUERIES, min(queries, MAX_SCORES // (heads * visible)))
    if left is not None and right is not None:  # a block as long as the window hides at most half of its scores
        block = min(block, max(64, left + right + 1))
    for first in range(0, queries, block):
        last = min(queries, first + block)
        begin = 0 if left is None else max(0, first + offset - left)
        end = keys if right is None else min(keys, last + offset + right)
        yield slice(first, last), slice(min(begin, keys - 1), max(end, min(begin, keys - 1) + 1))


def _scores(
    q: Tensor, k: Tensor, mask: Tensor | None, params: ScoreParams, queries: slice, keys: slice
) -> tuple[Tensor, Tensor | None]:
    """Return the scores of a block, [B, H, r, c] in float32 or wider, -inf where hidden, and the soft-cap's slope."""
    high_dtype = torch.promote_types(q.dtype, torch.float32)
    scores = _grouped_matmul(q[:, :, queries], k[:, :, keys].transpose(-2, -1)).to(high_dtype).mul_(params.scale)
    slope = None
    if (cap := params.softcap) is not None:
        tanh = scores.div_(cap).tanh_()
        slope = 1 - tanh.square()
        scores = tanh.mul_(cap)
    if mask is not None:
        part = mask[:, :, queries, keys]
        return (scores.masked_fill_(~part, -torch.inf) if part.dtype == torch.bool else scores + part), slope
    if params.left_window is not None or params.right_window is not None:
        offset = queries.start + params.query_offset - keys.start
        part = band_mask(scores.shape[2], scores.shape[3], params.left_window, params.right_window, offset, q.device)
        scores.masked_fill_(~part, -torch.inf)
    return scores, slope


def _grouped_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [B, H, r, x], b [B, G, x, y] → [B, H, r, y]; the heads of a group share one b."""
    batch, heads, rows, inner = a.shape
    groups = b.shape[1]
    return (a.reshape(batch, groups, -1, inner) @ b).view(batch, heads, rows, b.shape[-1])


def _sum_over_group(a: Tensor, b: Tensor, groups: int) -> Tensor:
    """a [B, H, r, c], b [B, H, r, y] → aᵀ b [B, G, c, y], summed over the heads of each group."""
    grouped_a, grouped_b = (part.reshape(part.shape[0], groups, -1, part.shape[-1]) for part in (a, b))
    return grouped_a.transpose(-2, -1) @ grouped_b
