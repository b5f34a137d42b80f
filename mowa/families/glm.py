"""Registry entries: GLM-4 (arXiv:2406.12793), whose gate and up projections are one linear layer, as in Phi 3.

`glm` are the 9B models of 2024 in transformers' format, `glm4` those of 2025 (GLM-4-0414), which have norms after
attention and MLP as well. GLM 4.5 has experts and is another architecture.
"""

from __future__ import annotations

from mowa.families.llama import LLAMA
from mowa.families.registry import register
from mowa.types import Family

_LINEARS = {"attention": LLAMA.linears["attention"], "mlp": ("gate_up_proj", "down_proj")}

GLM = register(
    Family(
        name="glm",
        model_types=("glm",),
        task="causal",
        blocks=("GlmDecoderLayer",),
        linears=_LINEARS,
        architectures=("GlmForCausalLM",),
        name_patterns=(r"glm-4-9b(-chat)?(-1m)?-hf", r"glm-edge-[\d.]+b"),
        fused_modules={"rms_norm": ("GlmRMSNorm",), "swiglu": ("GlmMLP",)},
        tensor_names=LLAMA.tensor_names,
    )
)

GLM4 = register(
    Family(
        name="glm4",
        model_types=("glm4",),
        task="causal",
        blocks=("Glm4DecoderLayer",),
        linears=_LINEARS,
        architectures=("Glm4ForCausalLM",),
        name_patterns=(r"glm-(4|z1)-\d+b(-base)?-0414",),
        fused_modules={"rms_norm": ("Glm4RMSNorm",), "swiglu": ("Glm4MLP",)},
        tensor_names=LLAMA.tensor_names,
    )
)
