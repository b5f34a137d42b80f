"""CTC encoders in GGUF: which key holds which attribute of the config, and what tensors are called. Both directions.

Keys begin with the architecture, `wav2vec2-ctc`. Those in `KEYS` are always there, if the model has such an attribute;
any other attribute whose value is not the default of its `model_type` is `config.NAME`. Tensors have the names of the
state dict without the prefix of the base model, shortened by `_RENAMED`. Weight norm is folded into the weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mowa.errors import ModelError
from mowa.io.gguf.types import MAX_NAME_BYTES
from mowa.models.ctc_encoder.chunk_mask import STREAMING_CONFIG_KEY
from mowa.models.ctc_encoder.geometry import POSITIONS_CONFIG_KEY

ARCHITECTURE = "wav2vec2-ctc"
MODEL_TYPE = "model_type"
KEYS: Mapping[str, str] = {
    "vocab_size": "vocab_size",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "activation": "hidden_act",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "attention.norm_first": "do_stable_layer_norm",
    "attention.relative_buckets": "num_buckets",
    "attention.relative_max_distance": "max_bucket_distance",
    "conv.channels": "conv_dim",
    "conv.kernel_sizes": "conv_kernel",
    "conv.strides": "conv_stride",
    "conv.bias": "conv_bias",
    "conv.norm": "feat_extract_norm",
    "conv.activation": "feat_extract_activation",
    "projection.norm": "feat_proj_layer_norm",
    "position.kernel_size": "num_conv_pos_embeddings",  # see `_STACKED_KEYS`
    "position.groups": "num_conv_pos_embedding_groups",
    "position.batch_norm": "conv_pos_batch_norm",
    "position.last_absolute": POSITIONS_CONFIG_KEY,
    "adapter.enabled": "add_adapter",
    "adapter.kernel_size": "adapter_kernel_size",
    "adapter.stride": "adapter_stride",
    "adapter.block_count": "num_adapter_layers",
    "adapter.embedding_length": "output_hidden_size",
    "bottleneck.embedding_length": "adapter_attn_dim",
}
_STACKED_KEYS = {"position.kernel_size": "conv_pos_kernel_size", "position.block_count": "num_conv_pos_embeddings"}
_OTHER = "config."
_STREAMING = ("chunk_frames", "left_context_frames", "lookahead_frames")
_BOOKKEEPING = frozenset(
    "architectures transformers_version dtype torch_dtype model_type _name_or_path id2label label2id tokenizer_class "
    "num_feat_extract_layers gradient_checkpointing processor_class".split()
)
_RENAMED = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^encoder\.layers\.(\d+)\.", r"blk.\1."),
        (r"^feature_extractor\.conv_layers\.(\d+)\.conv\.", r"conv.\1."),
        (r"^feature_extractor\.conv_layers\.(\d+)\.layer_norm\.", r"conv.\1.norm."),
        (r"^feature_projection\.projection\.", "proj."),
        (r"^feature_projection\.layer_norm\.", "proj_norm."),
        (r"^encoder\.pos_conv_embed\.(?:layers\.)?((?:\d+\.)?)conv\.", r"pos_conv.\1"),
        (r"^encoder\.pos_conv_embed\.", "pos_conv."),
        (r"^encoder\.layer_norm\.", "enc_norm."),
        (r"^lm_head\.", "output."),
        (r"^(blk\.\d+)\.attention\.([qkv])_proj\.", r"\1.attn_\2."),
        (r"^(blk\.\d+)\.attention\.out_proj\.", r"\1.attn_output."),
        (r"^(blk\.\d+)\.attention\.", r"\1.attn_"),  # WavLM's relative positions
        (r"^(blk\.\d+)\.layer_norm\.", r"\1.attn_norm."),
        (r"^(blk\.\d+)\.final_layer_norm\.", r"\1.ffn_norm."),
        (r"^(blk\.\d+)\.feed_forward\.intermediate_dense\.", r"\1.ffn_up."),
        (r"^(blk\.\d+)\.feed_forward\.output_dense\.", r"\1.ffn_down."),
    )
)
_NORMED = re.compile(r"(.*\.)parametrizations\.weight\.original([01])")


def config_metadata(config: Any) -> dict[str, Any]:
    """Return what a file says about the config of a CTC encoder.

    Raises ModelError if an attribute that is not the default has a type that GGUF does not have.
    """
    found: dict[str, Any] = {MODEL_TYPE: config.model_type}
    keys = _keys(config)
    for key, attribute in keys.items():
        if (value := getattr(config, attribute, None)) is not None:
            found[key] = _typed(value)
    for name in _STREAMING:
        if (value := (getattr(config, STREAMING_CONFIG_KEY, None) or {}).get(name)) is not None:
            found[f"{STREAMING_CONFIG_KEY}.{name}"] = _typed(value)
    taken = {*keys.values(), *_BOOKKEEPING, STREAMING_CONFIG_KEY}
    for attribute, value in config.to_diff_dict().items():
        if attribute not in taken and isinstance(value, bool | int | float | str):
            found[f"{_OTHER}{attribute}"] = _typed(value)
    return {f"{ARCHITECTURE}.{key}": value for key, value in found.items()}


def read_config(metadata: Mapping[str, Any]) -> Any:
    """Return the transformers config that a file describes. Raises ModelError if it is not a valid one."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    prefix = f"{ARCHITECTURE}."
    own = {key.removeprefix(prefix): _plain(value) for key, value in metadata.items() if key.startswith(prefix)}
    model_type = str(own.get(MODEL_TYPE))
    try:
        keys = _keys(AutoConfig.for_model(model_type))
        attributes = {attribute: own[key] for key, attribute in keys.items() if key in own}
        attributes |= {key.removeprefix(_OTHER): value for key, value in own.items() if key.startswith(_OTHER)}
        config = AutoConfig.for_model(model_type, **attributes)
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ModelError(f"the metadata of the GGUF file describes no {model_type} model: {reason:.200}") from error
    streaming = {name: own[key] for name in _STREAMING if (key := f"{STREAMING_CONFIG_KEY}.{name}") in own}
    if streaming:
        setattr(config, STREAMING_CONFIG_KEY, dict.fromkeys(_STREAMING) | streaming)
    return config


