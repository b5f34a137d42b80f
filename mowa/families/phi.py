"""Registry entries: Phi 1 to 2 (arXiv:2306.11644, arXiv:2309.05463), Phi 3 to 4 (arXiv:2404.14219, arXiv:2412.08905).

Phi 2 computes attention and MLP in parallel after one layer norm. Phi 3 is another architecture: q, k and v are one
linear layer, gate and up another.
"""

from __future__ import annotations

from mowa.families.llama import LLAMA
from mowa.families.registry import register
from mowa.types import Family

PHI = register(
    Family(
        name="phi",
        model_types=("phi",),
        task="causal",
        blocks=("PhiDecoderLayer",),
        linears={"attention": ("q_proj", "k_proj", "v_proj", "dense"), "mlp": ("fc1", "fc2")},
        architectures=("PhiForCausalLM",),
        name_patterns=(r"phi-(1|1_5|2)(?![.\d])",),
        tensor_names={**LLAMA.tensor_names, "norm": "model.final_layernorm.weight"},
        unsupported={"swiglu": "its MLP has no gate"},
    )
)

PHI3 = register(
    Family(
        name="phi3",
        model_types=("phi3",),
        task="causal",
        blocks=("Phi3DecoderLayer",),
        linears={"attention": ("qkv_proj", "o_proj"), "mlp": ("gate_up_proj", "down_proj")},
        architectures=("Phi3ForCausalLM",),
        name_patterns=(
            r"phi-3(\.5)?-(mini|medium)(?!.*vision)",
            r"phi-4(?![.\d])(?!.*(multimodal|flash|vision))",
        ),
        fused_modules={"rms_norm": ("Phi3RMSNorm",), "swiglu": ("Phi3MLP",)},
        tensor_names=LLAMA.tensor_names,
    )
)
