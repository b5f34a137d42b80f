"""Attention on CUDA devices in one kernel launch: FlashAttention 2 and 3, and FlexAttention without a dense mask.

Which cases each of them supports is decided in `rules`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor

BLOCK_SIZE = 128  # of FlexAttention, for queries and keys


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
    """Call a FlashAttention over packed rows.

    Args:
        backend: flash3, flash2 or flash_varlen (torch's own).
        q: [B, H, T, D] in half precision.
        k: [B, G, T, D].
        v: [B, G, T, D].
        cu_seqlens: int32 [n + 1], boundaries of the documents in the rows concatenated.
        max_seqlen: length of the longest document.
        window_size: keys visible before and after a query's position; -1: all.
        scale: factor of q·k.
        dropout: for flash2 only.
        softcap: not for flash_varlen.

    Returns:
        [B, T, H, D].
    """
    rows = q.shape[0]
    q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (q, k, v))
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    if backend == "flash_varlen":
        out = _torch_varlen(q, k, v, lengths, window_size, scale)
    else:
        kwargs: dict[str, Any] = {"softmax_scale": scale, "causal": window_size[1] == 0, "window_size": window_size}
        if softcap is not None:
            kwargs["softcap"] = softcap
        if backend == "flash3":
            from flash_attn_interface import flash_attn_varlen_func  # type: ignore[import-not-found]
        else:
            from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

            kwargs["dropout_p"] = dropout
        out = flash_attn_varlen_func(q, k, v, *lengths, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
    return out.unflatten(0, (rows, -1))


def _torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[Any, ...], window_size: tuple[int, int], scale: float
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    supported = _varlen_parameters()
    kwargs: dict[str, Any] = {"scale": scale}
    if "window_size" in supported:
        kwargs["window_size"] = window_size
    else:
        kwargs["is_causal"] = window_size[1] == 0
    if k.shape[1] != q.shape[1]:
        if "enable_gqa" in supported:
            kwargs["enable_gqa"] = True
        else:
            k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
    out: Tensor = varlen_attn(q.contiguous(), k.contiguous(), v.contiguous(), *lengths, **kwargs)  # type: ignore[assignment]
    return out


@cache
def _varlen_parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(signature(varlen_attn).parameters)


def flex(
    q: Tensor, k: Tensor, v: Tensor, block_mask: Any, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Call FlexAttention: q [B, H, T, D], k [B, G, T, D], v [B, G, T, E] → [B, T, H, E].

    block_mask is from `build_block_mask`, for 1 or B rows. With sinks, each output is scaled by the probability that
    the sink does not take, from the returned logarithm of the denominator.
    """
    from torch.nn.attention.flex_attention import AuxRequest

    score_mod = None if softcap is None else _cap(softcap)
    grouped = q.shape[1] != k.shape[1]
    kwargs: dict[str, Any] = {"score_mod": score_mod, "block_mask": block_mask, "scale": scale, "enable_gqa": grouped}
    if sinks is None:
        return _compiled()(q, k, v, **kwargs).transpose(1, 2)
    out, extra = _compiled()(q, k, v, **kwargs, return_aux=AuxRequest(lse=True))
    kept = torch.sigmoid(extra.lse - sinks.to(extra.lse).view(1, -1, 1))
    return (out * kept[..., None].to(out.dtype)).transpose(1, 2)


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
    """Return FlexAttention's BlockMask for rows of documents with these lengths.

    Each query sees one range of keys, so blocks are classified by the bounds of these ranges; no [T, T] tensor is
    built.
    """
    from torch.nn.attention.flex_attention import BlockMask

    firsts, ends = visible_key_ranges(lengths_by_row, left_window, right_window)
    partial, partial_count, full, full_count = (part.to(device) for part in _classify_blocks(firsts, ends))
    firsts, ends = firsts.to(device), ends.to(device)

    def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= firsts[batch, query]) & (key < ends[batch, query])

    length = firsts.shape[1]
    return BlockMask.from_kv_blocks(
        partial_count,
        partial,
        full_count,
        full,
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=is_visible,
        seq_lengths=(length, length),
    )


def visible_key_ranges(
    lengths_by_row: Sequence[Sequence[int]], left_window: int | None, right_window: int | None
) -> tuple[Tensor, Tensor]:
    """Return the first key that each query sees and the one after the last: int32 [B, T] each."""
    firsts, ends = [], []
    for lengths in lengths_by_row:
        counts = torch.tensor(list(lengths))
        last = counts.cumsum(0).repeat_interleave(counts)
        first = last - counts.repeat_interleave(counts)
        at = torch.arange(len(last))
        firsts.append(first if left_window is None else torch.maximum(first, at - left_window))
        ends.append(last if right_window is None else torch.minimum(last, at + right_window + 1))
    return torch.stack(firsts).int(), torch.stack(ends).int()


def _classify_blocks(firsts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the key blocks that each query block sees partially and fully: indices and counts.

    int32 [B, 1, N, N], [B, 1, N] (partial), [B, 1, N, N], [B, 1, N] (full).
    """
    length = firsts.shape[1]
    count = -(-length // BLOCK_SIZE)
    begins = torch.arange(count) * BLOCK_SIZE
    lasts = (begins + BLOCK_SIZE).clamp(max=length) - 1
    # both bounds increase along a row, so those of a block are those of its first and last query
    low, high = firsts[:, begins, None], ends[:, lasts, None]
    touched = (begins + BLOCK_SIZE > low) & (begins < high)
    full = touched & (begins >= firsts[:, lasts, None]) & (begins + BLOCK_SIZE <= ends[:, begins, None])
    # an incomplete last block of queries is never full: its missing queries see nothing
    full &= (lasts - begins == BLOCK_SIZE - 1)[None, :, None]
    out = []
    for chosen in (touched & ~full, full):
        out += [
            chosen.int().argsort(dim=-1, descending=True, stable=True).int()[:, None],
            chosen.sum(-1).int()[:, None],
        ]
    return out[0], out[1], out[2], out[3]
