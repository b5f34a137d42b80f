"""Registry entry: wav2vec 2.0 (arXiv:2006.11477), XLSR-53 (arXiv:2006.13979), XLS-R and MMS, one architecture.

Front ends with group norm (`base`) and with layer norm (`large-lv60`, XLSR) are one family; the config distinguishes
them.
"""

from __future__ import annotations

from mowa.families.registry import register
from mowa.types import Family

WAV2VEC2 = register(
    Family(
        name="wav2vec2",
        model_types=("wav2vec2",),
        task="ctc",
        blocks=("Wav2Vec2EncoderLayer", "Wav2Vec2EncoderLayerStableLayerNorm"),
        linears={
            "attention": ("q_proj", "k_proj", "v_proj", "out_proj"),
            "mlp": ("intermediate_dense", "output_dense"),
        },
        frozen=("feature_extractor",),
        architectures=("Wav2Vec2ForCTC",),
        name_patterns=(r"(.*-)?wav2vec2-(base|large|xls-r|xlsr|lv-60)", r"mms-(300m|1b)"),
        tensor_names={"block": "wav2vec2.encoder.layers.{i}.", "head": "lm_head.weight"},
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
