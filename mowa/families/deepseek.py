"""Registry entries: DeepSeek V2 (arXiv:2405.04434), and V3 (arXiv:2412.19437) with R1 (arXiv:2501.12948).

R1 has V3's architecture. Keys and values are projected from a small latent (MLA), and so are queries except in V2-Lite,
which has q_proj instead of q_a_proj and q_b_proj. The first blocks have an MLP, the others experts, some of them shared
by all tokens.
"""

from __future__ import annotations

from mowa.families.llama import LLAMA
from mowa.families.mixtral import EXPERTS_UNSUPPORTED
from mowa.families.registry import register
from mowa.types import Family

_LINEARS = {
    "attention": ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    "mlp": LLAMA.linears["mlp"],  # of the first blocks and of shared experts
}
_UNSUPPORTED = {"experts": EXPERTS_UNSUPPORTED}

DEEPSEEK_V2 = register(
    Family(
        name="deepseek_v2",
        model_types=("deepseek_v2",),
        task="causal",
        blocks=("DeepseekV2DecoderLayer",),
        linears=_LINEARS,
        architectures=("DeepseekV2ForCausalLM",),
        name_patterns=(r"deepseek-(coder-)?v2(\.5)?",),
        fused_modules={"rms_norm": ("DeepseekV2RMSNorm",), "swiglu": ("DeepseekV2MLP",)},
        tensor_names=LLAMA.tensor_names,
        unsupported=_UNSUPPORTED,
    )
)

DEEPSEEK_V3 = register(
    Family(
        name="deepseek_v3",
        model_types=("deepseek_v3",),
        task="causal",
        blocks=("DeepseekV3DecoderLayer",),
        linears=_LINEARS,
        architectures=("DeepseekV3ForCausalLM",),
        name_patterns=(r"deepseek-v3(\.1)?(?![.\d])", r"deepseek-r1(?!-distill)(?!.*qwen)"),
        fused_modules={"rms_norm": ("DeepseekV3RMSNorm",), "swiglu": ("DeepseekV3MLP",)},
        tensor_names=LLAMA.tensor_names,
        unsupported=_UNSUPPORTED,
    )
)
