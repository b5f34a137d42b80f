"""Attention with sparse masks: describe which keys a query sees, and compute with the backend that `rules` selects.

    out[t] = Σ_u p[t, u] v[u],   p[t, u] = exp s[t, u] / (exp sink + Σ_w exp s[t, w]),   u, w over the keys t sees
    s[t, u] = softcap · tanh(scale · q[t]·k[u] / softcap)        (without a soft-cap: scale · q[t]·k[u]; sinks are rare)

Soft-caps: arXiv:2408.00118; sinks: arXiv:2309.17453; windows: arXiv:2004.05150; FlashAttention: arXiv:2205.14135.
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
    """Which keys a query sees. Query i stands at key position i + query_offset.

    Attributes:
        left_window: number of keys visible before the query's position; None: all.
        right_window: the same after it; 0: causal. A causal window of n keys, the query's own included, has left_window
            n - 1.
        query_offset: position of the first query among the keys.
        documents: for each row of the batch, the sequences packed in it; no query sees another document. Padding at an
            end of a row may be one more document.
        padding_mask: bool [B, K], False for hidden keys.
        dense_mask: bool (True: visible) or float (added to the scores), [B|1, H|1, Q, K]; replaces all other fields.
    """

    left_window: int | None = None
    right_window: int | None = None
    query_offset: int = 0
    documents: tuple[PackedSequences, ...] | None = None
    padding_mask: Tensor | None = None
    dense_mask: Tensor | None = None
    _cache: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    @cached_property
    def flat_documents(self) -> PackedSequences:
        """The documents of all rows, concatenated."""
        return PackedSequences(tuple(length for row in self.documents or () for length in row.lengths))

    def to_dense(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """Return the mask as one tensor [B|1, H|1, Q, K], bool unless `dense_mask` is float. Cached."""
        if self.dense_mask is not None:
            return self.dense_mask
        key = (queries, keys, device)
        if key not in self._cache:
            visible = band_mask(queries, keys, self.left_window, self.right_window, self.query_offset, device)[
                None, None
            ]
            if self.documents is not None:
                indices = (torch.arange(len(row.lengths), device=device) for row in self.documents)
                lengths = (torch.tensor(row.lengths, device=device) for row in self.documents)
                document = torch.stack([i.repeat_interleave(n) for i, n in zip(indices, lengths, strict=True)])
                visible = visible & (document[:, None, :, None] == document[:, None, None, :])
            if self.padding_mask is not None:
                visible = visible & self.padding_mask[:, None, None, :]
            self._cache[key] = visible
        out: Tensor = self._cache[key]
        return out


CAUSAL = AttentionMask(right_window=0)
FULL = AttentionMask()


def padding_to_documents(mask: AttentionMask, padding_mask: Tensor) -> AttentionMask:
    """Express a padding mask as documents where possible.

    A row whose valid positions are contiguous becomes one document, and the padding on each side one more; if any row
    is different, all keep `padding_mask`.

    Args:
        mask: queries and keys have the same positions 0 … T - 1.
        padding_mask: bool [B, T], True for valid positions.
    """
    length = padding_mask.shape[1]
    changes = padding_mask.int().diff(dim=1).ne(0).sum(1)
    starts, counts = padding_mask.int().argmax(1), padding_mask.sum(1)
    valid_ends = padding_mask[:, 0].int() + padding_mask[:, -1].int()
    rows = torch.stack([changes, starts, counts, valid_ends]).T.tolist()  # one synchronization with the device
    if all(count == length for _, _, count, _ in rows):
        return mask
    if any(count == 0 or changes > 2 or (changes == 2 and ends) for changes, _, count, ends in rows):
        return replace(mask, padding_mask=padding_mask)
    lengths = ((start, count, length - start - count) for _, start, count, _ in rows)
    return replace(mask, documents=tuple(PackedSequences(tuple(n for n in row if n)) for row in lengths))


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def derive_spec(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, dropout: float, softcap: float | None, sinks: bool
) -> AttentionSpec:
    """Return the facts about one call of `attend`, from which the backend is selected."""
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
    """Attend from each query to the keys that `mask` lets it see.

    A query that sees no key gets zeros. Documents are independent to the bit: changing one does not change another's
    output.

    Args:
        q: [B, H, Q, D], any float dtype.
        k: [B, G, K, D], same dtype, G a divisor of H.
        v: [B, G, K, E], same dtype.
        mask: which keys are visible.
        scale: factor of q·k.
        dropout: probability of dropping a weight.
        softcap: c of the soft-cap, or None.
        sinks: [H], a logit per head that joins the softmax without a value.

    Returns:
        [B, Q, H, E] in q's dtype.
    """
    backend = select_backend(derive_spec(q, k, v, mask, dropout, softcap, sinks is not None)).backend
    if backend in ("flash3", "flash2", "flash_varlen"):
        if mask.documents is None:
            mask = replace(mask, documents=(PackedSequences((q.shape[2],)),) * len(q))
        documents = mask.flat_documents
        left, right = (-1 if size is None else size for size in (mask.left_window, mask.right_window))
        cu_seqlens, max_seqlen = documents.cu_seqlens(q.device), max(documents.lengths)
        return cuda.flash(backend, q, k, v, cu_seqlens, max_seqlen, (left, right), scale, dropout, softcap)
    if backend == "flex":
        return cuda.flex(q, k, v, _block_mask(q, mask), scale, softcap, sinks)
    if backend == "sdpa":
        return _sdpa(q, k, v, mask, scale, dropout)
    params = blocks.ScoreParams(scale, dropout, softcap, mask.left_window, mask.right_window)
    if mask.documents is None:
        needs_dense = mask.dense_mask is not None or mask.padding_mask is not None
        dense = mask.to_dense(q.shape[2], k.shape[2], q.device) if needs_dense else None
        return blocks.attend_slice(q, k, v, replace(params, query_offset=mask.query_offset), sinks, dense)
    return blocks.attend_documents(q, k, v, tuple(row.lengths for row in mask.documents), params, sinks)


def attention_weights(
    q: Tensor, k: Tensor, dense_mask: Tensor, *, scale: float, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Return the weights p [B, H, Q, K], for inspection; dense_mask is from `AttentionMask.to_dense`."""
    return blocks.attention_weights(q, k, blocks.ScoreParams(scale, softcap=softcap), sinks, dense_mask)


