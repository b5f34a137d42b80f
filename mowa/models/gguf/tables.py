"""The architectures: which tensor is called what, which attribute of the config is which key."""

from __future__ import annotations

import dataclasses
from typing import Any

from mowa.errors import ModelError
from mowa.models.gguf import specifics
from mowa.models.gguf.architecture import Architecture, KeyRule
from mowa.models.gguf.rules import (
    BASE_KEYS,
    EXPERT_KEYS,
    EXPERT_SIZE,
    GEMMA_NORMS,
    HEAD_NORMS,
    KEYS,
    LLAMA_TENSORS,
    NORMS,
    QWEN_TENSORS,
    SCALES,
    SLIDING_WINDOW,
    attention,
    experts,
    linear,
    mlp,
    model,
    optional_rules,
    rule,
)
from mowa.models.gguf.transforms import (
    ADD_ONE,
    DROP_FIRST,
    SPLIT_BIAS_IN_TURNS,
    SPLIT_GATE_UP_IN_TURNS,
    SPLIT_LATENT,
    TRANSPOSE,
)

_ALL_ROPE_TYPES = frozenset({"default", "linear", "yarn", "llama3", "longrope"})

ARCHITECTURES = (
    Architecture(
        name="llama",
        model_types=("llama", "mistral", "mixtral"),
        keys=(*KEYS, *EXPERT_KEYS),
        tensors=LLAMA_TENSORS,
        rope_types=_ALL_ROPE_TYPES,
        model_type=lambda metadata: "mixtral" if metadata.get("expert_count") else "llama",
        note=specifics.sliding_window_note,
    ),
    Architecture(
        name="mistral3",
        model_types=("ministral3",),
        keys=KEYS,
        tensors=(*model(), *NORMS, *attention(interleaved=True), *mlp()),
        rope_types=frozenset({"yarn"}),
        yarn_log_multiplier=1.0,
        extra_metadata=specifics.ministral3_metadata,
        extra_config=specifics.ministral3_config,
        note=specifics.sliding_window_note,
    ),
    Architecture(
        name="qwen2",
        model_types=("qwen2",),
        keys=KEYS,
        tensors=(*QWEN_TENSORS, *mlp()),
        note=specifics.sliding_window_note,
    ),
    Architecture(
        name="qwen2moe",
        model_types=("qwen2_moe",),
        keys=(
            *KEYS,
            KeyRule("expert_count", "num_experts"),
            EXPERT_KEYS[1],
            EXPERT_SIZE,
            KeyRule("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
        ),
        tensors=(
            *QWEN_TENSORS,
            *experts(),
            *mlp("mlp.shared_expert", "_shexp"),
            rule("mlp.shared_expert_gate.weight", "ffn_gate_inp_shexp.weight", transform=DROP_FIRST),
        ),
        extra_config=lambda _: {"norm_topk_prob": False},
        problem=specifics.qwen2_moe_problem,
        note=specifics.sliding_window_note,
    ),
    Architecture(
        name="qwen3",
        model_types=("qwen3",),
        keys=KEYS,
        tensors=(*QWEN_TENSORS, *HEAD_NORMS, *mlp()),
        note=specifics.sliding_window_note,
    ),
    Architecture(
        name="qwen3moe",
        model_types=("qwen3_moe",),
        keys=(*KEYS, *EXPERT_KEYS, EXPERT_SIZE),
        tensors=(*QWEN_TENSORS, *HEAD_NORMS, *experts()),
        extra_config=lambda _: {"norm_topk_prob": True},
        problem=specifics.qwen3_moe_problem,
        note=specifics.sliding_window_note,
    ),
    Architecture(
        name="gemma",
        model_types=("gemma",),
        keys=KEYS,
        tensors=(
            *model(plus_one=True),
            rule("input_layernorm.weight", "attn_norm.weight", transform=ADD_ONE),
            rule("post_attention_layernorm.weight", "ffn_norm.weight", transform=ADD_ONE),
            *attention(interleaved=False, bias=False),
            *mlp(),
        ),
        activation="gelu_pytorch_tanh",
        rope_types=frozenset({"default"}),
        tied="always",
        problem=specifics.gemma_problem,
    ),
    Architecture(
        name="gemma2",
        model_types=("gemma2",),
        keys=(
            *KEYS,
            SLIDING_WINDOW,
            KeyRule("attn_logit_softcapping", "attn_logit_softcapping", "float32"),
            KeyRule("final_logit_softcapping", "final_logit_softcapping", "float32"),
        ),
        tensors=(
            *model(plus_one=True),
            *GEMMA_NORMS,
            *attention(interleaved=False, bias=False),
            *mlp(),
        ),
        activation="gelu_pytorch_tanh",
        rope_types=frozenset({"default"}),
        tied="always",
        extra_metadata=specifics.gemma2_metadata,
        extra_config=specifics.gemma2_config,
        problem=specifics.gemma2_problem,
    ),
    Architecture(
        name="gemma3",
        model_types=("gemma3_text",),
        keys=(*KEYS, SLIDING_WINDOW, KeyRule("final_logit_softcapping", "final_logit_softcapping", "float32")),
        tensors=(
            *model(plus_one=True),
            *GEMMA_NORMS,
            *(dataclasses.replace(one, transform=ADD_ONE) for one in HEAD_NORMS),
            *attention(interleaved=False, bias=False),
            *mlp(),
        ),
        activation="gelu_pytorch_tanh",
        rope_types=frozenset({"default", "linear"}),
        tied="always",
        extra_metadata=specifics.gemma3_metadata,
        extra_config=specifics.gemma3_config,
        problem=specifics.gemma3_problem,
    ),
    Architecture(
        name="phi3",
        model_types=("phi3",),
        keys=KEYS,
        tensors=(
            *model(),
            *NORMS,
            *linear("self_attn.qkv_proj", "attn_qkv"),
            *linear("self_attn.o_proj", "attn_output"),
            *linear("mlp.gate_up_proj", "ffn_up"),
            *linear("mlp.down_proj", "ffn_down"),
        ),
        rope_types=frozenset({"default", "longrope"}),
        extra_metadata=specifics.phi3_metadata,
        extra_config=specifics.phi3_config,
        problem=specifics.phi3_problem,
        note=specifics.phi3_note,
    ),
    Architecture(
        name="smollm3",
        model_types=("smollm3",),
        keys=KEYS,
        tensors=(*model(), *NORMS, *attention(interleaved=True), *mlp()),
        extra_config=specifics.smollm3_config,
        problem=specifics.smollm3_problem,
        note=specifics.sliding_window_note,
    ),
    Architecture(
        name="granite",
        model_types=("granite",),
        keys=(*KEYS, *SCALES),
        tensors=(*model(), *NORMS, *attention(interleaved=True, output_bias=True), *mlp(bias=True)),
        rope_types=_ALL_ROPE_TYPES,
    ),
    Architecture(
        name="granitemoe",
        model_types=("granitemoe",),
        keys=(*KEYS, *SCALES, *EXPERT_KEYS),
        tensors=(
            *model(),
            *NORMS,
            *attention(interleaved=True, output_bias=True),
            *experts("block_sparse_moe", "router"),
        ),
        rope_types=_ALL_ROPE_TYPES,
    ),
    Architecture(
        name="deepseek2",
        model_types=("deepseek_v2", "deepseek_v3"),
        keys=(
            *BASE_KEYS,
            KeyRule("attention.q_lora_rank", "q_lora_rank"),
            KeyRule("attention.kv_lora_rank", "kv_lora_rank"),
            KeyRule("attention.value_length_mla", "v_head_dim"),
            KeyRule("rope.dimension_count", "qk_rope_head_dim"),
            KeyRule("leading_dense_block_count", "first_k_dense_replace"),
            KeyRule("expert_count", "n_routed_experts"),
            KeyRule("expert_shared_count", "n_shared_experts"),
            KeyRule("expert_weights_scale", "routed_scaling_factor", "float32"),
            EXPERT_KEYS[1],
            EXPERT_SIZE,
        ),
        tensors=(
            *model(),
            *NORMS,
            *optional_rules(linear("self_attn.q_proj", "attn_q")),
            *optional_rules(linear("self_attn.q_a_proj", "attn_q_a")),
            *optional_rules(linear("self_attn.q_b_proj", "attn_q_b")),
            rule("self_attn.q_a_layernorm.weight", "attn_q_a_norm.weight", optional=True),
            *linear("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa"),
            rule("self_attn.kv_a_layernorm.weight", "attn_kv_a_norm.weight"),
            rule("self_attn.kv_b_proj.weight", "attn_k_b.weight", "attn_v_b.weight", transform=SPLIT_LATENT),
            *linear("self_attn.o_proj", "attn_output"),
            *optional_rules(mlp()),
            *optional_rules(experts()),
            *optional_rules(mlp("mlp.shared_experts", "_shexp")),
            rule("mlp.gate.e_score_correction_bias", "exp_probs_b.bias", optional=True),
        ),
        rope_types=frozenset({"default", "yarn"}),
        yarn_log_multiplier=0.1,
        extra_metadata=specifics.deepseek_metadata,
        extra_config=specifics.deepseek_config,
        model_type=specifics.deepseek_model_type,
        problem=specifics.deepseek_problem,
    ),
    Architecture(
        name="gpt-oss",
        model_types=("gpt_oss",),
        keys=(*KEYS, *EXPERT_KEYS, KeyRule("expert_feed_forward_length", "intermediate_size"), SLIDING_WINDOW),
        tensors=(
            *model(),
            rule("input_layernorm.weight", "attn_norm.weight"),
            rule("post_attention_layernorm.weight", "post_attention_norm.weight"),
            *attention(interleaved=False, output_bias=True),
            rule("self_attn.sinks", "attn_sinks.weight"),
            rule("mlp.router.weight", "ffn_gate_inp.weight"),
            rule("mlp.router.bias", "ffn_gate_inp.bias"),
            rule(
                "mlp.experts.gate_up_proj",
                *("ffn_gate_exps.weight", "ffn_up_exps.weight"),
                transform=SPLIT_GATE_UP_IN_TURNS,
            ),
            rule(
                "mlp.experts.gate_up_proj_bias",
                *("ffn_gate_exps.bias", "ffn_up_exps.bias"),
                transform=SPLIT_BIAS_IN_TURNS,
            ),
            rule("mlp.experts.down_proj", "ffn_down_exps.weight", transform=TRANSPOSE),
            rule("mlp.experts.down_proj_bias", "ffn_down_exps.bias"),
        ),
        tied="never",
        extra_metadata=specifics.gpt_oss_metadata,
        extra_config=specifics.gpt_oss_config,
        problem=specifics.gpt_oss_problem,
        note=specifics.gpt_oss_note,
    ),
)
_BY_MODEL_TYPE = {model_type: one for one in ARCHITECTURES for model_type in one.model_types}
_BY_NAME = {one.name: one for one in ARCHITECTURES}


def list_model_types() -> tuple[str, ...]:
    """Return the model types of transformers that can be written as GGUF, sorted."""
    return tuple(sorted(_BY_MODEL_TYPE))


def find_architecture(config: Any) -> Architecture:
    """Return the architecture of a transformers config. Raises ModelError if GGUF is not supported for it."""
    model_type = getattr(config, "model_type", "")
    if model_type not in _BY_MODEL_TYPE:
        raise ModelError(f"{model_type} cannot be written as GGUF; supported are {', '.join(list_model_types())}")
    return _BY_MODEL_TYPE[model_type]


def architecture_named(name: str) -> Architecture:
    """Return the architecture of a GGUF file. Raises ModelError if it is unknown."""
    if name not in _BY_NAME:
        raise ModelError(f"GGUF models of architecture {name!r} cannot be read; supported are {', '.join(_BY_NAME)}")
    return _BY_NAME[name]
