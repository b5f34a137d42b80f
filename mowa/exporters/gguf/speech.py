"""A wav2vec2-like CTC model as the metadata and tensors of one GGUF file: net, vocabulary and audio settings.

Every speech family of the registry can be written; `mowa.loading.gguf_ctc` reads the file. No other program runs it
today: neither llama.cpp nor whisper.cpp has a graph for wav2vec2. ggml has the operators for one: convolutions (also by
groups, as im2col and matrix products), group and layer norm, GELU and attention. Such a runtime needs nothing but the
file. The names of keys and tensors are in `mowa.models.gguf.ctc`; beside them stand

    wav2vec2-ctc.audio.sample_rate      in Hz
    wav2vec2-ctc.audio.normalize        to zero mean and unit variance over the recording
    wav2vec2-ctc.audio.attention_mask   whether the model was trained with padding masked
    wav2vec2-ctc.audio.padding_value    of samples after the end, once normalized
    tokenizer.ggml.model                "ctc"
    tokenizer.ggml.tokens               tokens of the head's outputs
    tokenizer.ctc.texts                 what each token writes: a space for the delimiter
    tokenizer.ctc.blank_token_id        repeated tokens are one, and then blanks are dropped
    tokenizer.ctc.delimiter_token_id    between words; may be missing
    tokenizer.ctc.special_token_ids     never text
    tokenizer.ctc.separator             between tokens, of phonemes
    tokenizer.ctc.lower_case            whether texts are in lower case whatever the tokens are
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from mowa.errors import ModelError
from mowa.exporters.gguf.general import general_metadata
from mowa.exporters.gguf.mixes import FLOAT_TYPES, fit_type, get_file_type
from mowa.exporters.prepare import prepare_for_export
from mowa.models.gguf import ctc
from mowa.models.gguf.state import LazyTensor
from mowa.types import CTCModel, Preprocessing, Vocabulary

_LINEAR = re.compile(r"blk\.\d+\.(attn_(q|k|v|output)|ffn_(up|down))\.weight")


def to_gguf_ctc(model: CTCModel) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """Return metadata and tensors of a CTC model, float32; LoRA is merged, quantized weights are dequantized.

    Args:
        model: of any speech family; it does not change.

    Raises ModelError if the model is no CTC model, or a name does not fit GGUF.
    """
    if model.task != "ctc":
        raise ModelError(f"{model.origin.name} is no speech model")
    net = prepare_for_export(model, dequantize=True, position_table=False)
    state = {name: value for name, value in net.state_dict().items() if value.is_floating_point()}
    names = ctc.tensor_names(state, net.base_model_prefix)
    tensors = {names[name]: LazyTensor(tuple(value.shape), partial(_identity, value)) for name, value in state.items()}
    metadata = {
        "general.architecture": ctc.ARCHITECTURE,
        **general_metadata(model.origin, sum(value.numel() for value in state.values())),
        **({"general.languages": [model.origin.target_lang]} if model.origin.target_lang else {}),
        **ctc.config_metadata(net.config),
        **_audio_metadata(model.preprocessing),
        **_vocabulary_metadata(model.vocabulary),
    }
    return metadata, tensors


def choose_speech_types(shapes: Mapping[str, tuple[int, ...]], scheme: str) -> dict[str, str]:
    """Return the type of each tensor of a speech model, in the order of `shapes`.

    Linear layers of the blocks have the type of the scheme, or one with smaller blocks where their rows do not fill it;
    mixes such as q4_k_m have one type for all of them. Other matrices and convolutions are f16 (f32 in f32, bf16 in
    bf16), vectors f32.

    Raises ModelError if the scheme is not one of `mixes.FILE_TYPES`.
    """
    base = get_file_type(scheme).tensor_type
    other = base if base in FLOAT_TYPES else "f16"
    chosen = {}
    for name, shape in shapes.items():
        is_vector = sum(size > 1 for size in shape) < 2
        chosen[name] = "f32" if is_vector else fit_type(base, shape[-1]) if _LINEAR.fullmatch(name) else other
    return chosen


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _audio_metadata(preprocessing: Preprocessing) -> dict[str, Any]:
    return {
        f"{ctc.ARCHITECTURE}.audio.sample_rate": np.uint32(preprocessing.rate_hz),
        f"{ctc.ARCHITECTURE}.audio.normalize": preprocessing.normalize,
        f"{ctc.ARCHITECTURE}.audio.attention_mask": preprocessing.attention_mask,
        f"{ctc.ARCHITECTURE}.audio.padding_value": np.float32(preprocessing.padding_value),
    }


def _vocabulary_metadata(vocabulary: Vocabulary) -> dict[str, Any]:
    delimiter = {} if vocabulary.delimiter is None else {"delimiter_token_id": np.uint32(vocabulary.delimiter)}
    own: dict[str, Any] = {
        "texts": list(vocabulary.texts),
        "blank_token_id": np.uint32(vocabulary.blank),
        **delimiter,
        "special_token_ids": np.array(sorted(vocabulary.specials), np.uint32),
        "separator": vocabulary.separator,
        "lower_case": vocabulary.lower_case,
    }
    return {
        "tokenizer.ggml.model": "ctc",
        "tokenizer.ggml.tokens": list(vocabulary.tokens),
        **{f"tokenizer.ctc.{key}": value for key, value in own.items()},
    }
