"""Models on which mixes are compared with llama.cpp, and the compact form of its choices in mixes.json.

A choice is written as type → groups of tensors: `attn_v@0,2-4` are those of the blocks 0, 2, 3 and 4. Tensors of the
mix's own type are left out.
"""

import re
from collections import defaultdict
from itertools import groupby

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mowa.models.gguf import net_state, to_gguf
from tests.families.tiny import _CAUSAL

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
NINE = WIDE | {"num_hidden_layers": 9}
HEADS_OF_64 = {"head_dim": 64}
LATENT = WIDE | {
    **{"kv_lora_rank": 256, "q_lora_rank": 256, "moe_intermediate_size": 256, "num_key_value_heads": 8},
    **{"qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32},
}
ALTERNATING = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
CASES = {
    "llama": ("llama", NINE),
    "llama-24-layers": ("llama", WIDE | {"num_hidden_layers": 24, "num_key_value_heads": 8}),
    "llama-tied": ("llama", NINE | {"tie_word_embeddings": True}),
    "llama-rows-of-288": (
        "llama",
        NINE | {"hidden_size": 288, "intermediate_size": 480, "num_attention_heads": 9, "num_key_value_heads": 3},
    ),
    "llama-70b": ("llama", WIDE | {"num_hidden_layers": 80}),
    "qwen2-70b": ("qwen2", WIDE | {"num_hidden_layers": 80}),
    "mistral": ("mistral", WIDE),
    "ministral3": ("ministral3", WIDE | HEADS_OF_64),
    "mixtral-8-experts": ("mixtral", NINE | {"num_local_experts": 8}),
    "mixtral-4-experts": ("mixtral", NINE | {"num_local_experts": 4}),
    "qwen2": ("qwen2", NINE),
    "qwen2_moe": ("qwen2_moe", WIDE | {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 512}),
    "qwen3": ("qwen3", WIDE | HEADS_OF_64),
    "qwen3_moe": (
        "qwen3_moe",
        NINE | HEADS_OF_64 | {"mlp_only_layers": [], "norm_topk_prob": True, "moe_intermediate_size": 256},
    ),
    "gemma": ("gemma", WIDE),
    "gemma2": ("gemma2", WIDE | HEADS_OF_64 | ALTERNATING | {"query_pre_attn_scalar": 64}),
    "gemma3": ("gemma3_text", WIDE | HEADS_OF_64 | ALTERNATING | {"query_pre_attn_scalar": 64}),
    "phi3": ("phi3", NINE),
    "smollm3": ("smollm3", WIDE | {"num_hidden_layers": 8, "no_rope_layer_interval": 4}),
    "granite": ("granite", NINE),
    "granitemoe-8-experts": ("granitemoe", WIDE | {"num_local_experts": 8}),
    "deepseek_v2": ("deepseek_v2", LATENT),
    "deepseek_v3": ("deepseek_v3", LATENT | {"num_hidden_layers": 9}),
    "gpt_oss": ("gpt_oss", WIDE | HEADS_OF_64 | ALTERNATING),
}
# Cases in which an importance matrix changes choices.
WITH_IMPORTANCE = ("llama", "llama-24-layers")
IMPORTANT = ("q4_0", "q5_0", "iq4_nl", "iq4_xs")


def config_of(case):
    """Return the config of a case."""
    family, changes = CASES[case]
    return AutoConfig.for_model(family, **_CAUSAL[family] | changes)


def describe(case):
    """Return the metadata of a case, and the shapes of its tensors, without weights."""
    config = config_of(case)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    mapped = to_gguf(config, net_state(model))
    return mapped.metadata, {name: tensor.shape for name, tensor in mapped.tensors.items()}


def compact(types, base):
    """Return type → groups of tensors, for tensors whose type is not `base`."""
    blocks = defaultdict(lambda: defaultdict(list))
    for name, type_name in types.items():
        if type_name != base:
            match = re.fullmatch(r"blk\.(\d+)\.(.*)", name)
            blocks[type_name][match[2] if match else name].append(int(match[1]) if match else None)
    return {
        type_name: " ".join(
            kind if None in layers else f"{kind}@{_ranges(sorted(layers))}" for kind, layers in sorted(kinds.items())
        )
        for type_name, kinds in sorted(blocks.items())
    }


def _ranges(numbers):
    runs = [[value for _, value in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
