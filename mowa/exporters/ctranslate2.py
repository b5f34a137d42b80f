"""Export CTC models to CTranslate2.

The subfolder `ctranslate2` holds `model.bin` and CTranslate2's own config and vocabulary. Its input is float32
[B, 1, N], normalized as the audio settings say; its output is logits, float32 [B, T, V].

CTranslate2 implements one such net, that of large wav2vec 2.0 models, with most sizes hard-coded: `REQUIRED_CONFIG`
lists them, and other nets are rejected. It takes no attention mask, so only clips of equal length share a batch. HuBERT
is the same net under another name.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mowa.data import audio
from mowa.errors import ModelError
from mowa.exporters import verify
from mowa.exporters.manifest import ExportResult
from mowa.exporters.prepare import prepare_for_export
from mowa.models.diff import ModelDiff, compare
from mowa.types import CTCModel, Scheme

log = logging.getLogger("mowa")

MODEL_FOLDER = "ctranslate2"
REQUIRED_CONFIG: Mapping[str, Any] = {
    "feat_extract_norm": "layer",
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_bias": True,
    "feat_extract_activation": "gelu",
    "feat_proj_layer_norm": True,
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "conv_pos_batch_norm": False,
    "do_stable_layer_norm": True,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "adapter_attn_dim": None,
    "add_adapter": False,
}
# (weights, activations) of a scheme → CTranslate2's quantization
QUANTIZATIONS = {
    ("float32", "none"): "float32",
    ("float16", "none"): "float16",
    ("bfloat16", "none"): "bfloat16",
    ("int8", "dynamic"): "int8_float32",
}
UNSUPPORTED_SCHEMES = {
    ("int8", "static"): "CTranslate2 computes the range of int8 inputs for each input",
    ("int8", "none"): "CTranslate2 multiplies int8 weights by int8 inputs only",
    ("int4", "none"): "CTranslate2 has no int4 weights for these models",
    ("nf4", "none"): "CTranslate2 has no nf4 weights",
    ("mixed", "dynamic"): "CTranslate2 quantizes all layers alike",
}


def unsupported_reason(model: CTCModel) -> str:
    """See `Exporter.unsupported_reason`."""
    config = model.net.config
    if "ctranslate2" not in model.family.supports:
        return f"CTranslate2 does not implement {model.family.name}; use onnx"
    for name, required in REQUIRED_CONFIG.items():
        value = getattr(config, name, required)
        value = list(value) if isinstance(value, tuple) else value
        if value != required:
            return f"{name} is {value}, and CTranslate2 supports only {required}; use onnx"
    storage = _storage(model.scheme)
    if storage in QUANTIZATIONS:
        return ""
    return f"{UNSUPPORTED_SCHEMES.get(storage, 'CTranslate2 does not support this scheme')}; use int8-dynamic, or onnx"


def _storage(scheme: Scheme) -> tuple[str, str]:
    return scheme.weights, scheme.activations


def write(model: CTCModel, folder: Path) -> ExportResult:
    """See `Exporter.write`.

    Half-precision weights are multiplied in float32. With int8, CTranslate2 also quantizes the convolutions and the
    head, one scale per row, so weights that the scheme keeps in higher precision there are not. Tolerances are those of
    `verify_tolerance`.
    """
    net = prepare_for_export(model, dequantize=True, position_table=False)
    quantization, name = QUANTIZATIONS[_storage(model.scheme)], model.origin.name
    try:
        _convert(net, model.vocabulary.tokens, folder / MODEL_FOLDER, quantization)
        loaded = open_model(folder / MODEL_FOLDER, model.scheme)
        diff = _compare(model, net, loaded)
    except (AttributeError, RuntimeError, ValueError) as error:
        raise ModelError(f"CTranslate2 cannot run {name}: {str(error).strip()}; use onnx") from error
    verify.verify_tolerance(model, f"CTranslate2 {quantization}", diff, alternative="onnx")
    details = {
        "model": MODEL_FOLDER,
        "quantization": quantization,
        "compute_type": loaded.compute_type,
        "attention_mask": False,
    }
    files = tuple(f"{MODEL_FOLDER}/{file.name}" for file in sorted((folder / MODEL_FOLDER).iterdir()))
    return ExportResult(net.config, files, details, diff.max_abs_diff, diff.agreement, packages=("ctranslate2",))


@dataclass(frozen=True, slots=True)
class _Tokenizer:
    """The part of a tokenizer that CTranslate2's converter uses."""

    tokens: Sequence[str]

    def get_vocab(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}


def _convert(net: Any, tokens: Sequence[str], folder: Path, quantization: str) -> None:
    converters = import_module("ctranslate2.converters.transformers")
    net = copy.deepcopy(net)  # the converter renames modules and quantizes weights in place
    if not hasattr(net, "wav2vec2"):
        net.wav2vec2 = net.base_model
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        spec = converters.Wav2Vec2Loader()(net, _Tokenizer(tokens))
        spec.validate()
        spec.optimize(quantization=quantization)
        folder.mkdir()
        spec.save(str(folder))


def open_model(folder: Path, scheme: Scheme, threads: int = 0) -> Any:
    """Load the model in `folder` on the CPU as a `ctranslate2.models.Wav2Vec2`.

    With `threads` 0, CTranslate2 chooses their number. Half-precision weights are computed in float32, which all CPUs
    support.
    """
    ctranslate2 = import_module("ctranslate2")
    compute_type = "int8_float32" if scheme.weights == "int8" else "float32"
    return ctranslate2.models.Wav2Vec2(str(folder), "cpu", compute_type=compute_type, intra_threads=threads)


def run(model: Any, clips: Sequence[np.ndarray]) -> np.ndarray:
    """Run preprocessed clips of equal length, float32 [n] each, as one batch. Returns logits, float32 [B, T, V]."""
    ctranslate2 = import_module("ctranslate2")
    batch = np.ascontiguousarray(np.stack(clips)[:, None], np.float32)
    return np.array(model.encode(ctranslate2.StorageView.from_array(batch), to_cpu=True))


def _compare(model: CTCModel, net: Any, loaded: Any) -> ModelDiff:
    """Compare CTranslate2 with the net, in batches of one and two."""
    speech, noise, shortest = verify.load_clips(model)
    logits: list[torch.Tensor] = []
    reference: list[torch.Tensor] = []
    for clips in ([speech], [noise, audio.preprocess(speech[: len(noise)], model.preprocessing)], [shortest]):
        logits += list(torch.from_numpy(run(loaded, clips)))
        reference += verify.compute_logits(net, clips)
        if len(logits[-1]) != len(reference[-1]):
            raise ModelError(
                f"CTranslate2 computes {len(logits[-1])} frames for {model.origin.name}, and the model"
                f" {len(reference[-1])}: use onnx"
            )
    return compare(reference, logits)
