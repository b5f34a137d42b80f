"""Registry entries: Mistral (arXiv:2310.06825), Llama's architecture with sliding-window attention.

Ministral alternates it with full attention; Ministral 3 scales its positions. Models with a vision tower (Pixtral,
Mistral Small 3.1 and later) are another architecture.
"""

from __future__ import annotations

from mowa.families.llama import LLAMA
from mowa.families.registry import register
from mowa.types import Family

MISTRAL = register(
    Family(
        name="mistral",
        model_types=("mistral",),
        task="causal",
        blocks=("MistralDecoderLayer",),
        linears=LLAMA.linears,
        architectures=("MistralForCausalLM",),
        name_patterns=(
            r"mistral-\d+b",
            r"mistral-nemo-(base|instruct)-\d{4}",
            r"mistral-(small|large)-instruct-24\d\d",
            r"mistral-small-24b-(base|instruct)-2501",
            r"(codestral|mathstral)-\d+b",
            r"(devstral|magistral)-small-250[567]",
            r"zephyr-7b",
        ),
        fused_modules={"rms_norm": ("MistralRMSNorm",), "swiglu": ("MistralMLP",)},
        tensor_names=LLAMA.tensor_names,
    )
)

MINISTRAL = register(
    Family(
        name="ministral",
        model_types=("ministral",),
        task="causal",
        blocks=("MinistralDecoderLayer",),
        linears=LLAMA.linears,
        architectures=("MinistralForCausalLM",),
        name_patterns=(r"ministral-8b-instruct-2410",),
        fused_modules={"rms_norm": ("MinistralRMSNorm",), "swiglu": ("MinistralMLP",)},
        tensor_names=LLAMA.tensor_names,
    )
)

MINISTRAL3 = register(
    Family(
        name="ministral3",
        model_types=("ministral3",),
        task="causal",
        blocks=("Ministral3DecoderLayer",),
        linears=LLAMA.linears,
        architectures=("Ministral3ForCausalLM",),
        # No name patterns: Ministral-3 on the Hub has a vision tower; only the config identifies the text model.
        fused_modules={"rms_norm": ("Ministral3RMSNorm",), "swiglu": ("Ministral3MLP",)},
        tensor_names=LLAMA.tensor_names,
    )
)
