"""Attention in one launch on CUDA devices: the FlashAttentions, and FlexAttention with a pattern made without a mask.

What they take and what not is the rule's to know (`kernels.attention.choose`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor

BLOCK_SIZE = 128  # FlexAttention's, of queries and of keys


def flash(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    window_size: tuple[int, int],
    scale: float,
    dropout: float,
    softcap: float | None,
) -> Tensor:
    """q [B, H, T, D], k, v [B, G, T, D] whose rows, end to end, are cut at `bounds` int32 [n + 1] → [B, T, H, D].

    span: keys seen before and after a query's own, -1 for all.
    """
    rows = q.shape[0]
    q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (q, k, v))
    where = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    if backend == "flash_varlen":
        out = _torchs(q, k, v, where, window_size, scale)
    else:
        how: dict[str, Any] = {"softmax_scale": scale, "causal": window_size[1] == 0, "window_size": window_size}
        if softcap is not None:
            how["softcap"] = softcap
        if backend == "flash3":
            from flash_attn_interface import flash_attn_varlen_func  # type: ignore[import-not-found]
        else:
            from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

            how["dropout_p"] = dropout
        out = flash_attn_varlen_func(q, k, v, *where, **how)
        out = out[0] if isinstance(out, tuple) else out
    return out.unflatten(0, (rows, -1))


def _torchs(q: Tensor, k: Tensor, v: Tensor, where: tuple[Any, ...], span: tuple[int, int], scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    takes = _takes()
    how: dict[str, Any] = {"scale": scale}
    if "window_size" in takes:
        how["window_size"] = span
    else:
        how["is_causal"] = span[1] == 0
    if k.shape[1] != q.shape[1]:
        if "enable_gqa" in takes:
            how["enable_gqa"] = True
        else:
            k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
    out: Tensor = varlen_attn(q.contiguous(), k.contiguous(), v.contiguous(), *where, **how)  # type: ignore[assignment]
    return out


@cache
def _takes() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(signature(varlen_attn).parameters)


def flex(
    q: Tensor, k: Tensor, v: Tensor, block_mask: Any, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """q [B, H, T, D], k [B, G, T, D], v [B, G, T, E], a `pattern` of 1 or B rows → [B, T, H, E].

    With sinks, the share that they take is off every output: by the logarithm of the denominator, which is returned.
    """
    from torch.nn.attention.flex_attention import AuxRequest

    capped = None if softcap is None else _cap(softcap)
    grouped = q.shape[1] != k.shape[1]
    how: dict[str, Any] = {"score_mod": capped, "block_mask": block_mask, "scale": scale, "enable_gqa": grouped}
    if sinks is None:
        return _compiled()(q, k, v, **how).transpose(1, 2)
    out, extra = _compiled()(q, k, v, **how, return_aux=AuxRequest(lse=True))
    share = torch.sigmoid(extra.lse - sinks.to(extra.lse).view(1, -1, 1))
    return (out * share[..., None].to(out.dtype)).transpose(1, 2)


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


@cache
def _cap(softcap: float) -> Any:
    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def build_block_mask(
    lengths_by_row: Sequence[Sequence[int]], left_window: int | None, right_window: int | None, device: torch.device
) -> Any:
    """FlexAttention's BlockMask over rows of documents of so many tokens: every query sees a stretch of keys.

    Blocks are told apart by where these stretches begin and end, so nothing of the size [T, T] is made.
    """
    from torch.nn.attention.flex_attention import BlockMask

    firsts, ends = visible_key_ranges(lengths_by_row, left_window, right_window)
    some, some_count, whole, whole_count = (part.to(device) for part in _blocks(firsts, ends))
    firsts, ends = firsts.to(device), ends.to(device)

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= firsts[batch, query]) & (key < ends[batch, query])

    length = firsts.shape[1]
    return BlockMask.from_kv_blocks(
        some_count, some, whole_count, whole, BLOCK_SIZE=BLOCK_SIZE, mask_mod=seen, seq_lengths=(length, length)
    )


def visible_key_ranges(
    lengths_by_row: Sequence[Sequence[int]], left_window: int | None, right_window: int | None
) -> tuple[Tensor, Tensor]:
    """The first key that each query sees and the one after the last: int32 [B, T] each."""
    firsts, ends = [], []
    for lengths in lengths_by_row:
        counts = torch.tensor(list(lengths))
        last = counts.cumsum(0).repeat_interleave(counts)
        first = last - counts.repeat_interleave(counts)
        at = torch.arange(len(last))
        firsts.append(first if left_window is None else torch.maximum(first, at - left_window))
        ends.append(last if right_window is None else torch.minimum(last, at + right_window + 1))
    return torch.stack(firsts).int(), torch.stack(ends).int()


def _blocks(firsts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices of the blocks of keys that a block of queries sees in part, how many, and the same of whole ones.

    int32 [B, 1, N, N], [B, 1, N], [B, 1, N, N], [B, 1, N].
    """
    length = firsts.shape[1]
    count = -(-length // BLOCK_SIZE)
    begins = torch.arange(count) * BLOCK_SIZE
    lasts = (begins + BLOCK_SIZE).clamp(max=length) - 1
    # both bounds rise along a row, so a block's are those of its first and last query
    low, high = firsts[:, begins, None], ends[:, lasts, None]
    touched = (begins + BLOCK_SIZE > low) & (begins < high)
    whole = touched & (begins >= firsts[:, lasts, None]) & (begins + BLOCK_SIZE <= ends[:, begins, None])
    # a ragged last block of queries is never whole: its missing queries see nothing
    whole &= (lasts - begins == BLOCK_SIZE - 1)[None, :, None]
    made = []
    for chosen in (touched & ~whole, whole):
        made += [
            chosen.int().argsort(dim=-1, descending=True, stable=True).int()[:, None],
            chosen.sum(-1).int()[:, None],
        ]
    return made[0], made[1], made[2], made[3]
