"""Bottleneck adapters after each block, as MMS has them (arXiv:2305.13516), in transformers' own modules.

    h ← h + W2 relu(W1 LayerNorm(h) + b1) + b2,   W1 [width, hidden]; W2 = 0, b2 = 0: at first the net says what it said

They are `layer.adapter_layer` of transformers' blocks and `config.adapter_attn_dim` of its config, so a checkpoint of
such a net is one that `AutoModelForCTC` reads, and what `weights` gives is the content of an MMS `adapter.<lang>` file.
Only blocks with stable layer norm have a place for them (XLSR-53, large-lv60, XLS-R, MMS and HuBERT large); others, and
WavLM, are refused, because no stock transformers would ever call what was put there.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from mowa.errors import RecipeError
from mowa.types import Family


def add(net: Any, family: Family, bottleneck_dim: int) -> Any:
    """Give each block of `net` an adapter of `width`, in place. → net.

    W1 is drawn from torch's generator with the deviation `config.initializer_range`. Adapters of this very width that
    are there already (an MMS checkpoint) are kept, and go on learning.

    Raises RecipeError where the blocks have no place for adapters, or have some of another width.
    """
    if has(net):
        if (there := net.config.adapter_attn_dim) != bottleneck_dim:
            raise RecipeError(
                f"adapters: width: this net has adapters of width {there} already; it cannot be {bottleneck_dim}"
            )
        return net
    for block in insert_on_meta(net, family, bottleneck_dim):
        layer = block.adapter_layer.to_empty(device=_like(block).device)
        layer.norm.reset_parameters()
        nn.init.normal_(layer.linear_1.weight, std=getattr(net.config, "initializer_range", 0.02))
        for zero in (layer.linear_1.bias, layer.linear_2.weight, layer.linear_2.bias):
            nn.init.zeros_(zero)
        layer.train(block.training)
    return net


def has(net: Any) -> bool:
    return getattr(net.config, "adapter_attn_dim", None) is not None


def insert_on_meta(net: Any, family: Family, bottleneck_dim: int) -> list[Any]:
    """Adapters without weights (on the meta device) into every block of `net`. → its blocks. RecipeError as `add`."""
    blocks = [module for module in net.modules() if type(module).__name__ in family.blocks]
    if not blocks or not all(hasattr(block, "adapter_layer") for block in blocks):
        raise RecipeError(
            "adapters: only blocks with stable layer norm (XLSR-53, large-lv60, XLS-R, MMS, HuBERT large) have a place"
            f" for them, and this {family.name} has none; use train: lora"
        )
    stock = type(blocks[0])
    name = f"{stock.__name__.partition('EncoderLayer')[0]}AttnAdapterLayer"
    adapter = getattr(sys.modules[stock.__module__], name)
    net.config.adapter_attn_dim = bottleneck_dim
    for block in blocks:
        with torch.device("meta"):
            layer = adapter(net.config)
        block.adapter_layer = layer.to(_like(block).dtype)
    return blocks


def adapter_state_dict(net: Any, family: Family) -> dict[str, Tensor]:
    """Adapters and head by name: what transformers keeps in `adapter.<lang>.safetensors`."""
    own = (f"{family.head}.", ".adapter_layer.")
    return {name: value for name, value in net.state_dict().items() if name.startswith(own[0]) or own[1] in name}


def _like(block: nn.Module) -> nn.Parameter:
    return next(block.parameters())
