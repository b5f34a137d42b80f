"""Registry entry: GPT-NeoX (arXiv:2204.06745) and Pythia (arXiv:2304.01373).

Queries, keys and values are one linear layer; attention and MLP are computed in parallel.
"""

from __future__ import annotations

from mowa.families.registry import register
from mowa.types import Family

GPT_NEOX = register(
    Family(
        name="gpt_neox",
        model_types=("gpt_neox",),
        task="causal",
        blocks=("GPTNeoXLayer",),
        linears={"attention": ("query_key_value", "dense"), "mlp": ("dense_h_to_4h", "dense_4h_to_h")},
        architectures=("GPTNeoXForCausalLM",),
        name_patterns=(r"pythia-[\d.]+[mb]", r"gpt-neox-20b", r"dolly-v2-\d+b"),
        tensor_names={
            "block": "gpt_neox.layers.{i}.",
            "embeddings": "gpt_neox.embed_in.weight",
            "norm": "gpt_neox.final_layer_norm.weight",
            "head": "embed_out.weight",
        },
        unsupported={"swiglu": "its MLP has no gate"},
    )
)