def _keys(config: Any) -> dict[str, str]:
    """Return key → attribute. data2vec has a stack of positional convolutions, and the others have one."""
    return {**KEYS, **(_STACKED_KEYS if hasattr(config, "conv_pos_kernel_size") else {})}


def _typed(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return np.array(value, np.uint32)
    return np.float32(value) if isinstance(value, float) else value


def _plain(value: Any) -> Any:
    """Return a value of Python; a float32 as the shortest number that it stands for: 1e-05, not 9.99999974e-06."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return float(str(np.float32(value))) if isinstance(value, float) else value


def tensor_names(state_names: Iterable[str], base_prefix: str) -> dict[str, str]:
    """Return name in the state dict → name in GGUF; both parts of a weight with weight norm have that of the weight.

    Raises ModelError if two tensors would have the same name, or one is too long.
    """
    found: dict[str, str] = {}
    for name in state_names:
        short = _NORMED.sub(r"\1weight", name.removeprefix(f"{base_prefix}."))
        for pattern, replacement in _RENAMED:
            short = pattern.sub(replacement, short)
        if len(short.encode()) > MAX_NAME_BYTES:
            raise ModelError(f"{name} is {short!r} in GGUF, longer than {MAX_NAME_BYTES} bytes")
        found[name] = short
    folded = [short for name, short in found.items() if not name.endswith(".parametrizations.weight.original1")]
    if len(set(folded)) != len(folded):
        twice = next(name for name in folded if folded.count(name) > 1)
        raise ModelError(f"two tensors of this model would be called {twice} in GGUF")
    return found


def weight_norm_part(name: str) -> int | None:
    """Return 0 for the magnitude and 1 for the direction of a weight with weight norm; None for any other tensor."""
    found = _NORMED.fullmatch(name)
    return int(found[2]) if found else None
