"""Registry entries: Gemma 1, 2 and 3 (arXiv:2403.08295, arXiv:2408.00118, arXiv:2503.19786).

Their RMS norms scale by 1 + weight, and their MLPs gate with GELU. Gemma 2 and 3 alternate sliding windows with full
attention. Gemma 3 from 4B on has a vision tower: `gemma3`; `gemma3_text` is text only. `linears` are those of the
language model; the vision tower has some of the same name.
"""

from __future__ import annotations

from mowa.families.llama import LLAMA
from mowa.families.registry import register
from mowa.types import Family

_GEMMA3_FUSED = {"rms_norm_plus_one": ("Gemma3RMSNorm",), "geglu": ("Gemma3MLP",)}

GEMMA = register(
    Family(
        name="gemma",
        model_types=("gemma",),
        task="causal",
        blocks=("GemmaDecoderLayer",),
        linears=LLAMA.linears,
        architectures=("GemmaForCausalLM",),
        name_patterns=(r"(code)?gemma-(1\.1-)?[27]b",),
        fused_modules={"rms_norm_plus_one": ("GemmaRMSNorm",), "geglu": ("GemmaMLP",)},
        tensor_names=LLAMA.tensor_names,
    )
)

GEMMA2 = register(
    Family(
        name="gemma2",
        model_types=("gemma2",),
        task="causal",
        blocks=("Gemma2DecoderLayer",),
        linears=LLAMA.linears,
        architectures=("Gemma2ForCausalLM",),
        name_patterns=(r"gemma-2-\d+b",),
        fused_modules={"rms_norm_plus_one": ("Gemma2RMSNorm",), "geglu": ("Gemma2MLP",)},
        tensor_names=LLAMA.tensor_names,
    )
)

GEMMA3_TEXT = register(
    Family(
        name="gemma3_text",
        model_types=("gemma3_text",),
        task="causal",
        blocks=("Gemma3DecoderLayer",),
        linears=LLAMA.linears,
        architectures=("Gemma3ForCausalLM",),
        name_patterns=(r"gemma-3-(270m|1b)",),
        fused_modules=_GEMMA3_FUSED,
        tensor_names=LLAMA.tensor_names,
    )
)

GEMMA3 = register(
    Family(
        name="gemma3",
        model_types=("gemma3",),
        task="vision-language",
        blocks=("Gemma3DecoderLayer",),
        linears=LLAMA.linears,
        frozen=("vision_tower",),
        architectures=("Gemma3ForConditionalGeneration",),
        name_patterns=(r"gemma-3-(4|12|27)b",),
        fused_modules=_GEMMA3_FUSED,
        tensor_names={
            "block": "language_model.model.layers.{i}.",
            "embeddings": "language_model.model.embed_tokens.weight",
            "norm": "language_model.model.norm.weight",
            "head": "language_model.lm_head.weight",
        },
        unsupported={"packing": "image tokens attend in both directions, which positions do not express"},
    )
)
