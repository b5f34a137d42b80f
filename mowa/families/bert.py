"""Registry entry: BERT (arXiv:1810.04805) and sentence encoders with its architecture (MiniLM, BGE, E5, GTE).

Tensors have the names of a bare encoder; a checkpoint with a head has the prefix `bert.`.
"""

from __future__ import annotations

from mowa.families.registry import register
from mowa.types import Family

NO_LM_HEAD = "embedding models have no language-model head"
PACKING_UNSUPPORTED = "its mask handles padding, but no boundaries between documents"

BERT = register(
    Family(
        name="bert",
        model_types=("bert",),
        task="embedding",
        blocks=("BertLayer",),
        # PEFT matches suffixes, so `output.dense` includes that of the attention.
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
        unsupported={"packing": PACKING_UNSUPPORTED, "fused_loss": NO_LM_HEAD},
    )
)
