"""WavLM (arXiv:2110.13900): HuBERT's net with a gated relative position bias in the attention.

Its attention hands the bare weights of q, k, v and out to `multi_head_attention_forward`, so a module put in the place
of one of them (LoRA, int8) would be silently by-passed: `linears` names only the linears that are called.
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
            "attention": "it hands bare weights to a function of torch",
            "packing": "it attends in a way of its own",
            "fused_head": "letters are few, and their logits small",
        },
    )
)
