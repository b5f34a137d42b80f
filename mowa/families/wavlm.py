"""Registry entry: WavLM (arXiv:2110.13900), HuBERT's architecture with a gated relative position bias.

Its attention passes the raw weights of q, k, v and out to `multi_head_attention_forward`, so a module in their place
(LoRA, int8) would silently be bypassed: `linears` lists only layers that are called.
"""

from __future__ import annotations

from mowa.families.registry import register
from mowa.types import Family

WAVLM = register(
    Family(
        name="wavlm",
        model_types=("wavlm",),
        task="ctc",
        blocks=("WavLMEncoderLayer", "WavLMEncoderLayerStableLayerNorm"),
        linears={"mlp": ("intermediate_dense", "output_dense")},
        frozen=("feature_extractor",),
        architectures=("WavLMForCTC",),
        name_patterns=(r"(.*-)?wavlm-(base|large)",),
        tensor_names={"block": "wavlm.encoder.layers.{i}.", "head": "lm_head.weight"},
        non_block_weights={
            "feature_extractor": "int8",
            "feature_projection": "int8",
            "encoder": "float16",
            "lm_head": "float16",
        },
        unsupported={
            "attention": "it passes raw weights to a torch function",
            "cpu_plan": "it has an attention of its own",
            "packing": "it has an attention of its own",
            "chunked": "it has an attention of its own",
            "fused_loss": "CTC vocabularies are small, so their logits need little memory",
        },
        supports=frozenset({"coreml"}),
    )
)
