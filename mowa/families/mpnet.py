"""MPNet (arXiv:2004.09297): BERT's blocks with a bias by distance, the same in every block."""

from __future__ import annotations

from mowa.families.bert import NO_LM_HEAD, PACKING_UNSUPPORTED
from mowa.families.registry import register
from mowa.types import Family

MPNET = register(
    Family(
        name="mpnet",
        model_types=("mpnet",),
        task="embedding",
        blocks=("MPNetLayer",),
        linears={"attention": ("attn.q", "attn.k", "attn.v", "attn.o"), "mlp": ("intermediate.dense", "output.dense")},
        head="",
        architectures=("MPNetModel", "MPNetForMaskedLM"),
        name_patterns=(r"((all|paraphrase|multi-qa|stsb|nli)-)?mpnet-base",),
        tensor_names={"block": "encoder.layer.{i}.", "embeddings": "embeddings.word_embeddings.weight"},
        unsupported={
            "attention": "it adds its bias in a function of its own, and asks no attention interface",
            "packing": PACKING_UNSUPPORTED,
            "fused_head": NO_LM_HEAD,
        },
    )
)
