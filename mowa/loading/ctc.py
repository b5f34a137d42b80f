"""Load a CTC checkpoint: the transformers model, its vocabulary and its audio settings.

Nothing is guessed: a checkpoint with a missing weight, a vocabulary that does not match the head, or missing audio
settings is rejected.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mowa.errors import ModelError
from mowa.io.atomic import read_json
from mowa.io.hub import resolve_model
from mowa.io.processor import read_preprocessing, read_vocabulary
from mowa.loading import checkpoint, languages, quantized
from mowa.loading.checkpoint import validate_device, validate_dtype, validate_loading_info
from mowa.types import CTCModel, Family, Model, SpeechProcessor, Vocabulary

log = logging.getLogger("mowa")

_PROCESSOR_WITH_LM = "Wav2Vec2ProcessorWithLM"
_NO_HEAD = "fine-tune it first, or use a checkpoint whose architecture ends in ForCTC"


def load(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    offline: bool = False,
    require_head: bool = True,
    target_lang: str | None = None,
) -> CTCModel:
    """Load a CTC model by alias, folder or Hub id onto `device` in `dtype`, in eval mode and without gradients.

    With `require_head=False`, for training a new head, a checkpoint without one is accepted; its vocabulary is empty.
    `target_lang` selects a language of an MMS checkpoint (`loading.languages`); None is its default.

    Raises ModelError if the name, family, dtype or device is unknown, if there is no CTC head, or if config,
    vocabulary, audio settings or weights are missing, damaged or do not match. Also raises as `resolve_model`.
    """
    validate_dtype(dtype)
    validate_device(device)

    def read_supported_family(folder: Path) -> Family:
        family = read_ctc_family(folder, name, require_head=require_head)
        languages.validate_language(folder, target_lang, name)
        return family

    origin = resolve_model(
        name,
        revision=revision,
        offline=offline,
        validate=read_supported_family,
        extra_files=languages.adapter_files(target_lang),
    )
    read_supported_family(origin.folder)
    family = read_ctc_family(origin.folder, origin.source, require_head=require_head)
    manifest = quantized.read_checkpoint_manifest(origin.folder)
    net = _load_net(origin.folder, family, dtype, require_head=require_head)
    languages.load_language(net, family, origin.folder, target_lang)
    if has_language_model(origin.folder):
        log.warning("%s comes with an n-gram language model, which is not used: decoding is greedy", name)
    return Model(
        net=net.to(device),
        family=family,
        origin=replace(origin, target_lang=target_lang),
        processor=SpeechProcessor(
            _load_vocabulary(origin.folder, family, net, require_head, target_lang), read_preprocessing(origin.folder)
        ),
        scheme=quantized.infer_scheme(manifest, net, family),
    )


def read_ctc_family(folder: Path, name: str = "", *, require_head: bool = True) -> Family:
    """Return the family of the CTC checkpoint in `folder`, which is called `name`.

    Raises ModelError if it is unsupported or no CTC model.
    """
    family = checkpoint.read_family(folder, name)
    if family.task != "ctc":
        raise ModelError(f"{folder} is not a speech model ({family.name}); use one with a CTC head, such as pl-tiny")
    config = read_json(folder / "config.json")
    architectures = config.get("architectures") or []
    if require_head and architectures and not any(name.endswith("ForCTC") for name in architectures):
        raise ModelError(f"{folder} ({architectures[0]}) has no CTC head: {_NO_HEAD}")
    return family


def has_language_model(folder: Path) -> bool:
    """Return whether a checkpoint has an n-gram language model for pyctcdecode; the Hub's are not downloaded."""
    audio_settings = folder / "preprocessor_config.json"
    return (folder / "language_model").is_dir() or (
        audio_settings.is_file() and read_json(audio_settings).get("processor_class") == _PROCESSOR_WITH_LM
    )


def _load_vocabulary(folder: Path, family: Family, net: Any, require_head: bool, target_lang: str | None) -> Vocabulary:
    if not require_head and not (folder / "vocab.json").is_file():
        return Vocabulary((), blank=0, delimiter=None)
    return read_vocabulary(folder, net.get_submodule(family.head).out_features, target_lang)


def _load_net(folder: Path, family: Family, dtype: str, *, require_head: bool) -> Any:
    from transformers import AutoModelForCTC

    if quantization_config := quantized.read_quantization_config(folder):
        if not require_head:
            raise ModelError(
                f"{folder} is quantized and cannot be fine-tuned; start from the full-precision checkpoint"
            )
        return quantized.load_quantized_net(AutoModelForCTC, folder, family, dtype, quantization_config)
    net, loading_info = checkpoint.load_net(AutoModelForCTC, folder, family, dtype)
    _validate_loading_info(folder, family, net.base_model_prefix, loading_info, require_head=require_head)
    return net.eval().requires_grad_(False)


def _validate_loading_info(
    folder: Path, family: Family, base_prefix: str, loading_info: Mapping[str, Any], *, require_head: bool
) -> None:
    """`validate_loading_info`, except for SpecAugment's `masked_spec_embed` and, without `require_head`, the head."""
    head = (f"{family.head}.weight", f"{family.head}.bias")
    if require_head and head[0] in loading_info["missing_keys"]:
        raise ModelError(f"the weights of {folder} have no {family.head}, so there is no CTC head: {_NO_HEAD}")
    ignored = {key for key in loading_info["missing_keys"] if key.endswith(".masked_spec_embed")}
    validate_loading_info(
        folder, base_prefix, loading_info, ignored_missing=ignored if require_head else ignored.union(head)
    )
