"""Registry entry: the language model of Llama 4 (`llama4_text`), with experts beside a shared one.

Queries and keys have no weights in their norm, every fourth block has no positions, and the others attend in chunks of
8,192 tokens. Checkpoints with the vision tower (`llama4`) are not loaded.
"""

from __future__ import annotations

from mowa.families.llama import LLAMA
from mowa.families.mixtral import EXPERTS_UNSUPPORTED
from mowa.families.registry import register
from mowa.types import Family

LLAMA4 = register(
    Family(
        name="llama4_text",
        model_types=("llama4_text",),
        task="causal",
        blocks=("Llama4TextDecoderLayer",),
        linears=LLAMA.linears,  # mlp: of blocks without experts, and of the shared expert
        architectures=("Llama4ForCausalLM",),
        fused_modules={"rms_norm": ("Llama4TextRMSNorm",), "swiglu": ("Llama4TextMLP",)},
        tensor_names=LLAMA.tensor_names,
        unsupported={
            "experts": EXPERTS_UNSUPPORTED,
            "packing": "attention is scaled and split into chunks by the position in the row, not in the sample",
        },
    )
)
