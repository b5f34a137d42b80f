"""Registry entry: HuBERT (arXiv:2106.07447), wav2vec 2.0's architecture pretrained on cluster labels.

Its modules have the same names as those of wav2vec 2.0.
"""

from __future__ import annotations

from mowa.families.registry import register
from mowa.types import Family

HUBERT = register(
    Family(
        name="hubert",
        model_types=("hubert",),
        task="ctc",
        blocks=("HubertEncoderLayer", "HubertEncoderLayerStableLayerNorm"),
        linears={
            "attention": ("q_proj", "k_proj", "v_proj", "out_proj"),
            "mlp": ("intermediate_dense", "output_dense"),
        },
        frozen=("feature_extractor",),
        architectures=("HubertForCTC",),
        name_patterns=(r"(.*-)?hubert-(base|large|xlarge)",),
        tensor_names={"block": "hubert.encoder.layers.{i}.", "head": "lm_head.weight"},
        non_block_weights={
            "feature_extractor": "int8",
            "feature_projection": "int8",
            "encoder": "float16",
            "lm_head": "float16",
        },
        unsupported={"fused_loss": "CTC vocabularies are small, so their logits need little memory"},
        supports=frozenset({"cpu_plan", "packing", "chunked", "coreml", "ctranslate2", "tensorrt_mask"}),
    )
)
