"""Mistral (arXiv:2310.06825): Llama's net with attention over a sliding window. Ministral alternates it with full
attention, and Ministral 3 stretches positions. What sees as well (Pixtral, Mistral Small 3.1 and later) is another net.
"""

from __future__ import annotations

from mowa.families.llama import LLAMA
from mowa.families.registry import register
from mowa.types import Family

TURN = ("[/INST]", "</s>")

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
        template=TURN,
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
        template=TURN,
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
        # No aliases: what is called Ministral-3 on the hub sees as well, and only its config tells the text net apart.
        fused_modules={"rms_norm": ("Ministral3RMSNorm",), "swiglu": ("Ministral3MLP",)},
        tensor_names=LLAMA.tensor_names,
        template=TURN,
    )
)
