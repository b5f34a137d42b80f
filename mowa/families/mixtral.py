"""Mixtral (arXiv:2401.04088): Mistral's net with eight experts where the MLP was, two of which see each token."""

from __future__ import annotations

from mowa.families.llama import LLAMA
from mowa.families.mistral import TURN
from mowa.families.registry import register
from mowa.types import Family

EXPERTS_UNSUPPORTED = "they are one tensor a block, no linears: LoRA sits beside them, and they stay as they are"

MIXTRAL = register(
    Family(
        name="mixtral",
        model_types=("mixtral",),
        task="causal",
        blocks=("MixtralDecoderLayer",),
        linears={"attention": LLAMA.linears["attention"]},
        architectures=("MixtralForCausalLM",),
        name_patterns=(r"(nous-hermes-2-)?mixtral-8x\d+b",),
        fused_modules={"rms_norm": ("MixtralRMSNorm",)},
        tensor_names=LLAMA.tensor_names,
        template=TURN,
        unsupported={"experts": EXPERTS_UNSUPPORTED},
    )
)
