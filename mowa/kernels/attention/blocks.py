"""Attention over slices: each document by itself, and a block of queries at a time where scores have to be touched.

Scores are never kept: going back they are made again from the logarithm of the softmax's denominator, as FlashAttention
(arXiv:2205.14135) does. For processors, and whatever the fused kernels of a device do not take.
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

MAX_SCORES = 1 << 20  # how many are there at a time, in all heads
MIN_BLOCK_QUERIES = 16  # queries in a block, whatever that comes to


@dataclass(frozen=True, slots=True)
class ScoreParams:
    """How scores are made, and what a query sees of a slice: `before` keys back, `after` on (None: all)."""

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
    """bool [queries, keys]: whether query i, which stands at key i + offset, sees a key."""
    apart = (
        torch.arange(keys, device=device) - torch.arange(query_offset, query_offset + queries, device=device)[:, None]
    )
    seen = torch.ones_like(apart, dtype=torch.bool)
    if left_window is not None:
        seen &= apart >= -left_window
    if right_window is not None:
        seen &= apart <= right_window
    return seen


def attend_documents(
    q: Tensor, k: Tensor, v: Tensor, lengths_by_row: Sequence[Sequence[int]], params: ScoreParams, sinks: Tensor | None
) -> Tensor:
    """Documents of so many tokens, end to end in every row, each by itself: q [B, H, T, D], … → [B, T, H, E]."""
    done = []
    for row, lengths in enumerate(lengths_by_row):
        cut = [part[row : row + 1].split(list(lengths), dim=2) for part in (q, k, v)]
        of_row = zip(cut[0], cut[1], cut[2], strict=True)
        done.append(torch.cat([attend_slice(a, b, c, params, sinks) for a, b, c in of_row], dim=1))
    return done[0] if len(done) == 1 else torch.cat(done)


def attend_slice(
    q: Tensor, k: Tensor, v: Tensor, params: ScoreParams, sinks: Tensor | None, mask: Tensor | None = None
) -> Tensor:
    """One slice: q [B, H, Q, D], k [B, G, K, D], v [B, G, K, E] → [B, Q, H, E]. shown: a mask that says everything."""
    if params.dropout and (q.device.type == "cpu" or params.softcap is not None or sinks is not None):
        return _dropping(q, k, v, params, sinks, mask)
    queries, keys = q.shape[2], k.shape[2]
    bare = params.softcap is None and sinks is None and mask is None and queries == keys and not params.query_offset
    reaches_back = params.left_window is None or params.left_window >= keys - 1
    reaches_on = params.right_window is None or params.right_window >= keys - 1
    if bare and reaches_back and (reaches_on or params.right_window == 0):
        return sdpa(q, k, v, params.scale, params.dropout, is_causal=not reaches_on)
    if params.dropout:
        return _dropping(q, k, v, params, sinks, mask)
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
    """torch's own → [B, Q, H, E]. Where its kernels want keys as wide as values, the narrower get zeros."""
    heads, groups, width, values = q.shape[1], k.shape[1], q.shape[-1], v.shape[-1]
    if q.device.type == "cpu" and width != values:
        if values < width:
            v = F.pad(v, (0, width - values))
        else:
            q, k = F.pad(q, (0, values - width)), F.pad(k, (0, values - width))
    queries, grouped = q.shape[2], heads != groups
    if grouped and queries == 1 and not is_causal and (attn_mask is None or attn_mask.shape[1] == 1):
        q, grouped = q.reshape(len(q), groups, heads // groups, q.shape[-1]), False
    elif grouped and q.device.type != "cpu" and (attn_mask is not None or width != values or width > 256):
        k, v = (part.repeat_interleave(heads // groups, dim=1) for part in (k, v))
        grouped = False
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )
    return out.reshape(len(out), heads, queries, -1).transpose(1, 2)[..., :values]


def attention_weights(q: Tensor, k: Tensor, params: ScoreParams, sinks: Tensor | None, mask: Tensor | None) -> Tensor:
    """The softmax written out, [B, H, Q, K] in q's dtype; zeros for a query that a bool mask lets see nothing."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.transpose(-2, -1) * params.scale
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    if params.softcap is not None:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    if mask is None and (params.left_window is not None or params.right_window is not None):
        mask = band_mask(
            q.shape[2], k.shape[2], params.left_window, params.right_window, params.query_offset, q.device
        )[None, None]
    hides = mask is not None and mask.dtype == torch.bool
    if mask is not None:
        least = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, least) if hides else scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : k.shape[2]]
    if hides and mask is not None:
        weights = weights * mask.any(-1, keepdim=True)
    return weights.to(q.dtype)


def _dropping(
    q: Tensor, k: Tensor, v: Tensor, settings: ScoreParams, sinks: Tensor | None, shown: Tensor | None
) -> Tensor:
    weights = attention_weights(q, k, settings, sinks, shown)
    dropped = cpu_dropout(weights, settings.dropout) if q.device.type == "cpu" else F.dropout(weights, settings.dropout)
    return (dropped @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)).transpose(1, 2)


class _Blocks(torch.autograd.Function):
    """[B, H, Q, E] of q [B, H, Q, D], k [B, G, K, D], v [B, G, K, E], sinks [H], a mask [B|1, H|1, Q, K], settings."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, shown: Tensor | None, settings: ScoreParams
    ) -> Tensor:
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)
        total = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for mine, theirs in _spans(q, k, settings):
            scores, _ = _scores(q, k, shown, settings, mine, theirs)
            high = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
            if sinks is not None:
                high = torch.maximum(high, sinks.to(scores).view(1, -1, 1, 1))
            weights = scores.sub_(high).exp_()
            norm = weights.sum(-1, keepdim=True)
            if sinks is not None:
                norm = norm + (sinks.to(scores).view(1, -1, 1, 1) - high).exp()
            kept = torch.where(norm > 0, norm, 1)
            out[:, :, mine] = _times(weights.div_(kept).to(v.dtype), v[:, :, theirs])
            total[:, :, mine] = (high + kept.log())[..., 0]
        ctx.save_for_backward(q, k, v, sinks, shown, out, total)
        ctx.settings = settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        q, k, v, sinks, shown, out, total = ctx.saved_tensors
        (gradient,), settings, wide = gradients, ctx.settings, total.dtype
        d_q = torch.zeros_like(q)
        d_k, d_v = (torch.zeros_like(part, dtype=wide) for part in (k, v))
        d_sinks = None if sinks is None else torch.zeros_like(sinks, dtype=wide)
        for mine, theirs in _spans(q, k, settings):
            scores, slope = _scores(q, k, shown, settings, mine, theirs)
            level, mass = total[:, :, mine, None], gradient[:, :, mine]
            weights = scores.sub_(level).exp_()
            common = (mass.to(wide) * out[:, :, mine].to(wide)).sum(-1, keepdim=True)
            if d_sinks is not None:
                d_sinks -= ((sinks.to(wide).view(1, -1, 1, 1) - level).exp() * common).sum((0, 2, 3))
            d_v[:, :, theirs] += _gathered(weights.to(v.dtype), mass, v.shape[1])
            d_scores = _times(mass, v[:, :, theirs].transpose(-2, -1)).to(wide).sub_(common).mul_(weights)
            if slope is not None:
                d_scores.mul_(slope)
            narrow = d_scores.mul_(settings.scale).to(q.dtype)
            d_q[:, :, mine] = _times(narrow, k[:, :, theirs])
            d_k[:, :, theirs] += _gathered(narrow, q[:, :, mine], k.shape[1])
        d_sinks = None if d_sinks is None else d_sinks.to(sinks.dtype)
        return d_q, d_k.to(k.dtype), d_v.to(v.dtype), d_sinks, None, None


