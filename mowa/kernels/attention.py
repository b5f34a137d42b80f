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

from mowa.kernels import attention_blocks, attention_cuda
from mowa.kernels.attention_blocks import band
from mowa.kernels.attention_rules import Facts, choose, has
from mowa.kernels.segments import Segments


@dataclass(frozen=True)
class Mask:
    """What a query may see. Query i stands at key i + `offset`, and sees `before` keys back and `after` on (None: all).

    Causal is after=0; a window of n keys, the query's own among them, is before=n-1, after=0.
    documents: for each row of the batch, what lies end to end in it; nobody sees beyond their own. Padding at either
    end of a row may be one more document. padding bool [B, K]: False is not seen. dense, bool (True is seen) or float
    (added to the scores) [B|1, H|1, Q, K]: says all there is to say, and stands alone.
    """

    before: int | None = None
    after: int | None = None
    offset: int = 0
    documents: tuple[Segments, ...] | None = None
    padding: Tensor | None = None
    dense: Tensor | None = None
    _made: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    @cached_property
    def whole(self) -> Segments:
        """The documents of all rows, one row after the other."""
        return Segments(tuple(length for row in self.documents or () for length in row.lengths))

    def seen(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """All of it as one tensor [B|1, H|1, Q, K], made once; what `dense` is, or bool."""
        if self.dense is not None:
            return self.dense
        known = (queries, keys, device)
        if known not in self._made:
            made = band(queries, keys, self.before, self.after, self.offset, device)[None, None]
            if self.documents is not None:
                rows = (torch.arange(len(row.lengths), device=device) for row in self.documents)
                lengths = (torch.tensor(row.lengths, device=device) for row in self.documents)
                owner = torch.stack([a.repeat_interleave(n) for a, n in zip(rows, lengths, strict=True)])
                made = made & (owner[:, None, :, None] == owner[:, None, None, :])
            if self.padding is not None:
                made = made & self.padding[:, None, None, :]
            self._made[known] = made
        out: Tensor = self._made[known]
        return out


CAUSAL = Mask(after=0)
FULL = Mask()


def without_padding(mask: Mask, padding: Tensor) -> Mask:
    """`mask` over rows of which `padding` bool [B, T] says what is true; queries are T too, and begin at key 0.

    Rows that are true in one stretch become documents, the padding beside them one more each; others keep `padding`.
    """
    steps = padding.int().diff(dim=1).ne(0).sum(1)
    begins, counts = padding.int().argmax(1), padding.sum(1)
    told = torch.stack([steps, begins, counts, padding[:, 0].int() + padding[:, -1].int()]).T.tolist()
    if all(count == padding.shape[1] for _, _, count, _ in told):
        return mask
    if any(count == 0 or steps > 2 or (steps == 2 and ends) for steps, _, count, ends in told):
        return replace(mask, padding=padding)
    rows = ((begin, count, padding.shape[1] - begin - count) for _, begin, count, _ in told)
    return replace(mask, documents=tuple(Segments(tuple(n for n in row if n)) for row in rows))


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def facts_of(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: float, softcap: float | None, sinks: bool) -> Facts:
    """The facts of one call of `attend`."""
    queries, keys = q.shape[2], k.shape[2]
    longest = keys if mask.documents is None else max(mask.whole.lengths)
    windowed = (mask.before is not None and mask.before < longest - 1) or (
        mask.after is not None and 0 < mask.after < longest - 1
    )
    return Facts(
        device=q.device.type,
        dtype=str(q.dtype).removeprefix("torch."),
        width=q.shape[-1],
        value_width=v.shape[-1],
        queries=queries,
        keys=keys,
        documents=mask.documents is not None,
        windowed=windowed,
        causal=mask.after == 0,
        masked=mask.dense is not None or mask.padding is not None,
        softcap=softcap is not None,
        sinks=sinks,
        dropout=bool(dropout),
        grad=torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
        capability=_capability(q.device),
        packages=has(),
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
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
    way = choose(facts_of(q, k, v, mask, dropout, softcap, sinks is not None)).name
    if way in ("flash3", "flash2", "flash_varlen"):
        rows = mask if mask.documents is not None else replace(mask, documents=(Segments((q.shape[2],)),) * len(q))
        bounds, longest = rows.whole.bounds(q.device), max(rows.whole.lengths)
        span = (-1 if mask.before is None else mask.before, -1 if mask.after is None else mask.after)
        return attention_cuda.flash(way, q, k, v, bounds, longest, span, scale, dropout, softcap)
    if way == "flex":
        return attention_cuda.flex(q, k, v, _pattern(q, mask), scale, softcap, sinks)
    if way == "sdpa":
        return _in_one_call(q, k, v, mask, scale, dropout)
    settings = attention_blocks.Settings(scale, dropout, softcap, mask.before, mask.after)
    if mask.documents is None:
        shown = (
            mask.seen(q.shape[2], k.shape[2], q.device) if mask.dense is not None or mask.padding is not None else None
        )
        return attention_blocks.one(q, k, v, replace(settings, offset=mask.offset), sinks, shown)
    return attention_blocks.each(q, k, v, tuple(row.lengths for row in mask.documents), settings, sinks)


def weigh(
    q: Tensor, k: Tensor, seen: Tensor, *, scale: float, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """p [B, H, Q, K], for people to look at; `seen` as `Mask.seen` has it."""
    return attention_blocks.weigh(q, k, attention_blocks.Settings(scale, softcap=softcap), sinks, seen)


def _pattern(q: Tensor, mask: Mask) -> Any:
    """The mask as FlexAttention has it, made once."""
    known = ("flex", q.shape[2], q.device)
    if known not in mask._made:
        lengths = [row.lengths for row in mask.documents] if mask.documents is not None else [(q.shape[2],)]
        mask._made[known] = attention_cuda.pattern(lengths, mask.before, mask.after, q.device)
    return mask._made[known]


def _in_one_call(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float) -> Tensor:
    """torch's own, over the keys that anybody sees, and without a mask where what is left needs none."""
    queries, keys = q.shape[2], k.shape[2]
    if mask.dense is not None or mask.padding is not None:
        return attention_blocks.sdpa(q, k, v, scale, dropout, seen=mask.seen(queries, keys, q.device))
    first = 0 if mask.before is None else max(0, mask.offset - mask.before)
    last = keys if mask.after is None else min(keys, mask.offset + queries + mask.after)
    k, v, left = k[:, :, first:last], v[:, :, first:last], replace(mask, offset=mask.offset - first)
    everything = (mask.before is None or left.offset + queries - 1 <= mask.before) and (
        mask.after is None or last - first - 1 - left.offset <= mask.after
    )
    if everything or queries == 1:
        return attention_blocks.sdpa(q, k, v, scale, dropout)
    if mask.after == 0 and left.offset == 0 and queries == last - first:
        return attention_blocks.sdpa(q, k, v, scale, dropout, causal=True)
    return attention_blocks.sdpa(q, k, v, scale, dropout, seen=left.seen(queries, last - first, q.device))
