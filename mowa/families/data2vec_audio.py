"""Registry entry: data2vec for audio (arXiv:2202.03555): wav2vec 2.0's post-norm blocks, layer norm in the front end.

Its positions come from a stack of convolutions with norms between them, which make something of padding: an attention
mask does not keep padding out.
"""

from __future__ import annotations

from mowa.families.registry import register
from mowa.families.wav2vec2 import WAV2VEC2
from mowa.types import Family

DATA2VEC_AUDIO = register(
    Family(
        name="data2vec-audio",
        model_types=("data2vec-audio",),
        task="ctc",
        blocks=("Data2VecAudioEncoderLayer",),
        linears=WAV2VEC2.linears,
        frozen=("feature_extractor",),
        architectures=("Data2VecAudioForCTC",),
        name_patterns=(r"data2vec-audio-(base|large)",),
        tensor_names={"block": "data2vec_audio.encoder.layers.{i}.", "head": "lm_head.weight"},
        non_block_weights=WAV2VEC2.non_block_weights,
        unsupported={
            "fused_loss": WAV2VEC2.unsupported["fused_loss"],
            "ctranslate2": "CTranslate2 has one positional convolution, and it has several",
            "tensorrt_mask": "an attention mask does not keep padding out of its positional convolutions",
        },
        supports=frozenset({"cpu_plan", "packing", "chunked", "coreml"}),
    )
)
