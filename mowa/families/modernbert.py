"""Registry entry: ModernBERT (arXiv:2412.13663), with rotary positions, windows in two of three blocks, GELU gates."""

from __future__ import annotations

from mowa.families.bert import NO_LM_HEAD, PACKING_UNSUPPORTED
from mowa.families.registry import register
from mowa.types import Family

MODERNBERT = register(
    Family(
        name="modernbert",
        model_types=("modernbert",),
        task="embedding",
        blocks=("ModernBertEncoderLayer",),
        linears={"attention": ("attn.Wqkv", "attn.Wo"), "mlp": ("mlp.Wi", "mlp.Wo")},
        head="",
        architectures=("ModernBertModel", "ModernBertForMaskedLM"),
        name_patterns=(r"(gte-)?modernbert-(base|large|embed-base|embed-large)",),
        tensor_names={
            "block": "layers.{i}.",
            "embeddings": "embeddings.tok_embeddings.weight",
            "norm": "final_norm.weight",
        },
        unsupported={
            "geglu": "gate and up are one linear layer, and its GELU is exact",
            "packing": PACKING_UNSUPPORTED,
            "fused_loss": NO_LM_HEAD,
        },
    )
)
