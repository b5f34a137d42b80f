"""What single architectures have beyond rules: computed metadata, its inverse, and what llama.cpp cannot compute.

llama.cpp hard-codes much that a transformers config can change: which layers have a sliding window or no positions, how
queries are scaled, whether the weights of experts are normalized. A config that says something else is a problem, as
the file would load and give other logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mowa.models.gguf.architecture import head_dim

PATTERN_KEY = "attention.sliding_window_pattern"
GEMMA2_PERIOD, GEMMA3_PERIOD, GPT_OSS_PERIOD = 2, 6, 2
SMOLLM3_PERIOD = 4
_27B_LAYERS = (46, 62)  # Gemma 2 and 3 of 27B scale queries by the hidden size per head
_LITE_LAYERS = (26, 27)  # DeepSeek with these has no q_lora_rank, and with others it does
SIGMOID, SOFTMAX = 2, 1  # values of expert_gating_func
_SWIGLU = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}


def sliding_layers(count: int, period: int) -> list[bool]:
    """Return which layers have a sliding window: all but every `period`-th; all if it is 0."""
    return [period == 0 or (layer + 1) % period != 0 for layer in range(count)]


def _period(config: Any, default: int) -> int | None:
    """Return the period of a config's sliding layers, preferably the default; None if they have none."""
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    candidates = (default, *range(len(sliding) + 1))
    return next((period for period in candidates if sliding_layers(len(sliding), period) == sliding), None)


def _pattern_metadata(config: Any, default: int) -> dict[str, Any]:
    period = _period(config, default)
    return {} if period in (default, None) else {PATTERN_KEY: period}


def _pattern_problem(config: Any, default: int) -> str:
    if _period(config, default) is not None:
        return ""
    return "its layers with sliding windows follow no period, and llama.cpp has them in all layers but every n-th"


def _pattern_config(metadata: Mapping[str, Any], default: int) -> dict[str, Any]:
    count, pattern = int(metadata["block_count"]), metadata.get(PATTERN_KEY, default)
    sliding = sliding_layers(count, pattern) if isinstance(pattern, int) else [bool(one) for one in pattern]
    return {"layer_types": ["sliding_attention" if one else "full_attention" for one in sliding]}


def sliding_window_note(config: Any) -> str:
    """Say that llama.cpp has no sliding window here."""
    window = getattr(config, "sliding_window", None)
    if not window or not getattr(config, "use_sliding_window", True) or window >= config.max_position_embeddings:
        return ""
    return (
        f"its sliding window of {window} tokens is lost: llama.cpp attends to the whole context, so results differ"
        f" after {window} tokens"
    )


def ministral3_metadata(config: Any) -> dict[str, Any]:
    """Scale of attention for long contexts."""
    return {"attention.temperature_scale": float(config.rope_parameters["llama_4_scaling_beta"])}


def ministral3_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The beta goes into the rope parameters; see `rope`."""
    return {"sliding_window": None}


def qwen2_moe_problem(config: Any) -> str:
    """llama.cpp has experts in every layer, and does not normalize their weights."""
    if config.norm_topk_prob:
        return "norm_topk_prob is true, and llama.cpp does not normalize the weights of Qwen 2's experts"
    return _dense_layers_problem(config)


def qwen3_moe_problem(config: Any) -> str:
    """llama.cpp has experts in every layer, and normalizes their weights."""
    if not config.norm_topk_prob:
        return "norm_topk_prob is false, and llama.cpp normalizes the weights of Qwen 3's experts"
    return _dense_layers_problem(config)


def _dense_layers_problem(config: Any) -> str:
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        return "some of its layers have no experts, and llama.cpp needs them in all"
    return ""


def gemma_problem(config: Any) -> str:
    """Attention in both directions is for embeddings."""
    return "its attention is bidirectional" if config.use_bidirectional_attention else ""


def gemma2_metadata(config: Any) -> dict[str, Any]:
    """The pattern of sliding windows, if it is not Gemma 2's."""
    return _pattern_metadata(config, GEMMA2_PERIOD)


