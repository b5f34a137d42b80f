"""How an architecture is described: rules for tensors, for metadata, and for what llama.cpp cannot compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Transform:
    """A change of layout between transformers and GGUF.

    forward  a tensor of transformers and the config → one or several tensors of GGUF, views where possible
    inverse  those tensors and the config → the tensor of transformers
    """

    forward: Callable[[Tensor, Any], tuple[Tensor, ...]]
    inverse: Callable[[Sequence[Tensor], Any], Tensor]


@dataclass(frozen=True, slots=True)
class TensorRule:
    """A tensor of the state dict and what GGUF has instead; `{i}` is the number of a block."""

    source: str
    targets: tuple[str, ...]
    transform: Transform
    optional: bool = False


@dataclass(frozen=True, slots=True)
class KeyRule:
    """A metadata key, after the name of the architecture and a dot, and the attribute of the config that it holds."""

    key: str
    attribute: str
    value_type: str = "uint32"


def _nothing(_: Any) -> dict[str, Any]:
    return {}


def _no_problem(_: Any) -> str:
    return ""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A value of `general.architecture` and the models of transformers that it stands for.

    name                 value of `general.architecture`
    model_types          values of `model_type` in transformers configs
    keys, tensors        rules that need no computation
    activation           of the MLP, as transformers calls it; llama.cpp computes no other
    rope_types           `rope_type` of transformers that llama.cpp computes here
    tied                 whether the head is the embeddings: `always`, `never`, or `optional`
    yarn_log_multiplier  factor of YaRN's `mscale_all_dim` in its key; 0: the key is not read
    extra_metadata       config → further metadata, with keys as in `KeyRule`
    extra_config         metadata with keys as in `KeyRule` → further attributes of the config
    model_type           metadata → which of `model_types` the file holds
    problem              config → what llama.cpp cannot compute; empty if nothing
    note                 config → how llama.cpp deviates where that is accepted; empty if it does not
    """

    name: str
    model_types: tuple[str, ...]
    keys: tuple[KeyRule, ...]
    tensors: tuple[TensorRule, ...]
    activation: str = "silu"
    rope_types: frozenset[str] = frozenset({"default", "linear", "yarn"})
    tied: str = "optional"
    yarn_log_multiplier: float = 0.0
    extra_metadata: Callable[[Any], dict[str, Any]] = _nothing
    extra_config: Callable[[Mapping[str, Any]], dict[str, Any]] = _nothing
    model_type: Callable[[Mapping[str, Any]], str] | None = None
    problem: Callable[[Any], str] = _no_problem
    note: Callable[[Any], str] = _no_problem


def head_dim(config: Any) -> int:
    """Return the size of a query and key head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