def _block_mask(q: Tensor, mask: AttentionMask) -> Any:
    """The mask for FlexAttention, cached."""
    key = ("flex", q.shape[2], q.device)
    if key not in mask._cache:
        lengths = [row.lengths for row in mask.documents] if mask.documents is not None else [(q.shape[2],)]
        mask._cache[key] = cuda.build_block_mask(lengths, mask.left_window, mask.right_window, q.device)
    return mask._cache[key]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, dropout: float) -> Tensor:
    """torch's sdpa over the keys that some query sees, without a mask where none is needed."""
    queries, keys = q.shape[2], k.shape[2]
    if mask.dense_mask is not None or mask.padding_mask is not None:
        return blocks.sdpa(q, k, v, scale, dropout, attn_mask=mask.to_dense(queries, keys, q.device))
    first = 0 if mask.left_window is None else max(0, mask.query_offset - mask.left_window)
    last = keys if mask.right_window is None else min(keys, mask.query_offset + queries + mask.right_window)
    k, v, shifted = k[:, :, first:last], v[:, :, first:last], replace(mask, query_offset=mask.query_offset - first)
    all_visible = (mask.left_window is None or shifted.query_offset + queries - 1 <= mask.left_window) and (
        mask.right_window is None or last - first - 1 - shifted.query_offset <= mask.right_window
    )
    if all_visible or queries == 1:
        return blocks.sdpa(q, k, v, scale, dropout)
    if mask.right_window == 0 and shifted.query_offset == 0 and queries == last - first:
        return blocks.sdpa(q, k, v, scale, dropout, is_causal=True)
    return blocks.sdpa(q, k, v, scale, dropout, attn_mask=shifted.to_dense(queries, last - first, q.device))
