"""Registry entries: Llama (arXiv:2302.13971, arXiv:2307.09288, arXiv:2407.21783) and models with its architecture.

TinyLlama, SmolLM and SmolLM2, Vicuna, Yi and the first DeepSeek models have Llama's architecture. SmolLM3 has no
positions in every fourth block.
"""

from __future__ import annotations

from mowa.families.registry import register
from mowa.types import Family

LLAMA = register(
    Family(
        name="llama",
        model_types=("llama",),
        task="causal",
        blocks=("LlamaDecoderLayer",),
        linears={
            "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
            "mlp": ("gate_proj", "up_proj", "down_proj"),
        },
        architectures=("LlamaForCausalLM",),
        name_patterns=(
            r"(meta-)?llama-?2-\d+b",
            r"(meta-)?llama-3(\.[13])?-(8|70|405)b(?!.*(vision|llava))",
            r"llama-3\.2-[13]b",
            r"llama-guard-3-[18]b",
            r"codellama-\d+b",
            r"tinyllama([-_][\d.]+b)?",
            r"smollm2?-[\d.]+[mb]",
            r"vicuna-\d+b",
            r"yi-(1\.5-|coder-)?[\d.]+b",
            r"deepseek-(r1-distill-llama|llm|math|coder)-[\d.]+b",
        ),
        fused_modules={"rms_norm": ("LlamaRMSNorm",), "swiglu": ("LlamaMLP",)},
        tensor_names={
            "block": "model.layers.{i}.",
            "embeddings": "model.embed_tokens.weight",
            "norm": "model.norm.weight",
            "head": "lm_head.weight",
        },
    )
)

SMOLLM3 = register(
    Family(
        name="smollm3",
        model_types=("smollm3",),
        task="causal",
        blocks=("SmolLM3DecoderLayer",),
        linears=LLAMA.linears,
        architectures=("SmolLM3ForCausalLM",),
        name_patterns=(r"smollm3-\d+b",),
        fused_modules={"rms_norm": ("SmolLM3RMSNorm",), "swiglu": ("SmolLM3MLP",)},
        tensor_names=LLAMA.tensor_names,
    )
)
