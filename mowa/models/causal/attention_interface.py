"""transformers' attention under the name `mowa`: its masks as values that say what is seen, its layers by one rule.

Importing this registers the name and changes nothing else; a net takes part from `use` until what that gives is called.
A net keeps the name in its config: nets made from one and the same config object would share it.

What transformers asks for as a mask is read from the functions it composes it of (`transformers.masking_utils`):
causal, windows, padding, packed positions. Whatever is not known among them (images that see each other both ways,
chunks) becomes the dense mask of transformers' own making. Packed are rows without an attention mask and without a
cache from before whose positions begin anew. Not every net tells its mask of positions (gpt-oss), so the call does.
transformers' continuous batching (`generate_batch`), with its cache in pages, takes only names that it knows: restore.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers import masking_utils as theirs
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mowa.kernels.attention.dispatch import CAUSAL, FULL, AttentionMask, attend, attention_weights, padding_to_documents
from mowa.kernels.attention.varlen import PackedSequences

ATTN_IMPLEMENTATION = "mowa"
_PLAIN: ContextVar[bool] = ContextVar("plain", default=False)
_POSITIONS: ContextVar[Tensor | None] = ContextVar("positions", default=None)


def unsupported_reason(net: nn.Module) -> str:
    """Why the attention of `net` cannot be exchanged; empty where it can."""
    if getattr(net, "_supports_attention_backend", False):
        return ""
    return f"{type(net).__name__} attends in a way of its own, not by transformers' AttentionInterface"


def install_attention(net: Any) -> Callable[[], None]:
    """Let the attention of `net`, and of the nets in it, be ours. → what puts back what each had."""
    configs = _configs(net)
    before = [config._attn_implementation for config in configs]
    own = vars(net).get("create_masks_for_generate")
    for config in configs:
        config._attn_implementation = ATTN_IMPLEMENTATION
    stock = getattr(net, "create_masks_for_generate", theirs.create_masks_for_generate)
    net.create_masks_for_generate = partial(_for_generate, stock)
    called = (
        net.base_model.register_forward_pre_hook(_before, with_kwargs=True),
        net.base_model.register_forward_hook(_after, always_call=True),
    )

    def restore() -> None:
        for hook in called:
            hook.remove()
        if own is None:
            del net.create_masks_for_generate
        else:
            net.create_masks_for_generate = own
        for config, name in zip(configs, before, strict=True):  # a config passes its own on to its parts, so these last
            config._attn_implementation = name

    return restore


def _before(module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
    positions = inputs.get("position_ids")
    alone = inputs.get("attention_mask") is None and inputs.get("past_key_values") is None
    _POSITIONS.set(positions if alone and isinstance(positions, Tensor) and positions.ndim == 2 else None)


def _after(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
    _POSITIONS.set(None)


def _for_generate(stock: Callable[..., Any], **how: Any) -> Any:
    """Masks that `generate` makes ahead, for static caches, it handles as tensors."""
    token = _PLAIN.set(True)
    try:
        return stock(**how)
    finally:
        _PLAIN.reset(token)


def _configs(net: Any) -> list[Any]:
    """Every config in `net`, outer ones first."""
    found: dict[int, Any] = {}
    for module in net.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            _collect(config, found)
    return list(found.values())


def _collect(config: Any, found: dict[int, Any]) -> None:
    if id(config) not in found:
        found[id(config)] = config
        for key in config.sub_configs:
            if (part := getattr(config, key, None)) is not None:
                _collect(part, found)


def mowa_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = theirs.causal_mask_function,
    attention_mask: Tensor | None = None,
    **asked: Any,
) -> Any:
    """What transformers' `create_…_mask` want of an implementation: a `Mask`, or transformers' own dense one in it.

    Only `generate` gets the plain tensor, as it makes masks ahead for a static cache and hands them round as tensors.
    """
    plain = _PLAIN.get() or torch.compiler.is_compiling()
    known = None if plain else _read(mask_function)
    if known is None:
        dense = theirs.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **asked,
        )
        return dense if dense is None or plain else AttentionMask(dense_mask=dense)
    found = replace(known, query_offset=int(q_offset) - kv_offset)
    if attention_mask is None:
        positions = _POSITIONS.get() if found.right_window == 0 and found.documents is None else None
        fits = positions is not None and found.query_offset == 0 and q_length == kv_length == positions.shape[1]
        return _packed(found, positions.expand(batch_size, -1)) if fits and positions is not None else found
    padding = theirs.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    padding = padding[:, kv_offset : kv_offset + kv_length].bool()  # type: ignore[index]
    if found.documents is None and found.query_offset == 0 and q_length == kv_length:
        return padding_to_documents(found, padding)
    return found if bool(padding.all()) else replace(found, padding_mask=padding)


def _read(function: Callable[..., Any]) -> AttentionMask | None:
    """What a mask function of transformers says, or None for one that says something else."""
    if function is theirs.causal_mask_function:
        return CAUSAL
    if function is theirs.bidirectional_mask_function:
        return FULL
    if getattr(function, "__module__", "") != theirs.__name__ or not (cells := getattr(function, "__closure__", None)):
        return None
    inside = dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))
    maker = function.__qualname__.partition(".")[0]
    if maker == "and_masks":
        return _all(inside["mask_functions"])
    if maker == "sliding_window_overlay":
        return AttentionMask(left_window=inside["sliding_window"] - 1)
    if maker == "sliding_window_bidirectional_overlay":
        return AttentionMask(left_window=inside["sliding_window"], right_window=inside["sliding_window"])
    if maker == "packed_sequence_mask_function":
        return AttentionMask(documents=_documents(inside["packed_sequence_mask"]))
    if maker == "remap_positions_for_packed_sequence":  # to positions that rise by one in each document: the same
        return _read(inside["mask_function"])
    return None


def _all(functions: tuple[Callable[..., Any], ...]) -> AttentionMask | None:
    whole = FULL
    for function in functions:
        if (part := _read(function)) is None:
            return None
        before, after = (_less(getattr(whole, name), getattr(part, name)) for name in ("before", "after"))
        whole = AttentionMask(before, after, documents=part.documents or whole.documents)
    return whole


def _less(a: int | None, b: int | None) -> int | None:
    return a if b is None else b if a is None else min(a, b)


def _packed(found: AttentionMask, positions: Tensor) -> AttentionMask:
    owner = theirs.find_packed_sequence_indices(positions)
    return found if owner is None else replace(found, documents=_documents(owner))


def _documents(owner: Tensor) -> tuple[PackedSequences, ...]:
    """owner int [B, T], rising: which document of its row a token is of."""
    return tuple(PackedSequences(tuple(row.unique_consecutive(return_counts=True)[1].tolist())) for row in owner)


def mowa_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **asked: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' AttentionInterface: q [B, H, Q, D], k [B, G, K, D], v [B, G, K, E] → [B, Q, H, E], no weights.

    attention_mask: a `Mask`, transformers' own [B|1, H|1, Q, K], or None, which says what it says to SDPA. Weights
    [B, H, Q, K] come only where `output_attentions` asks for them.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    queries, keys = query.shape[2], key.shape[2]
    if position_bias is not None:
        dense = (
            attention_mask.to_dense(queries, keys, query.device)
            if isinstance(attention_mask, AttentionMask)
            else attention_mask
        )
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            dense,
            dropout=dropout,
            scaling=scale,
            is_causal=is_causal,
            position_bias=position_bias,
        )
    if isinstance(attention_mask, AttentionMask):
        wanted = attention_mask
    elif attention_mask is not None:
        wanted = AttentionMask(dense_mask=attention_mask[..., :keys])
    else:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        wanted = CAUSAL if causal and queries > 1 else FULL
    if asked.get("output_attentions"):
        shown = wanted.to_dense(queries, keys, query.device)
        weights = attention_weights(query, key, shown, scale=scale, softcap=softcap, sinks=s_aux)
        dropped = nn.functional.dropout(weights, dropout)
        out = dropped @ value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return out.transpose(1, 2).contiguous(), weights
    out = attend(query, key, value, wanted, scale=scale, dropout=dropout, softcap=softcap, sinks=s_aux)
    return out.contiguous(), None


AttentionInterface.register(ATTN_IMPLEMENTATION, mowa_attention_forward)
AttentionMaskInterface.register(ATTN_IMPLEMENTATION, mowa_mask)
