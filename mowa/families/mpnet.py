"""MPNet (arXiv:2004.09297): BERT's blocks with a bias by distance, the same in every block."""

from __future__ import annotations

from mowa.families.bert import NO_HEAD, PADDED
from mowa.families.registry import register
from mowa.nouns import Family

MPNET = register(
    Family(
        name="mpnet",
        model_types=("mpnet",),
        task="embedding",
        blocks=("MPNetLayer",),
        linears={"attention": ("attn.q", "attn.k", "attn.v", "attn.o"), "mlp": ("intermediate.dense", "output.dense")},
        head="",
        architectures=("MPNetModel", "MPNetForMaskedLM"),
        aliases=(r"((all|paraphrase|multi-qa|stsb|nli)-)?mpnet-base",),
        tensors={"block": "encoder.layer.{i}.", "embeddings": "embeddings.word_embeddings.weight"},
        limits={
            "attention": "it adds its bias in a function of its own, and asks no attention interface",
            "packing": PADDED,
            "fused_head": NO_HEAD,
        },
    )
)