def _spans(q: Tensor, k: Tensor, settings: ScoreParams) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, and the keys that somebody in each may see."""
    queries, keys, heads = q.shape[2], k.shape[2], q.shape[0] * q.shape[1]
    back, on, offset = settings.left_window, settings.right_window, settings.query_offset
    reach = keys if back is None or on is None else min(keys, 2 * (back + on + 1))
    block = max(MIN_BLOCK_QUERIES, min(queries, MAX_SCORES // (heads * reach)))
    if back is not None and on is not None:  # a block as long as the window wastes half of its scores, no more
        block = min(block, max(64, back + on + 1))
    for first in range(0, queries, block):
        last = min(queries, first + block)
        begin = 0 if back is None else max(0, first + offset - back)
        end = keys if on is None else min(keys, last + offset + on)
        yield slice(first, last), slice(min(begin, keys - 1), max(end, min(begin, keys - 1) + 1))


def _scores(
    q: Tensor, k: Tensor, shown: Tensor | None, settings: ScoreParams, mine: slice, theirs: slice
) -> tuple[Tensor, Tensor | None]:
    """[B, H, r, c] in float32 or wider, -inf where nothing is seen; and the soft-cap's slope there."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = _times(q[:, :, mine], k[:, :, theirs].transpose(-2, -1)).to(wide).mul_(settings.scale)
    slope = None
    if (cap := settings.softcap) is not None:
        turned = scores.div_(cap).tanh_()
        slope = 1 - turned.square()
        scores = turned.mul_(cap)
    if shown is not None:
        part = shown[:, :, mine, theirs]
        return (scores.masked_fill_(~part, -torch.inf) if part.dtype == torch.bool else scores + part), slope
    if settings.left_window is not None or settings.right_window is not None:
        offset = mine.start + settings.query_offset - theirs.start
        part = band_mask(
            scores.shape[2], scores.shape[3], settings.left_window, settings.right_window, offset, q.device
        )
        scores.masked_fill_(~part, -torch.inf)
    return scores, slope


def _times(a: Tensor, b: Tensor) -> Tensor:
    """a [B, H, r, x], b [B, G, x, y] → [B, H, r, y]: each group of heads shares one b."""
    batch, heads, rows, inner = a.shape
    groups = b.shape[1]
    return (a.reshape(batch, groups, -1, inner) @ b).view(batch, heads, rows, b.shape[-1])


def _gathered(a: Tensor, b: Tensor, groups: int) -> Tensor:
    """a [B, H, r, c], b [B, H, r, y] → aᵀ b [B, G, c, y], summed over the heads of each group."""
    wide_a, wide_b = (part.reshape(part.shape[0], groups, -1, part.shape[-1]) for part in (a, b))
    return wide_a.transpose(-2, -1) @ wide_b
