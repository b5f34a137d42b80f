"""Registry entry: UniSpeech-SAT (arXiv:2110.05752), wav2vec 2.0's architecture pretrained to tell speakers apart."""

from __future__ import annotations

from mowa.families.registry import register
from mowa.families.wav2vec2 import WAV2VEC2
from mowa.types import Family

UNISPEECH_SAT = register(
    Family(
        name="unispeech-sat",
        model_types=("unispeech-sat",),
        task="ctc",
        blocks=("UniSpeechSatEncoderLayer", "UniSpeechSatEncoderLayerStableLayerNorm"),
        linears=WAV2VEC2.linears,
        frozen=("feature_extractor",),
        architectures=("UniSpeechSatForCTC",),
        name_patterns=(r"unispeech-sat-(base|large)",),
        tensor_names={"block": "unispeech_sat.encoder.layers.{i}.", "head": "lm_head.weight"},
        non_block_weights=WAV2VEC2.non_block_weights,
        unsupported={"fused_loss": WAV2VEC2.unsupported["fused_loss"]},
        supports=WAV2VEC2.supports,
    )
)
