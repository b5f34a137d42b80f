"""Registry entry: MPNet (arXiv:2004.09297), BERT's blocks with one relative position bias shared by all of them."""

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
            "attention": "its attention adds a bias and does not use transformers' AttentionInterface",
            "packing": PACKING_UNSUPPORTED,
            "fused_loss": NO_LM_HEAD,
        },
    )
)
