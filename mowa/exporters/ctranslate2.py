"""A CTC net as CTranslate2 runs it: converted, opened again and compared with the net before the folder is there.

The folder `ctranslate2` in it holds `model.bin`, and a config and vocabulary of CTranslate2's own. It is fed float32
[B, 1, N], normalised as the audio settings say, and gives logits float32 [B, T, V].

CTranslate2 has one net of this kind, that of large wav2vec 2.0 models, and most of its sizes are written in its code:
`STOCK` holds them, and a net that differs is refused. It takes no mask, so only recordings of one length share a batch.
HuBERT's net is the same under another name. Who runs the folder is not known here.
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

from mowa.errors import MissingDependency, ModelError
from mowa.exporters import verify
from mowa.exporters.manifest import ExportResult
from mowa.exporters.prepare import prepare_for_export
from mowa.types import Model, Scheme

log = logging.getLogger("mowa")

MODEL_FOLDER = "ctranslate2"
SUPPORTED_MODEL_TYPES = ("wav2vec2", "hubert")
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
QUANTIZATIONS = {
    ("float32", "none"): "float32",
    ("float16", "none"): "float16",
    ("bfloat16", "none"): "bfloat16",
    ("int8", "dynamic"): "int8_float32",
}
UNSUPPORTED_SCHEMES = {
    ("int8", "static"): "it finds the range of what meets int8 weights anew each time",
    ("int8", "none"): "it multiplies int8 weights with int8 inputs alone",
    ("int4", "none"): "it has no weights in four bits for these nets",
    ("nf4", "none"): "it has no weights in nf4",
    ("mixed", "dynamic"): "it has one width for all layers",
}


def unsupported_reason(model: Model) -> str:
    """As `Exporter.can`."""
    config = model.net.config
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        return f"CTranslate2 has no net like {model.family.name}'s; use onnx"
    for name, stock in REQUIRED_CONFIG.items():
        found = getattr(config, name, stock)
        found = list(found) if isinstance(found, tuple) else found
        if found != stock:
            return f"its net has {name} {found}, and CTranslate2 computes only {stock}; use onnx"
    kind = _kind(model.scheme)
    return (
        ""
        if kind in QUANTIZATIONS
        else f"{UNSUPPORTED_SCHEMES.get(kind, 'it has no such weights')}; use int8-dynamic, or onnx"
    )


def _kind(scheme: Scheme) -> tuple[str, str]:
    return scheme.weights, scheme.activations


def require_packages() -> None:
    """MissingPart where what exporting needs is not installed."""
    try:
        import_module("ctranslate2")
    except ImportError:
        raise MissingDependency("CTranslate2 needs ctranslate2: pip install 'mowa[ctranslate2]'") from None


def write(model: Model, folder: Path) -> tuple[Any, ExportResult]:
    """As `Exporter.write`.

    Half precision is what is kept; a processor multiplies it in float32. In int8 are also the convolutions and the
    head, each row by a step of CTranslate2's own, so what the scheme keeps wider there is not. float32 must say what
    the net says, and anything narrower must find the same output likeliest in 80 % of frames.
    """
    net = prepare_for_export(model, dequantize=True, position_table=False)
    kind, name = QUANTIZATIONS[_kind(model.scheme)], model.origin.name
    try:
        _convert(net, model.vocabulary.tokens, folder / MODEL_FOLDER, kind)
        loaded = open_model(folder / MODEL_FOLDER, model.scheme)
        farthest, agreeing = _compared(model, net, loaded)
    except (AttributeError, RuntimeError, ValueError) as error:
        raise ModelError(f"CTranslate2 cannot run {name}: {str(error).strip()}; export it as onnx") from error
    verify.verify_tolerance(model, f"CTranslate2's {kind}", farthest, agreeing, alternative="onnx")
    details = {"model": MODEL_FOLDER, "quantization": kind, "computes": loaded.compute_type, "masked": False}
    files = tuple(f"{MODEL_FOLDER}/{file.name}" for file in sorted((folder / MODEL_FOLDER).iterdir()))
    return net, ExportResult(files, details, farthest, agreeing, packages=("ctranslate2",))


@dataclass(frozen=True, slots=True)
class _Words:
    """What the converter asks of a tokenizer."""

    tokens: Sequence[str]

    def get_vocab(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}


def _convert(net: Any, tokens: Sequence[str], folder: Path, kind: str) -> None:
    converters = import_module("ctranslate2.converters.transformers")
    net = copy.deepcopy(net)  # the converter hangs modules under other names, and quantises weights in their place
    if not hasattr(net, "wav2vec2"):
        net.wav2vec2 = net.base_model
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        spec = converters.Wav2Vec2Loader()(net, _Words(tokens))
        spec.validate()
        spec.optimize(quantization=kind)
        folder.mkdir()
        spec.save(str(folder))


def open_model(folder: Path, scheme: Scheme, threads: int = 0) -> Any:
    """The `ctranslate2.models.Wav2Vec2` in `folder`, on the processor; `threads` 0: as many as it takes to be right.

    What is in half precision is multiplied in float32: with the very same weights, and on every processor."""
    ctranslate2 = import_module("ctranslate2")
    computes = "int8_float32" if scheme.weights == "int8" else "float32"
    return ctranslate2.models.Wav2Vec2(str(folder), "cpu", compute_type=computes, intra_threads=threads)


def run(model: Any, clips: Sequence[np.ndarray]) -> np.ndarray:
    """Normalised recordings of one length, float32 [n] each, as one batch → logits float32 [B, T, V]."""
    ctranslate2 = import_module("ctranslate2")
    batch = np.ascontiguousarray(np.stack(clips)[:, None], np.float32)
    return np.array(model.encode(ctranslate2.StorageView.from_array(batch), to_cpu=True))


def _compared(model: Model, net: Any, loaded: Any) -> tuple[float, float]:
    """`compare.apart` of what CTranslate2 and the net say, alone and by twos."""
    speech, noise, least = verify.load_clips(model)
    found: list[torch.Tensor] = []
    truth: list[torch.Tensor] = []
    for clips in ([speech], [noise, verify.preprocess(model, speech[: len(noise)])], [least]):
        found += list(torch.from_numpy(run(loaded, clips)))
        truth += verify.compute_logits(net, clips)
        if len(found[-1]) != len(truth[-1]):
            raise ModelError(
                f"CTranslate2 makes {len(found[-1])} frames of {model.origin.name} where the net makes"
                f" {len(truth[-1])}: export it as onnx"
            )
    return verify.compare_logits(found, truth)
