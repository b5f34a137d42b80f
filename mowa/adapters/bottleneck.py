"""Bottleneck adapters after each block, as in MMS (arXiv:2305.13516), in transformers' own modules.

    h ← h + W2 relu(W1 LayerNorm(h) + b1) + b2,   W1 [bottleneck_dim, hidden]; W2 and b2 are initialized to 0

They are `layer.adapter_layer` of transformers' blocks and `adapter_attn_dim` of its config, so `AutoModelForCTC` loads
a checkpoint of such a net, and `adapter_state_dict` is the content of an MMS `adapter.<lang>.safetensors` file.
transformers calls them only in blocks with stable layer norm (XLSR-53, large-lv60, XLS-R, MMS and HuBERT large); other
nets are rejected.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from mowa.errors import RecipeError
from mowa.types import Family


def add(net: Any, family: Family, bottleneck_dim: int) -> Any:
    """Add an adapter of width `bottleneck_dim` to each block of `net`, in place, and return `net`.

    W1 is drawn from torch's generator with standard deviation `config.initializer_range`. Adapters of this width that
    are present already (an MMS checkpoint) are kept.

    Raises RecipeError if the blocks do not support adapters, or have some of another width.
    """
    if has(net):
        if (present := net.config.adapter_attn_dim) != bottleneck_dim:
            raise RecipeError(f"bottleneck_dim: {bottleneck_dim}: this model has adapters of width {present} already")
        return net
    for block in insert_on_meta(net, family, bottleneck_dim):
        layer = block.adapter_layer.to_empty(device=_any_parameter(block).device)
        layer.norm.reset_parameters()
        nn.init.normal_(layer.linear_1.weight, std=getattr(net.config, "initializer_range", 0.02))
        for parameter in (layer.linear_1.bias, layer.linear_2.weight, layer.linear_2.bias):
            nn.init.zeros_(parameter)
        layer.train(block.training)
    return net


def has(net: Any) -> bool:
    """Return whether `net` has bottleneck adapters."""
    return getattr(net.config, "adapter_attn_dim", None) is not None


def insert_on_meta(net: Any, family: Family, bottleneck_dim: int) -> list[Any]:
    """Add adapters on the meta device to every block of `net`, and return the blocks. Raises as `add`."""
    blocks = [module for module in net.modules() if type(module).__name__ in family.blocks]
    if not blocks or not all(hasattr(block, "adapter_layer") for block in blocks):
        raise RecipeError(
            f"method: bottleneck: this {family.name} model does not support adapters; only models with stable layer"
            " norm (XLSR-53, large-lv60, XLS-R, MMS, HuBERT large) do: use method: lora"
        )
    block_class = type(blocks[0])
    name = f"{block_class.__name__.partition('EncoderLayer')[0]}AttnAdapterLayer"
    adapter_class = getattr(sys.modules[block_class.__module__], name)
    net.config.adapter_attn_dim = bottleneck_dim
    for block in blocks:
        with torch.device("meta"):
            layer = adapter_class(net.config)
        block.adapter_layer = layer.to(_any_parameter(block).dtype)
    return blocks


def adapter_state_dict(net: Any, family: Family) -> dict[str, Tensor]:
    """Return the tensors of adapters and head by name, as transformers stores them in `adapter.<lang>.safetensors`."""
    head = f"{family.head}."
    return {
        name: value for name, value in net.state_dict().items() if name.startswith(head) or ".adapter_layer." in name
    }


def _any_parameter(block: nn.Module) -> nn.Parameter:
    return next(block.parameters())
