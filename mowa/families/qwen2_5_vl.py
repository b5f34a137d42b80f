"""Registry entry: Qwen2.5-VL (arXiv:2502.13923), Qwen2's architecture with 3-D positions and a vision tower.

Positions have three components: time, height and width. `linears` are those of the language model; the vision tower's
MLPs have some of the same name.
"""

from __future__ import annotations

from mowa.families.llama import LLAMA
from mowa.families.registry import register
from mowa.types import Family

QWEN2_5_VL = register(
    Family(
        name="qwen2_5_vl",
        model_types=("qwen2_5_vl",),
        task="vision-language",
        blocks=("Qwen2_5_VLDecoderLayer",),
        linears=LLAMA.linears,
        frozen=("visual",),
        architectures=("Qwen2_5_VLForConditionalGeneration",),
        name_patterns=(r"qwen2\.5-vl-\d+b",),
        fused_modules={"rms_norm": ("Qwen2_5_VLRMSNorm",), "swiglu": ("Qwen2MLP", "Qwen2_5_VLMLP")},
        tensor_names=LLAMA.tensor_names,
        unsupported={"packing": "it needs three positions per token; with one it finds no document boundaries"},
    )
)
