"""Mixtral (arXiv:2401.04088): Mistral's net with eight experts where the MLP was, two of which see each token."""

from __future__ import annotations

from mowa.families.llama import LLAMA
from mowa.families.mistral import TURN
from mowa.families.registry import register
from mowa.nouns import Family

EXPERTS = "they are one tensor a block, no linears: LoRA sits beside them, and they stay as they are"

MIXTRAL = register(
    Family(
        name="mixtral",
        model_types=("mixtral",),
        task="causal",
        blocks=("MixtralDecoderLayer",),
        linears={"attention": LLAMA.linears["attention"]},
        architectures=("MixtralForCausalLM",),
        aliases=(r"(nous-hermes-2-)?mixtral-8x\d+b",),
        swaps={"rms_norm": ("MixtralRMSNorm",)},
        tensors=LLAMA.tensors,
        template=TURN,
        limits={"experts": EXPERTS},
    )
)
