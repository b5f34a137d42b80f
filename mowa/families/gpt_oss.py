"""Registry entry: gpt-oss (arXiv:2508.10925), with clipped gates in its experts and an attention sink per head."""

from __future__ import annotations

from mowa.families.llama import LLAMA
from mowa.families.mixtral import EXPERTS_UNSUPPORTED
from mowa.families.registry import register
from mowa.types import Family

GPT_OSS = register(
    Family(
        name="gpt_oss",
        model_types=("gpt_oss",),
        task="causal",
        blocks=("GptOssDecoderLayer",),
        linears={"attention": LLAMA.linears["attention"]},
        architectures=("GptOssForCausalLM",),
        name_patterns=(r"gpt-oss-(safeguard-)?\d+b",),
        fused_modules={"rms_norm": ("GptOssRMSNorm",)},
        tensor_names=LLAMA.tensor_names,
        unsupported={
            "experts": EXPERTS_UNSUPPORTED,
            "packing_unaccelerated": "transformers builds its mask without positions, so documents see each other",
        },
    )
)
