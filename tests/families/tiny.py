"""A tiny net with random weights for every text family: seeded, float32, on the CPU, in eval mode."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

VOCABULARY = 99
WINDOW = 8

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED: dict[str, Any] = _SIZES | {"num_key_value_heads": 2}
_HEADS_OF_16: dict[str, Any] = _GROUPED | {"head_dim": 16}  # not hidden_size / heads, as Gemma, Qwen3 and gpt-oss have
_ALTERNATING: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": WINDOW,
}
_LATENT: dict[str, Any] = _SIZES | {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_FOUR_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MULTIPLIERS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}

_STRETCHED = {"rope_type": "yarn", "rope_theta": 10_000.0, "beta_fast": 32.0, "beta_slow": 1.0}

_CAUSAL: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "smollm3": _GROUPED | {"num_hidden_layers": 4, "no_rope_layer_interval": 2},
    "mistral": _GROUPED | {"sliding_window": WINDOW},
    "ministral": _HEADS_OF_16 | _ALTERNATING,
    "ministral3": _HEADS_OF_16
    | {
        "rope_parameters": _STRETCHED
        | {"factor": 16.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
        | {"original_max_position_embeddings": 16}
    },
    "mixtral": _GROUPED | _LOCAL_EXPERTS | {"sliding_window": WINDOW},
    "qwen2": _GROUPED,
    "qwen2_moe": _GROUPED | _FOUR_EXPERTS | {"shared_expert_intermediate_size": 40},
    "qwen3": _HEADS_OF_16,
    "qwen3_moe": _HEADS_OF_16 | _FOUR_EXPERTS | {"num_hidden_layers": 3, "mlp_only_layers": [0]},
    "gemma": _HEADS_OF_16 | {"num_key_value_heads": 1},
    "gemma2": _HEADS_OF_16 | _ALTERNATING | {"query_pre_attn_scalar": 16},
    "gemma3_text": _HEADS_OF_16 | _ALTERNATING | {"query_pre_attn_scalar": 16},
    "phi": _SIZES,
    "phi3": _GROUPED | {"sliding_window": WINDOW},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "granite": _GROUPED | _MULTIPLIERS | {"logits_scaling": 4.0},
    "granitemoe": _GROUPED | _LOCAL_EXPERTS | _MULTIPLIERS | {"logits_scaling": 4.0},
    "olmo2": _GROUPED,
    "olmo3": _GROUPED | _ALTERNATING,
    "glm": _HEADS_OF_16,
    "glm4": _HEADS_OF_16,
    "cohere": _GROUPED | {"use_qk_norm": True, "logit_scale": 0.5},
    "cohere2": _HEADS_OF_16 | _ALTERNATING | {"logit_scale": 0.5},
    "starcoder2": _GROUPED | {"sliding_window": WINDOW, "initializer_range": 0.05},
    "gpt_neox": _SIZES,
    "llama4_text": _HEADS_OF_16
    | _LOCAL_EXPERTS
    | {"intermediate_size_mlp": 40, "interleave_moe_layer_step": 2, "num_hidden_layers": 4}
    | {"attention_chunk_size": WINDOW, "floor_scale": 4},  # both count from the start of a row
    "gpt_oss": _HEADS_OF_16
    | _ALTERNATING
    | _LOCAL_EXPERTS
    | {"rope_parameters": _STRETCHED | {"factor": 32.0, "truncate": False, "original_max_position_embeddings": 8}},
}
_ENCODERS: dict[str, dict[str, Any]] = {
    "bert": _SIZES,
    "mpnet": _SIZES,
    "modernbert": _SIZES
    | {
        "num_hidden_layers": 4,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "local_attention": 2 * WINDOW,
    }
    | {"cls_token_id": 1, "sep_token_id": 2},
}
_EYES: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "text_config": _GROUPED
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}},
        "vision_config": {
            **{"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32},
            **{"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]},
        },
        **{"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93},
    },
    "gemma3": {
        "text_config": _CAUSAL["gemma3_text"],
        "vision_config": {
            **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"image_size": 16, "patch_size": 4},
        },
        **{"mm_tokens_per_image": 4, "image_token_id": 90, "boi_token_id": 91, "eoi_token_id": 92},
    },
}
CAUSAL = tuple(_CAUSAL)
VISION = tuple(_EYES)
EMBEDDING = tuple(_ENCODERS)
TEXT = CAUSAL + VISION + EMBEDDING


def tiny(family_name: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Return a tiny net of that family; `overrides` are keys of its config, or of its text config if it has one."""
    torch.manual_seed(seed)
    if family_name in _EYES:
        parts = _EYES[family_name]
        config = AutoConfig.for_model(family_name, **parts | {"text_config": parts["text_config"] | overrides})
        net = AutoModelForImageTextToText.from_config(config)
    elif family_name in _ENCODERS:
        config = AutoConfig.for_model(family_name, **_ENCODERS[family_name] | overrides)
        net = AutoModel.from_config(config)
    else:
        config = AutoConfig.for_model(family_name, **_CAUSAL[family_name] | overrides)
        net = AutoModelForCausalLM.from_config(config)
    _perturb(net)
    return net.float().eval()


@torch.no_grad()
def _perturb(net: PreTrainedModel) -> None:
    """Make weights large enough to matter, and norms' weights and biases different from 1 and 0."""
    for name, weight in net.named_parameters():
        if weight.ndim == 1 or "bias" in name:
            weight.add_(torch.randn_like(weight) * 0.1)
        elif "router" not in name:
            weight.mul_(5)
