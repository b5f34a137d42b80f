"""Causal language models of transformers as llama.cpp has them in GGUF, in both directions.

Start with `to_gguf`, which turns a config and a state dict into metadata and lazily computed tensors, and `config` and
`restore`, which undo it. `tables` says for each architecture which tensor is called what, `rope` handles scaled
positions, and `state` reads state dicts tensor by tensor. Quantization is elsewhere.

Source: the converter and the model definitions of llama.cpp (MIT), build 10434.
"""

from mowa.models.gguf.convert import GGUFModel, Restoration, restore, to_gguf
from mowa.models.gguf.state import LazyTensor, checkpoint_state, net_state
from mowa.models.gguf.tables import ARCHITECTURES, find_architecture, list_model_types
from mowa.models.gguf.validation import validate_metadata

__all__ = [
    "ARCHITECTURES",
    "GGUFModel",
    "LazyTensor",
    "Restoration",
    "checkpoint_state",
    "find_architecture",
    "list_model_types",
    "net_state",
    "restore",
    "to_gguf",
    "validate_metadata",
]
