"""Register `mowa` as an attention implementation of transformers, with sparse masks and the backends of `kernels`.

Importing this module registers the name and changes nothing else; `install_attention` lets one net use it until the
function it returns is called. The name is stored in the net's config: nets that share a config object share it.

transformers composes masks from functions (`transformers.masking_utils`); their structure is read here: causal,
windows, padding, packed positions. Anything else (images attended in both directions, chunks) becomes the dense mask
that transformers computes. Rows are packed if there is no attention mask and no earlier cache, and positions restart.
Not every net passes positions to its mask (gpt-oss), so a hook on the net provides them.

transformers' continuous batching (`generate_batch`), with its paged cache, rejects this name: undo the change first.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mowa.kernels.attention.dispatch import CAUSAL, FULL, AttentionMask, attend, attention_weights, padding_to_documents
from mowa.kernels.attention.varlen import PackedSequences

ATTN_IMPLEMENTATION = "mowa"
_PLAIN: ContextVar[bool] = ContextVar("plain", default=False)
_POSITIONS: ContextVar[Tensor | None] = ContextVar("positions", default=None)


def unsupported_reason(net: nn.Module) -> str:
    """Return why the attention of `net` cannot be replaced, or an empty string where it can."""
    if getattr(net, "_supports_attention_backend", False):
        return ""
    return f"{type(net).__name__} has an attention of its own, not transformers' AttentionInterface"


def install_attention(net: Any) -> Callable[[], None]:
    """Let `net`, and all nets inside it, use this attention; return a function that undoes it."""
    configs = _configs(net)
    before = [config._attn_implementation for config in configs]
    original = vars(net).get("create_masks_for_generate")
    for config in configs:
        config._attn_implementation = ATTN_IMPLEMENTATION
    stock = getattr(net, "create_masks_for_generate", masking_utils.create_masks_for_generate)
    net.create_masks_for_generate = partial(_create_masks_for_generate, stock)
    hooks = (
        net.base_model.register_forward_pre_hook(_store_positions, with_kwargs=True),
        net.base_model.register_forward_hook(_clear_positions, always_call=True),
    )

    def restore() -> None:
        for hook in hooks:
            hook.remove()
        if original is None:
            del net.create_masks_for_generate
        else:
            net.create_masks_for_generate = original
        for config, name in zip(
            configs, before, strict=True
        ):  # outer configs first: setting one also sets those inside it
            config._attn_implementation = name

    return restore


def _store_positions(module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
    positions = inputs.get("position_ids")
    may_be_packed = inputs.get("attention_mask") is None and inputs.get("past_key_values") is None
    _POSITIONS.set(positions if may_be_packed and isinstance(positions, Tensor) and positions.ndim == 2 else None)


def _clear_positions(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
    _POSITIONS.set(None)


def _create_masks_for_generate(stock: Callable[..., Any], **kwargs: Any) -> Any:
    """Return plain tensors: `generate` handles the masks that it creates ahead for static caches as tensors."""
    token = _PLAIN.set(True)
    try:
        return stock(**kwargs)
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
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Any:
    """Return the mask for transformers' `create_…_mask` functions: an `AttentionMask`.

    During `generate` with a static cache, and under torch.compile, it is transformers' plain dense tensor instead.

    Args:
        batch_size: B.
        q_length: number of queries.
        kv_length: number of keys.
        q_offset: position of the first query.
        kv_offset: position of the first key.
        mask_function: composed of the functions of `transformers.masking_utils`.
        attention_mask: padding mask [B, K] or None.
        **options: of `transformers.masking_utils.sdpa_mask`.
    """
    plain = _PLAIN.get() or torch.compiler.is_compiling()
    sparse = None if plain else _parse(mask_function)
    if sparse is None:
        dense = masking_utils.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **options,
        )
        return dense if dense is None or plain else AttentionMask(dense_mask=dense)
    mask = replace(sparse, query_offset=int(q_offset) - kv_offset)
    if attention_mask is None:
        positions = _POSITIONS.get() if mask.right_window == 0 and mask.documents is None else None
        fits = positions is not None and mask.query_offset == 0 and q_length == kv_length == positions.shape[1]
        return _pack(mask, positions.expand(batch_size, -1)) if fits and positions is not None else mask
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    padding = padding[:, kv_offset : kv_offset + kv_length].bool()  # type: ignore[index]
    if mask.documents is None and mask.query_offset == 0 and q_length == kv_length:
        return padding_to_documents(mask, padding)
    return mask if bool(padding.all()) else replace(mask, padding_mask=padding)


def _parse(function: Callable[..., Any]) -> AttentionMask | None:
    """Return the mask that a mask function of transformers describes, or None for one that is not understood."""
    if function is masking_utils.causal_mask_function:
        return CAUSAL
    if function is masking_utils.bidirectional_mask_function:
        return FULL
    if getattr(function, "__module__", "") != masking_utils.__name__ or not (
        cells := getattr(function, "__closure__", None)
    ):
        return None
    inside = dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))
    maker = function.__qualname__.partition(".")[0]
    if maker == "and_masks":
        return _intersect(inside["mask_functions"])
    if maker == "sliding_window_overlay":
        return AttentionMask(left_window=inside["sliding_window"] - 1)
    if maker == "sliding_window_bidirectional_overlay":
        return AttentionMask(left_window=inside["sliding_window"], right_window=inside["sliding_window"])
    if maker == "packed_sequence_mask_function":
        return AttentionMask(documents=_documents(inside["packed_sequence_mask"]))
    if maker == "remap_positions_for_packed_sequence":  # positions then increase by one in each document: the same mask
        return _parse(inside["mask_function"])
    return None


def _intersect(functions: tuple[Callable[..., Any], ...]) -> AttentionMask | None:
    mask = FULL
    for function in functions:
        if (part := _parse(function)) is None:
            return None
        left, right = (_min(getattr(mask, name), getattr(part, name)) for name in ("left_window", "right_window"))
        mask = AttentionMask(left, right, documents=part.documents or mask.documents)
    return mask


def _min(a: int | None, b: int | None) -> int | None:
    return a if b is None else b if a is None else min(a, b)


def _pack(mask: AttentionMask, positions: Tensor) -> AttentionMask:
    document = masking_utils.find_packed_sequence_indices(positions)
    return mask if document is None else replace(mask, documents=_documents(document))


def _documents(document: Tensor) -> tuple[PackedSequences, ...]:
    """document int [B, T], non-decreasing: the index of each token's document in its row."""
    return tuple(PackedSequences(tuple(row.unique_consecutive(return_counts=True)[1].tolist())) for row in document)


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
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' AttentionInterface: q [B, H, Q, D], k [B, G, K, D], v [B, G, K, E] → [B, Q, H, E] and weights.

    attention_mask is an `AttentionMask`, a dense mask [B|1, H|1, Q, K], or None with the meaning it has for SDPA.
    Weights [B, H, Q, K] are returned only with `output_attentions`.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    queries, keys = query.shape[2], key.shape[2]
    if position_bias is not None:
        dense = attention_mask
        if isinstance(attention_mask, AttentionMask):
            dense = attention_mask.to_dense(queries, keys, query.device)
        options = {"dropout": dropout, "scaling": scale, "is_causal": is_causal, "position_bias": position_bias}
        return sdpa_attention_forward(module, query, key, value, dense, **options)
    if isinstance(attention_mask, AttentionMask):
        mask = attention_mask
    elif attention_mask is not None:
        mask = AttentionMask(dense_mask=attention_mask[..., :keys])
    else:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        mask = CAUSAL if causal and queries > 1 else FULL
    if options.get("output_attentions"):
        dense = mask.to_dense(queries, keys, query.device)
        weights = attention_weights(query, key, dense, scale=scale, softcap=softcap, sinks=s_aux)
        dropped = nn.functional.dropout(weights, dropout)
        out = dropped @ value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return out.transpose(1, 2).contiguous(), weights
    out = attend(query, key, value, mask, scale=scale, dropout=dropout, softcap=softcap, sinks=s_aux)
    return out.contiguous(), None


AttentionInterface.register(ATTN_IMPLEMENTATION, mowa_attention_forward)
AttentionMaskInterface.register(ATTN_IMPLEMENTATION, mowa_mask)
