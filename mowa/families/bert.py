"""BERT (arXiv:1810.04805) and the sentence encoders that are its net: MiniLM, BGE, E5, GTE.

Tensors are named as a bare encoder saves them; a checkpoint with a head puts `bert.` before them.
"""

from __future__ import annotations

from mowa.families.registry import register
from mowa.types import Family

NO_LM_HEAD = "an embedding has no head over a vocabulary"
PACKING_UNSUPPORTED = "its mask knows padding, and no bounds between documents"

BERT = register(
    Family(
        name="bert",
        model_types=("bert",),
        task="embedding",
        blocks=("BertLayer",),
        # PEFT goes by suffixes, so `output.dense` is that of the attention as well.
        linears={
            "attention": ("query", "key", "value", "attention.output.dense"),
            "mlp": ("intermediate.dense", "output.dense"),
        },
        head="",
        architectures=("BertModel", "BertForMaskedLM", "BertForPreTraining"),
        name_patterns=(
            r"bert-(tiny|mini|small|medium|base|large)",
            r"(all|paraphrase|multi-qa|msmarco|paraphrase-multilingual)-minilm-l\d+",
            r"bge-(small|base|large)-(en|zh)",
            r"e5-(small|base|large)",
            r"multilingual-e5-small",
            r"gte-(small|base|large)(?!-(en|zh))",
            r"mxbai-embed-large",
        ),
        tensor_names={"block": "encoder.layer.{i}.", "embeddings": "embeddings.word_embeddings.weight"},
        unsupported={"packing": PACKING_UNSUPPORTED, "fused_head": NO_LM_HEAD},
    )
)
