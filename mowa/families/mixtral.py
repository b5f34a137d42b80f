"""Registry entry: Mixtral (arXiv:2401.04088), Mistral's architecture with eight experts, two of them used per token."""

from __future__ import annotations

from mowa.families.llama import LLAMA
from mowa.families.registry import register
from mowa.types import Family

EXPERTS_UNSUPPORTED = "experts are one tensor per block, not linear layers: they get no LoRA without target_parameters"

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
        unsupported={"experts": EXPERTS_UNSUPPORTED},
    )
)
