"""Tiny random models of every architecture, with variants, and GGUF files of them in float32."""

from functools import cache

import torch

from mowa.io.gguf import TensorInfo, open_writer
from mowa.models.gguf import net_state, to_gguf
from tests.families.tiny import VOCABULARY, tiny

YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    **{"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 256},
    **{"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]},
}
SEVEN_LAYERS = {
    "num_hidden_layers": 7,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
}
LITE = {"q_lora_rank": None, "num_hidden_layers": 27}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
CASES = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-wide-heads": ("llama", {"head_dim": 16}),
    "llama-3.1": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-yarn-changed": (
        "llama",
        {"rope_parameters": YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3}},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "ministral3": ("ministral3", {}),
    "ministral3-other-scale": (
        "ministral3",
        {"rope_parameters": YARN | {"mscale": 0.8, "mscale_all_dim": 0.5, "llama_4_scaling_beta": 0.1}},
    ),
    "mixtral": ("mixtral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {"mlp_only_layers": [], "norm_topk_prob": True}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma2-other-pattern": ("gemma2", {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}),
    "gemma3": ("gemma3_text", SEVEN_LAYERS),
    "gemma3-other-pattern": ("gemma3_text", {}),
    "gemma3-soft-cap": ("gemma3_text", SEVEN_LAYERS | {"final_logit_softcapping": 20.0}),
    "gemma3-linear": (
        "gemma3_text",
        SEVEN_LAYERS
        | {
            "rope_parameters": {
                "full_attention": LINEAR | {"rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            }
        },
    ),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3-partial": (
        "phi3",
        {
            "sliding_window": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    "phi3-longrope": (
        "phi3",
        {
            **{"sliding_window": None, "max_position_embeddings": 1024, "original_max_position_embeddings": 256},
            "rope_parameters": LONGROPE,
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 4}),
    "granite": ("granite", {}),
    "granite-tied": ("granite", {"tie_word_embeddings": True}),
    "granitemoe": ("granitemoe", {}),
    "deepseek_v2": ("deepseek_v2", {}),
    "deepseek_v2-lite": ("deepseek_v2", LITE),
    "deepseek_v2-yarn": ("deepseek_v2", {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}}),
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v3-raw-weights": ("deepseek_v3", {"norm_topk_prob": False}),
    "deepseek_v3-yarn": ("deepseek_v3", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
    "gpt_oss": ("gpt_oss", {"rope_parameters": YARN | {"truncate": True}}),
    "gpt_oss-tied": ("gpt_oss", {"rope_parameters": YARN | {"truncate": True}, "tie_word_embeddings": True}),
}
NO_TOKENIZER = {"tokenizer.ggml.model": "none"}
MINIMAL_TOKENIZER = {
    **{"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"},
    "tokenizer.ggml.tokens": [*(chr(33 + index) for index in range(VOCABULARY - 1)), '!"'],
    "tokenizer.ggml.token_type": [1] * VOCABULARY,
    "tokenizer.ggml.merges": ['! "'],
    **{"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 0},
}


@cache
def net(case):
    """Return the net of a case. Norms of Gemma are rounded to bfloat16, so that adding 1 is exact."""
    family, changes = CASES[case]
    made = tiny(family, **changes)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if family.startswith("gemma") and "norm" in name:
                weight.copy_(weight.bfloat16())
    return made


def token_ids(count=40):
    """Return token ids that do not repeat in a simple way, list of int."""
    return [(7 * index * index + 3 * index + 5) % VOCABULARY for index in range(count)]


def logits(model, ids):
    """Return logits of transformers, float32 [T, V]."""
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float()


def write_float32(path, model, tokenizer=None):
    """Write a net in float32, and return what `to_gguf` made of it."""
    mapped = to_gguf(model.config, net_state(model))
    infos = {name: TensorInfo(tensor.shape, "f32") for name, tensor in mapped.tensors.items()}
    with open_writer(path, mapped.metadata | (tokenizer or NO_TOKENIZER), infos) as writer:
        for name, tensor in mapped.tensors.items():
            writer.write(name, tensor.load().float().contiguous().numpy())
    return mapped
