"""Registry entry: StarCoder 2 (arXiv:2402.19173), with layer norms and an MLP without a gate."""

from __future__ import annotations

from mowa.families.llama import LLAMA
from mowa.families.registry import register
from mowa.types import Family

STARCODER2 = register(
    Family(
        name="starcoder2",
        model_types=("starcoder2",),
        task="causal",
        blocks=("Starcoder2DecoderLayer",),
        linears={"attention": LLAMA.linears["attention"], "mlp": ("c_fc", "c_proj")},
        architectures=("Starcoder2ForCausalLM",),
        name_patterns=(r"starcoder2-\d+b",),
        tensor_names=LLAMA.tensor_names,
        unsupported={"swiglu": "its MLP has no gate"},
    )
)
