"""Registry entries: OLMo 2 (arXiv:2501.00656) and 3 (arXiv:2512.13961).

They are Llama's architecture with norms after attention and MLP, and norms of queries and keys over all heads. OLMo 3
alternates sliding windows with full attention.
"""

from __future__ import annotations

from mowa.families.llama import LLAMA
from mowa.families.registry import register
from mowa.types import Family

OLMO2 = register(
    Family(
        name="olmo2",
        model_types=("olmo2",),
        task="causal",
        blocks=("Olmo2DecoderLayer",),
        linears=LLAMA.linears,
        architectures=("Olmo2ForCausalLM",),
        name_patterns=(r"olmo-2-\d+-\d+b",),
        fused_modules={"rms_norm": ("Olmo2RMSNorm",), "swiglu": ("Olmo2MLP",)},
        tensor_names=LLAMA.tensor_names,
    )
)

OLMO3 = register(
    Family(
        name="olmo3",
        model_types=("olmo3",),
        task="causal",
        blocks=("Olmo3DecoderLayer",),
        linears=LLAMA.linears,
        architectures=("Olmo3ForCausalLM",),
        name_patterns=(r"olmo-3(\.1)?-\d+-\d+b", r"olmo-3(\.1)?-\d+b"),
        fused_modules={"rms_norm": ("Olmo3RMSNorm",), "swiglu": ("Olmo3MLP",)},
        tensor_names=LLAMA.tensor_names,
    )
)
