"""Give each document of a batch the rotary frequencies that it has alone.

Two schemes of transformers (`modeling_rope_utils`) choose the frequencies of a whole batch by its largest position:
longrope (Phi 3.5 and 4) takes others above the original length, dynamic NTK takes others for every length above it. So
a document that is packed or padded beside a longer one has other positions than alone, and dynamic NTK depends on the
batches before. Here the frequencies are computed by transformers' own function for each document separately.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

_LENGTHS: ContextVar[list[int] | None] = ContextVar("lengths", default=None)  # of the rows of a padded batch


@contextmanager
def document_rope(net: Any) -> Iterator[None]:
    """Compute the rotary frequencies of `net` for each document separately inside the context.

    Documents are packed (positions restart, no attention mask) or padded on the right (attention mask, no positions).
    Does nothing to nets whose frequencies are fixed.
    """
    stock = net.get_base_model() if hasattr(net, "get_base_model") else net
    modules = [module for module in _length_dependent(stock) if "forward" not in vars(module)]
    if not modules:
        yield
        return
    hooks = (
        stock.base_model.register_forward_pre_hook(_store_lengths, with_kwargs=True),
        stock.base_model.register_forward_hook(_clear_lengths, always_call=True),
    )
    for module in modules:
        module.forward = partial(_forward, module, module.forward)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in modules:
            del module.forward
            _reset(module)


def original_length(net: Any) -> int | None:
    """Return the length in tokens above which the frequencies of `net` depend on the length; None: they never do."""
    lengths = [
        _original_length(module, layer_type)
        for module in _length_dependent(net)
        for layer_type, rope_type in _rope_types(module).items()
        if _is_length_dependent(rope_type)
    ]
    return min(lengths, default=None)


def _length_dependent(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if any(map(_is_length_dependent, _rope_types(module).values()))]


def _rope_types(module: nn.Module) -> dict[str | None, str]:
    """Return the scheme by layer type; the key is None where all layers have the same."""
    found = getattr(module, "rope_type", None)
    return dict(found) if isinstance(found, dict) else {None: found} if isinstance(found, str) else {}


def _is_length_dependent(rope_type: str) -> bool:
    return "dynamic" in rope_type or rope_type == "longrope"  # as `dynamic_rope_update` decides


def _original_length(module: Any, layer_type: str | None) -> int:
    if "dynamic" in _rope_types(module)[layer_type]:
        return int(module.original_max_seq_len)
    parameters = module.config.rope_parameters
    return int((parameters if layer_type is None else parameters[layer_type])["original_max_position_embeddings"])


def _store_lengths(module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
    mask = inputs.get("attention_mask")
    padded = isinstance(mask, Tensor) and mask.ndim == 2 and inputs.get("position_ids") is None
    alone = inputs.get("past_key_values") is None
    _LENGTHS.set(mask.sum(1).tolist() if padded and alone else None)  # type: ignore[union-attr]


def _clear_lengths(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
    _LENGTHS.set(None)


def _forward(
    module: Any, stock: Callable[..., Any], x: Tensor, position_ids: Tensor, layer_type: str | None = None
) -> Any:
    """Return cos and sin as `stock` does, [B, N, D] each; position_ids int64 [B, N]."""
    options = {} if layer_type is None else {"layer_type": layer_type}
    rope_type = _rope_types(module)[layer_type]
    if not _is_length_dependent(rope_type) or position_ids.ndim != 2:
        return stock(x, position_ids, **options)

    def compute(positions: Tensor) -> Any:
        _reset(module)
        return stock(x, positions, **options)

    if int(position_ids.max()) < _original_length(module, layer_type):
        return compute(position_ids)
    lengths, rows = _LENGTHS.get(), []
    if lengths is not None and len(lengths) != len(position_ids):
        position_ids = position_ids.expand(len(lengths), -1)
    for index, positions in enumerate(position_ids):
        starts = [lengths[index]] if lengths is not None else ((positions.diff() != 1).nonzero()[:, 0] + 1).tolist()
        edges = [0, *(start for start in starts if 0 < start < len(positions)), len(positions)]
        parts = [compute(positions[None, a:b]) for a, b in pairwise(edges)]
        rows.append(_concatenate(parts, 1))
    return _concatenate(rows, 0)


def _concatenate(parts: list[Any], dim: int) -> Any:
    """Concatenate tensors, or tuples of tensors one by one."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts, dim)
    return tuple(torch.cat(each, dim) for each in zip(*parts, strict=True))


def _reset(module: Any) -> None:
    """Undo what dynamic NTK keeps of the longest batch before."""
    for layer_type, rope_type in _rope_types(module).items():
        if "dynamic" in rope_type:
            prefix = "" if layer_type is None else f"{layer_type}_"
            original = getattr(module, f"{prefix}original_inv_freq").to(getattr(module, f"{prefix}inv_freq").device)
            module.register_buffer(f"{prefix}inv_freq", original, persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