def gemma2_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Sliding layers, and the scale that llama.cpp derives from sizes."""
    return _pattern_config(metadata, GEMMA2_PERIOD) | _gemma_scale(metadata)


def gemma2_problem(config: Any) -> str:
    """Soft caps cannot be switched off."""
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if not getattr(config, name):
            return f"{name} is not set, and llama.cpp always caps the logits of Gemma 2"
    return gemma_problem(config) or _scale_problem(config) or _pattern_problem(config, GEMMA2_PERIOD)


def gemma3_metadata(config: Any) -> dict[str, Any]:
    """The pattern of sliding windows, if it is not Gemma 3's; the other base is in `rope`."""
    return _pattern_metadata(config, GEMMA3_PERIOD)


def gemma3_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Sliding layers, and the scale that llama.cpp derives from sizes."""
    return _pattern_config(metadata, GEMMA3_PERIOD) | _gemma_scale(metadata)


def gemma3_problem(config: Any) -> str:
    """Attention scores are not capped in Gemma 3."""
    if config.attn_logit_softcapping:
        return "attn_logit_softcapping is set, and llama.cpp does not cap the attention scores of Gemma 3"
    return gemma_problem(config) or _scale_problem(config) or _pattern_problem(config, GEMMA3_PERIOD)


def _query_scalar(layers: int, hidden: int, heads: int, size: int) -> int:
    """Return the number whose root llama.cpp divides Gemma's queries by."""
    return hidden // heads if layers in _27B_LAYERS else size


def _scale_problem(config: Any) -> str:
    sizes = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    expected = _query_scalar(*sizes, config.head_dim)
    if math.isclose(config.query_pre_attn_scalar, expected):
        return ""
    return f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, and llama.cpp uses {expected} for these sizes"


def _gemma_scale(metadata: Mapping[str, Any]) -> dict[str, Any]:
    names = "block_count", "embedding_length", "attention.head_count", "attention.key_length"
    return {"query_pre_attn_scalar": _query_scalar(*(int(metadata[name]) for name in names))}


def phi3_metadata(config: Any) -> dict[str, Any]:
    """llama.cpp reads the sliding window, and ignores it; 0 tells Phi 4 from Phi 3."""
    return {"attention.sliding_window": int(config.sliding_window or 0)}


def phi3_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The window that transformers applies."""
    return {"sliding_window": int(metadata.get("attention.sliding_window", 0)) or None}


def phi3_problem(config: Any) -> str:
    """Heads must fill the hidden size."""
    if head_dim(config) * config.num_attention_heads != config.hidden_size:
        return "its heads do not fill the hidden size, as llama.cpp needs them to in Phi 3"
    return ""


def phi3_note(config: Any) -> str:
    """Two choices of llama.cpp that depend on the length of the context."""
    notes = [sliding_window_note(config)]
    if config.rope_parameters.get("rope_type") == "longrope":
        original = config.rope_parameters["original_max_position_embeddings"]
        notes.append(f"llama.cpp takes the long rope factors if its context is larger than {original}, however short")
    return "; ".join(filter(None, notes))


def smollm3_problem(config: Any) -> str:
    """Every fourth layer has no positions."""
    expected = [int(one) for one in sliding_layers(config.num_hidden_layers, SMOLLM3_PERIOD)]
    if [int(one) for one in config.no_rope_layers] == expected:
        return ""
    return f"no_rope_layers is not every layer but each {SMOLLM3_PERIOD}th, as llama.cpp has it"


def smollm3_config(_: Mapping[str, Any]) -> dict[str, Any]:
    """Every fourth layer has no positions."""
    return {"no_rope_layer_interval": SMOLLM3_PERIOD, "no_rope_layers": None}


def deepseek_metadata(config: Any) -> dict[str, Any]:
    """Sizes of attention over the latent, which is one key-value head, and how experts are chosen."""
    sigmoid = config.model_type == "deepseek_v3"
    found: dict[str, Any] = {
        "attention.head_count_kv": 1,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "expert_gating_func": SIGMOID if sigmoid else SOFTMAX,
    }
    if sigmoid:
        found |= {
            "expert_weights_norm": bool(config.norm_topk_prob),
            "expert_group_count": config.n_group,
            "expert_group_used_count": config.topk_group,
        }
    return found


def deepseek_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `deepseek_metadata`."""
    groups = int(metadata.get("expert_group_count", 1))
    found: dict[str, Any] = {
        "num_key_value_heads": int(metadata["attention.head_count"]),
        "qk_nope_head_dim": int(metadata["attention.key_length_mla"]) - int(metadata["rope.dimension_count"]),
        "q_lora_rank": metadata.get("attention.q_lora_rank"),
        "n_group": groups,
        "topk_group": int(metadata.get("expert_group_used_count", 1)),
    }
    if deepseek_model_type(metadata) == "deepseek_v3":
        return found | {"norm_topk_prob": bool(metadata.get("expert_weights_norm", False))}
    return found | {"topk_method": "greedy"}


