"""Registry of supported architectures, one file each: class names, linear layers, name patterns, limits.

Start with `registry` (`resolve_family`, `get_family`) and `mowa.types.Family`. docs/add-a-family.md: how to add one.
Importing this package registers all families and does not import torch.
"""

from mowa.families import (
    bert,
    data2vec_audio,
    deepseek,
    gemma,
    gpt_oss,
    granite,
    hubert,
    llama,
    mistral,
    mixtral,
    modernbert,
    mpnet,
    phi,
    qwen,
    qwen2_5_vl,
    unispeech_sat,
    wav2vec2,
    wavlm,
)
from mowa.families.registry import (
    get_family,
    list_families,
    list_family_names,
    list_model_types,
    register,
    resolve_family,
)

__all__ = [
    "bert",
    "data2vec_audio",
    "deepseek",
    "gemma",
    "get_family",
    "gpt_oss",
    "granite",
    "hubert",
    "list_families",
    "list_family_names",
    "list_model_types",
    "llama",
    "mistral",
    "mixtral",
    "modernbert",
    "mpnet",
    "phi",
    "qwen",
    "qwen2_5_vl",
    "register",
    "resolve_family",
    "unispeech_sat",
    "wav2vec2",
    "wavlm",
]
