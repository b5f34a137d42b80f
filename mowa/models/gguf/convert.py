"""Turn a transformers config and state dict into the metadata and tensors of a GGUF file, and back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mowa.errors import ModelError
from mowa.io.gguf.types import NUMBER_TYPES
from mowa.models.gguf.architecture import Architecture, TensorRule, head_dim
from mowa.models.gguf.rope import TENSORS as ROPE_TENSORS
from mowa.models.gguf.rope import rope_config, rope_metadata, rope_tensors
from mowa.models.gguf.state import LazyTensor
from mowa.models.gguf.tables import architecture_named, find_architecture
from mowa.models.gguf.validation import validate_metadata

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
EMBEDDINGS_IN_GGUF = "token_embd.weight"
_BUFFERS = ("rotary_emb.inv_freq",)  # in state dicts of old checkpoints
_REQUIRED = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}


@dataclass(frozen=True, slots=True)
class GGUFModel:
    """What a GGUF file holds besides the tokenizer.

    architecture  name and rules
    metadata      key → value, numpy numbers where the type matters
    tensors       name → shape and how to compute it, in the order to write; float tensors in the dtype of the state
                  dict
    notes         how llama.cpp deviates from transformers, one sentence each
    """

    architecture: Architecture
    metadata: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor]
    notes: tuple[str, ...]


def to_gguf(config: Any, state: Mapping[str, LazyTensor]) -> GGUFModel:
    """Map a causal language model to GGUF; no tensor is loaded.

    Args:
        config: of transformers.
        state: as `net_state` or `checkpoint_state` returns it.

    Raises ModelError if the architecture is not supported, if llama.cpp cannot compute what the config says, or if a
    tensor is missing or has no place in GGUF.
    """
    architecture = find_architecture(config)
    _validate(config, architecture)
    tensors = _map_tensors(architecture, config, state)
    for name, tensor in rope_tensors(config).items():
        tensors[name] = LazyTensor(tuple(tensor.shape), partial(_identity, tensor))
    note = architecture.note(config)
    return GGUFModel(architecture, _metadata(architecture, config), tensors, (note,) if note else ())


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _validate(config: Any, architecture: Architecture) -> None:
    activation = getattr(config, "hidden_act", None) or config.hidden_activation
    problem = architecture.problem(config)
    if activation not in (architecture.activation, {"silu": "swish"}.get(architecture.activation)):
        problem = f"its activation is {activation}, and llama.cpp computes {architecture.activation}"
    if architecture.tied == "always" and not config.tie_word_embeddings:
        problem = "its head is not its embeddings, as it is in llama.cpp"
    if problem:
        raise ModelError(f"this {config.model_type} model cannot be written as GGUF: {problem}")


def _metadata(architecture: Architecture, config: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for rule in architecture.keys:
        if (value := getattr(config, rule.attribute, None)) is not None:
            try:
                found[rule.key] = NUMBER_TYPES[rule.value_type].type(value)
            except (OverflowError, TypeError, ValueError):
                raise ModelError(
                    f"{rule.attribute} of the config is {value!r}, and GGUF stores it as {rule.value_type}"
                ) from None
    size = head_dim(config)
    found |= {"attention.key_length": size, "attention.value_length": size}
    found |= rope_metadata(config, architecture) | architecture.extra_metadata(config)
    return {"general.architecture": architecture.name} | {
        f"{architecture.name}.{key}": _typed(value) for key, value in found.items()
    }


def _typed(value: Any) -> Any:
    """Return ints and floats as the uint32 and float32 that llama.cpp reads."""
    if isinstance(value, bool | str | np.generic):
        return value
    return np.uint32(value) if isinstance(value, int) else np.float32(value)


def _map_tensors(architecture: Architecture, config: Any, state: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    tied = config.tie_word_embeddings and architecture.tied != "never"
    unused = {name for name in state if not name.endswith(_BUFFERS)}
    tensors: dict[str, LazyTensor] = {}
    for rule in expand(architecture, config.num_hidden_layers):
        source = rule.source
        if source == HEAD and tied:
            unused.discard(HEAD)
            continue
        if source == HEAD and HEAD not in state:
            source = EMBEDDINGS
        if source not in state:
            if rule.optional:
                continue
            raise ModelError(f"this {config.model_type} model has no {source}, which llama.cpp needs")
        unused.discard(source)
        tensors |= _apply(rule, config, state[source])
    if unused:
        raise ModelError(
            f"{min(unused)} has no place in GGUF: llama.cpp has no such weight in {architecture.name}"
            f" ({len(unused)} of {len(state)} tensors)"
        )
    return tensors


def expand(architecture: Architecture, num_blocks: int) -> Iterator[TensorRule]:
    """Yield the rules of all tensors: outside the blocks, and then block by block."""
    outside = [rule for rule in architecture.tensors if "{i}" not in rule.source]
    inside = [rule for rule in architecture.tensors if "{i}" in rule.source]
    yield from outside
    for index in range(num_blocks):
        for rule in inside:
            targets = tuple(target.replace("{i}", str(index)) for target in rule.targets)
            yield TensorRule(rule.source.replace("{i}", str(index)), targets, rule.transform, rule.optional)


def _apply(rule: TensorRule, config: Any, source: LazyTensor) -> dict[str, LazyTensor]:
    """Return the targets of a rule; their shapes are found on the meta device."""
    try:
        parts = rule.transform.forward(torch.empty(source.shape, device="meta"), config)
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{rule.source} {list(source.shape)} does not fit its config: {reason}") from error
    return {
        name: LazyTensor(tuple(part.shape), partial(_load_part, rule, config, source, index))
        for index, (name, part) in enumerate(zip(rule.targets, parts, strict=True))
    }


def _load_part(rule: TensorRule, config: Any, source: LazyTensor, index: int) -> Tensor:
    return rule.transform.forward(source.load(), config)[index]


@dataclass(frozen=True, slots=True)
class Restoration:
    """How a GGUF file becomes a transformers model.

    config    of transformers
    rules     which tensors of the file become which tensor of the state dict; call `transform.inverse` with them
    """

    config: Any
    rules: tuple[TensorRule, ...]


def restore(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rope: Mapping[str, Tensor]
) -> Restoration:
    """Map a GGUF file to a model of transformers; no weights are loaded.

    Args:
        metadata: of the file.
        shapes: name of each of its tensors → shape in torch's order.
        rope: those of its tensors that are called as `rope.TENSORS`, float32.

    Raises ModelError if the architecture is not supported, or if metadata or tensors are missing or unexpected.
    """
    architecture = architecture_named(str(metadata.get("general.architecture")))
    validate_metadata(metadata)
    own = {
        key.removeprefix(f"{architecture.name}."): value.item() if isinstance(value, np.generic) else value
        for key, value in metadata.items()
        if key.startswith(f"{architecture.name}.")
    }
    config = _config(architecture, metadata, own, shapes, rope)
    remaining = set(shapes) - set(ROPE_TENSORS)
    rules = []
    for rule in expand(architecture, config.num_hidden_layers):
        if missing := [target for target in rule.targets if target not in remaining]:
            if rule.optional and len(missing) == len(rule.targets):
                continue
            raise ModelError(f"the GGUF file has no tensor {missing[0]}, which {architecture.name} needs")
        rules.append(rule)
        remaining.difference_update(rule.targets)
    if remaining:
        raise ModelError(
            f"the tensor {min(remaining)} of the GGUF file has no place in {config.model_type}"
            f" ({len(remaining)} of {len(shapes)} tensors)"
        )
    return Restoration(config, tuple(rules))


def _config(
    architecture: Architecture,
    metadata: Mapping[str, Any],
    own: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope: Mapping[str, Tensor],
) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if absent := [key for key in _REQUIRED if key not in own]:
        raise ModelError(f"the GGUF file has no metadata {architecture.name}.{absent[0]}")
    try:
        model_type = architecture.model_type(own) if architecture.model_type else architecture.model_types[0]
        attributes = {rule.attribute: own[rule.key] for rule in architecture.keys if rule.key in own}
        attributes |= _head_attributes(own, model_type)
        attributes["tie_word_embeddings"] = "output.weight" not in shapes
        if any(re.fullmatch(r"blk\.0\.attn_(q|output)\.bias", name) for name in shapes):
            attributes["attention_bias"] = True
        if "blk.0.ffn_up.bias" in shapes:
            attributes["mlp_bias"] = True
        attributes |= architecture.extra_config(own) | rope_config(own, architecture, rope)
    except KeyError as error:
        raise ModelError(f"the GGUF file has no metadata {architecture.name}.{error.args[0]}") from None
    for key, attribute in _TOKENS.items():
        if (value := metadata.get(f"tokenizer.ggml.{key}")) is not None:
            attributes[attribute] = int(value)
    attributes.setdefault("pad_token_id", None)
    if EMBEDDINGS_IN_GGUF in shapes:  # files of llama.cpp may have another number in the metadata, or none
        attributes["vocab_size"] = shapes[EMBEDDINGS_IN_GGUF][0]
    try:
        return AutoConfig.for_model(model_type, **attributes)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ModelError(
            f"the metadata of the GGUF file is not valid: {str(error).splitlines()[-1].strip()}"
        ) from error


def _head_attributes(own: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """Return the size of heads where the config has it, and the number of key-value heads."""
    heads = own["attention.head_count"]
    found = {"num_key_value_heads": own.get("attention.head_count_kv", heads)}
    if not all(isinstance(value, int) for value in (heads, found["num_key_value_heads"])):
        raise ModelError("the blocks of the GGUF file have different numbers of heads, which is not supported")
    size = int(own.get("attention.key_length", own["embedding_length"] // heads))
    if not model_type.startswith("deepseek"):
        found["head_dim"] = size
    return found
