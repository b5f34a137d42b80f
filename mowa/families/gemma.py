"""Gemma 1, 2 and 3 (arXiv:2403.08295, 2408.00118, 2503.19786): norms by 1 + weight, gates by gelu.

Gemma 2 and 3 alternate a sliding window with full attention. Gemma 3 of 4B and more also sees: `gemma3`, while
`gemma3_text` is the net that only reads. The names of linears are those of the text; the tower has some alike.
"""

from __future__ import annotations

from mowa.families.llama import LLAMA
from mowa.families.registry import register
from mowa.types import Family

TURN = ("<start_of_turn>model\n", "<end_of_turn>")
_GEMMA3_SWAPS = {"rms_norm_plus_one": ("Gemma3RMSNorm",), "geglu": ("Gemma3MLP",)}

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
        template=TURN,
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
        template=TURN,
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
        fused_modules=_GEMMA3_SWAPS,
        tensor_names=LLAMA.tensor_names,
        template=TURN,
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
        fused_modules=_GEMMA3_SWAPS,
        tensor_names={
            "block": "language_model.model.layers.{i}.",
            "embeddings": "language_model.model.embed_tokens.weight",
            "norm": "language_model.model.norm.weight",
            "head": "language_model.lm_head.weight",
        },
        template=TURN,
        unsupported={"packing": "the tokens of an image see each other both ways, which packed positions do not tell"},
    )
)
