"""Registry entries: Qwen 1.5 to 3, dense and MoE (arXiv:2309.16609, 2407.10671, 2412.15115 and 2505.09388).

Qwen3's embedding and reranking models (arXiv:2506.05176) have Qwen3's architecture, so they are of that family.
"""

from __future__ import annotations

from mowa.families.llama import LLAMA
from mowa.families.mixtral import EXPERTS_UNSUPPORTED
from mowa.families.registry import register
from mowa.types import Family

QWEN2 = register(
    Family(
        name="qwen2",
        model_types=("qwen2",),
        task="causal",
        blocks=("Qwen2DecoderLayer",),
        linears=LLAMA.linears,
        architectures=("Qwen2ForCausalLM",),
        name_patterns=(
            r"(code)?qwen(1\.5|2|2\.5)-(coder-|math-)?[\d.]+b(?!-a\d)",
            r"qwq-32b",
            r"deepseek-r1-distill-qwen-[\d.]+b",
        ),
        fused_modules={"rms_norm": ("Qwen2RMSNorm",), "swiglu": ("Qwen2MLP",)},
        tensor_names=LLAMA.tensor_names,
    )
)

QWEN2_MOE = register(
    Family(
        name="qwen2_moe",
        model_types=("qwen2_moe",),
        task="causal",
        blocks=("Qwen2MoeDecoderLayer",),
        linears=LLAMA.linears,  # mlp: of the shared expert
        architectures=("Qwen2MoeForCausalLM",),
        name_patterns=(r"qwen1\.5-moe-a[\d.]+b", r"qwen2-\d+b-a\d+b"),
        fused_modules={"rms_norm": ("Qwen2MoeRMSNorm",), "swiglu": ("Qwen2MoeMLP",)},
        tensor_names=LLAMA.tensor_names,
        unsupported={"experts": EXPERTS_UNSUPPORTED},
    )
)

QWEN3 = register(
    Family(
        name="qwen3",
        model_types=("qwen3",),
        task="causal",
        blocks=("Qwen3DecoderLayer",),
        linears=LLAMA.linears,
        architectures=("Qwen3ForCausalLM",),
        name_patterns=(r"qwen3-(embedding-|reranker-)?[\d.]+b(?!-a\d)", r"deepseek-r1-0528-qwen3-\d+b"),
        fused_modules={"rms_norm": ("Qwen3RMSNorm",), "swiglu": ("Qwen3MLP",)},
        tensor_names=LLAMA.tensor_names,
    )
)

QWEN3_MOE = register(
    Family(
        name="qwen3_moe",
        model_types=("qwen3_moe",),
        task="causal",
        blocks=("Qwen3MoeDecoderLayer",),
        linears={"attention": LLAMA.linears["attention"]},
        architectures=("Qwen3MoeForCausalLM",),
        name_patterns=(r"qwen3-(coder-)?\d+b-a\d+b",),
        fused_modules={"rms_norm": ("Qwen3MoeRMSNorm",), "swiglu": ("Qwen3MoeMLP",)},
        tensor_names=LLAMA.tensor_names,
        unsupported={"experts": EXPERTS_UNSUPPORTED},
    )
)
