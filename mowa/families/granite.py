"""Registry entries: Granite 3 (arXiv:2407.13739), dense and with experts; Llama's architecture with multipliers.

The multipliers are read from the config. Granite 4 mixes attention with state-space layers and is another architecture.
"""

from __future__ import annotations

from mowa.families.llama import LLAMA
from mowa.families.mixtral import EXPERTS_UNSUPPORTED
from mowa.families.registry import register
from mowa.types import Family

GRANITE = register(
    Family(
        name="granite",
        model_types=("granite",),
        task="causal",
        blocks=("GraniteDecoderLayer",),
        linears=LLAMA.linears,
        architectures=("GraniteForCausalLM",),
        name_patterns=(r"granite-3\.\d-\d+b(?!-a\d)",),
        fused_modules={"rms_norm": ("GraniteRMSNorm",), "swiglu": ("GraniteMLP",)},
        tensor_names=LLAMA.tensor_names,
    )
)

GRANITEMOE = register(
    Family(
        name="granitemoe",
        model_types=("granitemoe",),
        task="causal",
        blocks=("GraniteMoeDecoderLayer",),
        linears={"attention": LLAMA.linears["attention"]},
        architectures=("GraniteMoeForCausalLM",),
        name_patterns=(r"granite-3\.\d-\d+b-a\d+m",),
        fused_modules={"rms_norm": ("GraniteMoeRMSNorm",)},
        tensor_names=LLAMA.tensor_names,
        unsupported={"experts": EXPERTS_UNSUPPORTED},
    )
)