def deepseek_model_type(metadata: Mapping[str, Any]) -> str:
    """V3 scores experts by a sigmoid."""
    return "deepseek_v3" if metadata.get("expert_gating_func", SOFTMAX) == SIGMOID else "deepseek_v2"


def deepseek_problem(config: Any) -> str:
    """Biases, another order of rotated dimensions, V2's choice of groups, and queries from a latent."""
    if config.attention_bias:
        return "attention_bias is true, and llama.cpp has no such biases in DeepSeek"
    if not getattr(config, "rope_interleave", True):
        return "rope_interleave is false, and llama.cpp rotates neighbouring dimensions of DeepSeek"
    if getattr(config, "topk_method", "greedy") == "group_limited_greedy" and config.n_group > 1:
        return "topk_method is group_limited_greedy, and llama.cpp chooses groups by the sum of their two best experts"
    if (config.q_lora_rank is None) != (config.num_hidden_layers in _LITE_LAYERS):
        return (
            f"q_lora_rank is {config.q_lora_rank} with {config.num_hidden_layers} layers, and llama.cpp has none with"
            f" {' or '.join(map(str, _LITE_LAYERS))} layers only"
        )
    return _deepseek_rope_problem(config.rope_parameters)


def _deepseek_rope_problem(rope: Mapping[str, Any]) -> str:
    """llama.cpp derives the scale of attention from one number."""
    if rope["rope_type"] != "yarn":
        return ""
    if not rope.get("mscale") or rope["mscale"] != rope.get("mscale_all_dim"):
        return "mscale and mscale_all_dim of its YaRN are not equal, as llama.cpp needs them to be"
    return "attention_factor of its YaRN is set" if rope.get("attention_factor") else ""


def gpt_oss_metadata(config: Any) -> dict[str, Any]:
    """The pattern of sliding windows, if it is not gpt-oss's."""
    return _pattern_metadata(config, GPT_OSS_PERIOD)


def gpt_oss_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Sliding layers."""
    return _pattern_config(metadata, GPT_OSS_PERIOD)


def gpt_oss_problem(config: Any) -> str:
    """The gate of the experts is hard-coded."""
    for name, expected in _SWIGLU.items():
        if not math.isclose(found := getattr(config, name, expected), expected):
            return f"{name} is {found}, and llama.cpp uses {expected}"
    return _pattern_problem(config, GPT_OSS_PERIOD)


def gpt_oss_note(config: Any) -> str:
    """llama.cpp rounds the ends of YaRN's ramp."""
    if config.rope_parameters["rope_type"] != "yarn" or config.rope_parameters.get("truncate", True):
        return ""
    return "llama.cpp rounds the ends of YaRN's ramp to whole dimensions, and this model does not: logits differ a bit"
