"""Registry entries: Command R (`cohere`) and Command R7B and A (`cohere2`).

Attention and MLP are computed in parallel after one layer norm without bias, and logits are multiplied by the config's
`logit_scale`. `cohere2` alternates sliding windows with full attention that has no positions.
"""

from __future__ import annotations

from mowa.families.llama import LLAMA
from mowa.families.registry import register
from mowa.types import Family

COHERE = register(
    Family(
        name="cohere",
        model_types=("cohere",),
        task="causal",
        blocks=("CohereDecoderLayer",),
        linears=LLAMA.linears,
        architectures=("CohereForCausalLM",),
        name_patterns=(r"(c4ai-)?command-r(-plus)?", r"aya-(23|expanse)-\d+b"),
        fused_modules={"swiglu": ("CohereMLP",)},
        tensor_names=LLAMA.tensor_names,
    )
)

COHERE2 = register(
    Family(
        name="cohere2",
        model_types=("cohere2",),
        task="causal",
        blocks=("Cohere2DecoderLayer",),
        linears=LLAMA.linears,
        architectures=("Cohere2ForCausalLM",),
        name_patterns=(r"(c4ai-)?command-r7b", r"(c4ai-)?command-a-03-2025"),
        fused_modules={"swiglu": ("Cohere2MLP",)},
        tensor_names=LLAMA.tensor_names,
    )
)
