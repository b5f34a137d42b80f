"""Rules that several architectures share: names of tensors and keys."""

from __future__ import annotations

import dataclasses

from mowa.models.gguf.architecture import KeyRule, TensorRule, Transform
from mowa.models.gguf.transforms import ADD_ONE, INTERLEAVE_KEY, INTERLEAVE_QUERY, KEEP, SPLIT_GATE_UP

BASE_KEYS = (
    KeyRule("context_length", "max_position_embeddings"),
    KeyRule("embedding_length", "hidden_size"),
    KeyRule("block_count", "num_hidden_layers"),
    KeyRule("feed_forward_length", "intermediate_size"),
    KeyRule("attention.head_count", "num_attention_heads"),
    KeyRule("attention.layer_norm_rms_epsilon", "rms_norm_eps", "float32"),
    KeyRule("vocab_size", "vocab_size"),
)
KEYS = (*BASE_KEYS, KeyRule("attention.head_count_kv", "num_key_value_heads"))
EXPERT_KEYS = (KeyRule("expert_count", "num_local_experts"), KeyRule("expert_used_count", "num_experts_per_tok"))
EXPERT_SIZE = KeyRule("expert_feed_forward_length", "moe_intermediate_size")
SLIDING_WINDOW = KeyRule("attention.sliding_window", "sliding_window")
SCALES = (
    KeyRule("attention.scale", "attention_multiplier", "float32"),
    KeyRule("embedding_scale", "embedding_multiplier", "float32"),
    KeyRule("residual_scale", "residual_multiplier", "float32"),
    KeyRule("logit_scale", "logits_scaling", "float32"),
)


def rule(source: str, *targets: str, transform: Transform = KEEP, optional: bool = False) -> TensorRule:
    """Return a rule for a tensor of each block; names are shortened to what follows the block's prefix."""
    return TensorRule(
        f"model.layers.{{i}}.{source}", tuple(f"blk.{{i}}.{target}" for target in targets), transform, optional
    )


def linear(source: str, target: str, *, transform: Transform = KEEP, bias: bool = False) -> tuple[TensorRule, ...]:
    """Return rules for a linear layer; its bias, if it may have one, has the same layout as its output."""
    weight = rule(f"{source}.weight", f"{target}.weight", transform=transform)
    return (weight, rule(f"{source}.bias", f"{target}.bias", transform=transform, optional=True)) if bias else (weight,)


def optional_rules(rules: tuple[TensorRule, ...]) -> tuple[TensorRule, ...]:
    return tuple(dataclasses.replace(one, optional=True) for one in rules)


def attention(*, interleaved: bool, bias: bool = True, output_bias: bool = False) -> tuple[TensorRule, ...]:
    query, key = (INTERLEAVE_QUERY, INTERLEAVE_KEY) if interleaved else (KEEP, KEEP)
    return (
        *linear("self_attn.q_proj", "attn_q", transform=query, bias=bias),
        *linear("self_attn.k_proj", "attn_k", transform=key, bias=bias),
        *linear("self_attn.v_proj", "attn_v", bias=bias),
        *linear("self_attn.o_proj", "attn_output", bias=output_bias),
    )


def mlp(source: str = "mlp", suffix: str = "", *, bias: bool = False) -> tuple[TensorRule, ...]:
    return tuple(
        one
        for name in ("gate", "up", "down")
        for one in linear(f"{source}.{name}_proj", f"ffn_{name}{suffix}", bias=bias)
    )


def experts(source: str = "mlp", router: str = "gate") -> tuple[TensorRule, ...]:
    return (
        rule(f"{source}.{router}.weight", "ffn_gate_inp.weight"),
        rule(f"{source}.experts.gate_up_proj", "ffn_gate_exps.weight", "ffn_up_exps.weight", transform=SPLIT_GATE_UP),
        rule(f"{source}.experts.down_proj", "ffn_down_exps.weight"),
    )


def model(*, plus_one: bool = False) -> tuple[TensorRule, ...]:
    """Return the rules outside the blocks. The head is missing where it is the embeddings."""
    norm = ADD_ONE if plus_one else KEEP
    return (
        TensorRule("model.embed_tokens.weight", ("token_embd.weight",), KEEP),
        TensorRule("model.norm.weight", ("output_norm.weight",), norm),
        TensorRule("lm_head.weight", ("output.weight",), KEEP, optional=True),
    )


NORMS = (
    rule("input_layernorm.weight", "attn_norm.weight"),
    rule("post_attention_layernorm.weight", "ffn_norm.weight"),
)
HEAD_NORMS = (
    rule("self_attn.q_norm.weight", "attn_q_norm.weight"),
    rule("self_attn.k_norm.weight", "attn_k_norm.weight"),
)
GEMMA_NORMS = (
    rule("input_layernorm.weight", "attn_norm.weight", transform=ADD_ONE),
    rule("post_attention_layernorm.weight", "post_attention_norm.weight", transform=ADD_ONE),
    rule("pre_feedforward_layernorm.weight", "ffn_norm.weight", transform=ADD_ONE),
    rule("post_feedforward_layernorm.weight", "post_ffw_norm.weight", transform=ADD_ONE),
)
LLAMA_TENSORS = (
    *model(),
    *NORMS,
    *attention(interleaved=True, output_bias=True),
    *optional_rules(mlp(bias=True)),
    *optional_rules(experts()),
)
QWEN_TENSORS = (*model(), *NORMS, *attention(interleaved=False))
