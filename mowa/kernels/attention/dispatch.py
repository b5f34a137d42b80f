"""Attention: what a query may see, said without a dense mask where that can be, and by which of several ways it is met.

    out[t] = Σ_u p[t, u] v[u],   p[t, u] = exp s[t, u] / (exp sink + Σ_w exp s[t, w]),   u, w over what t may see
    s[t, u] = softcap · tanh(scale · q[t]·k[u] / softcap)        (without a soft-cap: scale · q[t]·k[u]; sinks are rare)

`choose` is the rule, and knows facts only; `attend` asks it and obeys. Which layer of which model wants what is not
known here. Soft-caps: arXiv:2408.00118; sinks: arXiv:2309.17453; windows: arXiv:2004.05150; flash: arXiv:2205.14135.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from mowa.kernels.attention import blocks, cuda
from mowa.kernels.attention.blocks import band_mask
from mowa.kernels.attention.rules import AttentionSpec, available_packages, select_backend
from mowa.kernels.attention.varlen import PackedSequences


@dataclass(frozen=True)
class AttentionMask:
    """What a query may see. Query i stands at key i + `offset`, and sees `before` keys back and `after` on (None: all).

    Causal is after=0; a window of n keys, the query's own among them, is before=n-1, after=0.
    documents: for each row of the batch, what lies end to end in it; nobody sees beyond their own. Padding at either
    end of a row may be one more document. padding bool [B, K]: False is not seen. dense, bool (True is seen) or float
    (added to the scores) [B|1, H|1, Q, K]: says all there is to say, and stands alone.
    """

    left_window: int | None = None
    right_window: int | None = None
    query_offset: int = 0
    documents: tuple[PackedSequences, ...] | None = None
    padding_mask: Tensor | None = None
    dense_mask: Tensor | None = None
    _made: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    @cached_property
    def flat_documents(self) -> PackedSequences:
        """The documents of all rows, one row after the other."""
        return PackedSequences(tuple(length for row in self.documents or () for length in row.lengths))

    def to_dense(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """All of it as one tensor [B|1, H|1, Q, K], made once; what `dense` is, or bool."""
        if self.dense_mask is not None:
            return self.dense_mask
        known = (queries, keys, device)
        if known not in self._made:
            made = band_mask(queries, keys, self.left_window, self.right_window, self.query_offset, device)[None, None]
            if self.documents is not None:
                rows = (torch.arange(len(row.lengths), device=device) for row in self.documents)
                lengths = (torch.tensor(row.lengths, device=device) for row in self.documents)
                owner = torch.stack([a.repeat_interleave(n) for a, n in zip(rows, lengths, strict=True)])
                made = made & (owner[:, None, :, None] == owner[:, None, None, :])
            if self.padding_mask is not None:
                made = made & self.padding_mask[:, None, None, :]
            self._made[known] = made
        out: Tensor = self._made[known]
        return out


CAUSAL = AttentionMask(right_window=0)
FULL = AttentionMask()


def padding_to_documents(mask: AttentionMask, padding_mask: Tensor) -> AttentionMask:
    """`mask` over rows of which `padding` bool [B, T] says what is true; queries are T too, and begin at key 0.

    Rows that are true in one stretch become documents, the padding beside them one more each; others keep `padding`.
    """
    steps = padding_mask.int().diff(dim=1).ne(0).sum(1)
    begins, counts = padding_mask.int().argmax(1), padding_mask.sum(1)
    told = torch.stack([steps, begins, counts, padding_mask[:, 0].int() + padding_mask[:, -1].int()]).T.tolist()
    if all(count == padding_mask.shape[1] for _, _, count, _ in told):
        return mask
    if any(count == 0 or steps > 2 or (steps == 2 and ends) for steps, _, count, ends in told):
        return replace(mask, padding_mask=padding_mask)
    rows = ((begin, count, padding_mask.shape[1] - begin - count) for _, begin, count, _ in told)
    return replace(mask, documents=tuple(PackedSequences(tuple(n for n in row if n)) for row in rows))


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def derive_spec(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, dropout: float, softcap: float | None, sinks: bool
) -> AttentionSpec:
    """The facts of one call of `attend`."""
    queries, keys = q.shape[2], k.shape[2]
    longest = keys if mask.documents is None else max(mask.flat_documents.lengths)
    windowed = (mask.left_window is not None and mask.left_window < longest - 1) or (
        mask.right_window is not None and 0 < mask.right_window < longest - 1
    )
    return AttentionSpec(
        device=q.device.type,
        dtype=str(q.dtype).removeprefix("torch."),
        head_dim=q.shape[-1],
        v_head_dim=v.shape[-1],
        q_len=queries,
        kv_len=keys,
        documents=mask.documents is not None,
        windowed=windowed,
        causal=mask.right_window == 0,
        has_dense_mask=mask.dense_mask is not None or mask.padding_mask is not None,
        softcap=softcap is not None,
        sinks=sinks,
        dropout=bool(dropout),
        requires_grad=torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
        capability=_capability(q.device),
        packages=available_packages(),
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    *,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """q [B, H, Q, D], k [B, G, K, D], v [B, G, K, E] of one float dtype, G a divisor of H → [B, Q, H, E] in it.

    sinks [H]: a logit per head that joins the softmax and brings no value. A query that sees nothing gets zeros.
    Documents never mix: what one holds does not move another's outputs by a bit.
    """
    way = select_backend(derive_spec(q, k, v, mask, dropout, softcap, sinks is not None)).backend
    if way in ("flash3", "flash2", "flash_varlen"):
        rows = (
            mask if mask.documents is not None else replace(mask, documents=(PackedSequences((q.shape[2],)),) * len(q))
        )
        bounds, longest = rows.flat_documents.cu_seqlens(q.device), max(rows.flat_documents.lengths)
        span = (
            -1 if mask.left_window is None else mask.left_window,
            -1 if mask.right_window is None else mask.right_window,
        )
        return cuda.flash(way, q, k, v, bounds, longest, span, scale, dropout, softcap)
    if way == "flex":
        return cuda.flex(q, k, v, _pattern(q, mask), scale, softcap, sinks)
    if way == "sdpa":
        return _in_one_call(q, k, v, mask, scale, dropout)
    settings = blocks.ScoreParams(scale, dropout, softcap, mask.left_window, mask.right_window)
    if mask.documents is None:
        shown = (
            mask.to_dense(q.shape[2], k.shape[2], q.device)
            if mask.dense_mask is not None or mask.padding_mask is not None
            else None
        )
        return blocks.attend_slice(q, k, v, replace(settings, query_offset=mask.query_offset), sinks, shown)
    return blocks.attend_documents(q, k, v, tuple(row.lengths for row in mask.documents), settings, sinks)


def attention_weights(
    q: Tensor, k: Tensor, dense_mask: Tensor, *, scale: float, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """p [B, H, Q, K], for people to look at; `seen` as `Mask.seen` has it."""
    return blocks.attention_weights(q, k, blocks.ScoreParams(scale, softcap=softcap), sinks, dense_mask)


def _pattern(q: Tensor, mask: AttentionMask) -> Any:
    """The mask as FlexAttention has it, made once."""
    known = ("flex", q.shape[2], q.device)
    if known not in mask._made:
        lengths = [row.lengths for row in mask.documents] if mask.documents is not None else [(q.shape[2],)]
        mask._made[known] = cuda.build_block_mask(lengths, mask.left_window, mask.right_window, q.device)
    return mask._made[known]


def _in_one_call(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, dropout: float) -> Tensor:
    """torch's own, over the keys that anybody sees, and without a mask where what is left needs none."""
    queries, keys = q.shape[2], k.shape[2]
    if mask.dense_mask is not None or mask.padding_mask is not None:
        return blocks.sdpa(q, k, v, scale, dropout, attn_mask=mask.to_dense(queries, keys, q.device))
    first = 0 if mask.left_window is None else max(0, mask.query_offset - mask.left_window)
    last = keys if mask.right_window is None else min(keys, mask.query_offset + queries + mask.right_window)
    k, v, left = k[:, :, first:last], v[:, :, first:last], replace(mask, query_offset=mask.query_offset - first)
    everything = (mask.left_window is None or left.query_offset + queries - 1 <= mask.left_window) and (
        mask.right_window is None or last - first - 1 - left.query_offset <= mask.right_window
    )
    if everything or queries == 1:
        return blocks.sdpa(q, k, v, scale, dropout)
    if mask.right_window == 0 and left.query_offset == 0 and queries == last - first:
        return blocks.sdpa(q, k, v, scale, dropout, is_causal=True)
    return blocks.sdpa(q, k, v, scale, dropout, attn_mask=left.to_dense(queries, last - first, q.device))
