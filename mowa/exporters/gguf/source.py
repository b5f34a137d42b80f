"""The language model that is converted: its weights are loaded one at a time.

A model on torch's meta device has no weights in memory. Those of its checkpoint are read from disk, tensor by tensor,
and a LoRA adapter is merged into each as it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mowa.adapters import causal, checkpoint
from mowa.adapters.loading import load_adapter
from mowa.errors import ModelError
from mowa.exporters.gguf.lora import LoraLayer, read_layers
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.loading import causal as loading
from mowa.models.gguf import checkpoint_state, net_state
from mowa.models.gguf.state import LazyTensor
from mowa.types import CausalModel, TextProcessor


@dataclass(frozen=True, slots=True)
class Source:
    """A model to convert.

    model     its net is on the meta device, or holds the weights
    state     name in transformers → weight, with LoRA merged and quantized ones dequantized
    load_net  returns the net in memory, float32, merged
    """

    model: CausalModel
    state: Mapping[str, LazyTensor]
    load_net: Callable[[], Any]


def open_source(model: CausalModel, adapter: Path | None = None) -> Source:
    """Open a model, with the adapter in a folder where it is on the meta device.

    Raises ModelError if the checkpoint or the adapter is damaged, or they do not belong together.
    """
    if not any(parameter.is_meta for parameter in model.net.parameters()):
        if adapter is not None:
            model = load_adapter(model, adapter)
        return Source(model, _memory_state(model), lambda: causal.merge_adapter(model, "float32").net)
    state = checkpoint_state(model.origin.folder, model.net.config.model_type)
    folder = str(model.origin.folder)
    if adapter is None:
        return Source(model, state, lambda: loading.load(folder).net)
    if causal.is_causal_adapter(adapter):
        checkpoint.validate_base(causal.read_adapter(adapter), model)
    merged = _merge(state, read_layers(adapter), adapter)
    origin = replace(model.origin, name=f"{model.origin.name}+{adapter.resolve().name}")
    adapted = replace(model, origin=origin, processor=TextProcessor(causal.adapter_tokenizer(model, adapter)))
    return Source(adapted, merged, lambda: causal.merge_adapter(load_adapter(loading.load(folder), adapter)).net)


def _memory_state(model: CausalModel) -> dict[str, LazyTensor]:
    net = causal.merge_adapter(model, "float32").net
    quantized = {name: one for name, one in net.named_modules() if isinstance(one, QuantizedLinear)}
    state = {name: one for name, one in net_state(net).items() if name.rpartition(".")[0] not in quantized}
    for name, linear in quantized.items():
        shape = (linear.out_features, linear.in_features)
        state[f"{name}.weight"] = LazyTensor(shape, partial(_dequantize, linear))
        if linear.bias is not None:
            state[f"{name}.bias"] = LazyTensor(tuple(linear.bias.shape), linear.bias.detach)
    return state


def _dequantize(linear: QuantizedLinear) -> Tensor:
    return linear.weight


def _merge(state: Mapping[str, LazyTensor], layers: list[LoraLayer], adapter: Path) -> dict[str, LazyTensor]:
    """Return the weights with LoRA added to those that it is of, float32."""
    merged = dict(state)
    for layer in layers:
        name, shape = f"{layer.module}.weight", (len(layer.b), layer.a.shape[1])
        if name not in state or state[name].shape != shape:
            found = list(state[name].shape) if name in state else "missing"
            raise ModelError(f"{adapter} is LoRA of {name} {list(shape)}, which is {found} in its base model")
        merged[name] = LazyTensor(shape, partial(_add, state[name], layer))
    return merged


def _add(base: LazyTensor, layer: LoraLayer) -> Tensor:
    """Return W + scaling · B A, added in float64."""
    return torch.add(base.load().double(), layer.b.double() @ layer.a.double(), alpha=layer.scaling).float()
