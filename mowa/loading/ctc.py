"""A CTC checkpoint → a `Model`: the stock transformers net, what its outputs mean, and what it asks of its audio.

Everything is read from the checkpoint and nothing assumed: a net with a weight left at random, a vocabulary of another
size than the head, or audio settings that are not written down are refused. How the net is fed or decoded is not known
here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mowa.errors import ModelError
from mowa.io.atomic import read_json
from mowa.io.hub import resolve_model
from mowa.loading import checkpoint, quantized
from mowa.loading.checkpoint import validate_device, validate_dtype, validate_loading_info
from mowa.types import Family, Model, Preprocessing, Vocabulary

log = logging.getLogger("mowa")

# What Wav2Vec2CTCTokenizer takes where a checkpoint is silent (transformers, tokenization_wav2vec2.py).
_ROLES = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_DELIMITER = "|"

_FINE_TUNE = "fine-tune one on it first, or choose a checkpoint whose architecture ends in ForCTC"


def load(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    offline: bool = False,
    require_head: bool = True,
) -> Model:
    """Load a CTC model by alias, folder or hub id, in eval mode, with no gradients, on `device` in `dtype`.

    With `head` False, its head is to be replaced: a checkpoint without one is taken too; its vocabulary is empty then.

    Raises ModelError: an unknown name, family or dtype; no CTC head; config, vocabulary, audio settings or weights that
    are missing, damaged or do not fit each other; a device that is not there. HubUnreachable as `files.resolve` does.
    """
    validate_dtype(dtype)
    validate_device(device)
    vet = partial(read_ctc_family, require_head=require_head)
    origin = resolve_model(name, revision=revision, offline=offline, validate=vet)
    family = vet(origin.folder)
    said = quantized.read_manifest(origin.folder)
    net = _net(origin.folder, family, dtype, require_head=require_head)
    return Model(
        net=net.to(device),
        family=family,
        origin=origin,
        vocabulary=_vocabulary(origin.folder, family, net, require_head),
        preprocessing=read_preprocessing(origin.folder),
        scheme=quantized.infer_scheme(said, net, family),
    )


def _vocabulary(folder: Path, family: Family, net: Any, require_head: bool) -> Vocabulary:
    if not require_head and not (folder / "vocab.json").is_file():
        return Vocabulary((), blank=0, delimiter=None)
    return read_vocabulary(folder, net.get_submodule(family.head).out_features)


def read_ctc_family(folder: Path, *, require_head: bool = True) -> Family:
    """The family that `folder`'s config.json names; ModelError if mowa has none, or the config names no CTC model.

    `head` False: a model without a CTC head will do.
    """
    family = checkpoint.read_family(folder)
    if family.task != "ctc":
        raise ModelError(f"{folder} is a {family.name} model, and reads text: name one that hears, such as pl-tiny")
    config = read_json(folder / "config.json")
    architectures = config.get("architectures") or []
    if require_head and architectures and not any(name.endswith("ForCTC") for name in architectures):
        raise ModelError(f"{folder} is a {architectures[0]}, which has no CTC head: {_FINE_TUNE}")
    return family


def _net(folder: Path, family: Family, dtype: str, *, require_head: bool) -> Any:
    from transformers import AutoModelForCTC

    if how := quantized.read_quantization_config(folder):
        if not require_head:
            raise ModelError(f"{folder} is in few bits, and those do not learn: name the model that it was made of")
        return quantized.load_quantized_net(AutoModelForCTC, folder, family, dtype, how)
    net, report = checkpoint.load_net(AutoModelForCTC, folder, family, dtype)
    _refuse_gaps(folder, family, net.base_model_prefix, report, require_head=require_head)
    return net.eval().requires_grad_(False)


def _refuse_gaps(folder: Path, family: Family, encoder: str, report: Mapping[str, Any], *, require_head: bool) -> None:
    """`refuse_misfits`; but a missing `masked_spec_embed` is SpecAugment's alone, and a head may be to replace."""
    of_head = (f"{family.head}.weight", f"{family.head}.bias")
    if require_head and of_head[0] in report["missing_keys"]:
        raise ModelError(f"the weights of {folder} hold no {family.head}, so it has no CTC head: {_FINE_TUNE}")
    masks = {key for key in report["missing_keys"] if key.endswith(".masked_spec_embed")}
    validate_loading_info(folder, encoder, report, ignored_missing=masks if require_head else masks.union(of_head))


def read_preprocessing(folder: Path) -> Preprocessing:
    """Audio settings from preprocessor_config.json, or from processor_config.json as transformers 5 writes them.

    Rate and normalisation must be written down; `return_attention_mask` and `padding_value` default as they do in
    Wav2Vec2FeatureExtractor (false, 0). Raises ModelError naming the missing file or key.
    """
    file = folder / "preprocessor_config.json"
    if file.is_file() or not (folder / "processor_config.json").is_file():
        settings = read_json(file)
    else:
        file = folder / "processor_config.json"
        settings = read_json(file).get("feature_extractor") or {}
    for key in ("sampling_rate", "do_normalize"):
        if key not in settings:
            raise ModelError(f"{file} does not say {key}, and mowa does not guess how the audio was prepared")
    return Preprocessing(
        rate_hz=int(settings["sampling_rate"]),
        normalize=bool(settings["do_normalize"]),
        attention_mask=bool(settings.get("return_attention_mask", False)),
        padding_value=float(settings.get("padding_value", 0.0)),
    )


def read_vocabulary(folder: Path, head_size: int) -> Vocabulary:
    """What each of the head's `head_size` outputs means, from vocab.json and the tokenizer's files beside it.

    Blank is `pad_token_id` of config.json, which the CTC loss was trained with; where that is silent, the tokenizer's
    pad token. Where the two disagree the config wins, with a warning: the head learnt what the loss taught it.
    Added tokens beyond the head are left out: no output can mean them.

    Raises ModelError: no vocab.json, a nested one (MMS) without a usable target_lang, another number of tokens than
    outputs, two tokens for one id, no blank.
    """
    settings = {**_optional(folder / "special_tokens_map.json"), **_optional(folder / "tokenizer_config.json")}
    ids = _token_ids(folder, settings, head_size)
    pad = ids.get(_content(settings.get("pad_token")) or _ROLES["pad_token"])
    blank = read_json(folder / "config.json").get("pad_token_id")
    if blank is None:
        blank = pad
    elif pad is not None and pad != blank:
        log.warning("%s: the tokenizer pads with id %d, the CTC loss with %d: blank is %d", folder, pad, blank, blank)
    if blank is None or not 0 <= blank < head_size:
        raise ModelError(f"{folder} names no blank within its {head_size} outputs: config.json pad_token_id is {blank}")
    delimiter = ids.get(_content(settings.get("word_delimiter_token")) or _DELIMITER)
    special = {_content(settings.get(role)) or default for role, default in _ROLES.items()}
    special |= {token["content"] for token in _added(settings).values() if token.get("special")}
    special |= {_content(token) or "" for token in settings.get("additional_special_tokens") or ()}
    return Vocabulary(
        tokens=tuple(sorted(ids, key=ids.__getitem__)),
        blank=blank,
        delimiter=delimiter,
        specials=frozenset(ids[token] for token in special if token in ids) - {blank, delimiter},
    )


def _token_ids(folder: Path, settings: Mapping[str, Any], head_size: int) -> dict[str, int]:
    """Token → id, one token for each of 0 … head_size - 1."""
    listed = read_json(folder / "vocab.json")
    if any(isinstance(value, dict) for value in listed.values()):
        listed = _one_language(folder, listed, settings.get("target_lang"))
    added = _optional(folder / "added_tokens.json")
    added |= {token["content"]: int(id) for id, token in _added(settings).items()}
    ids = listed | {token: id for token, id in added.items() if token not in listed and id < head_size}
    if len(ids) != head_size:
        raise ModelError(f"the vocabulary of {folder} has {len(ids)} tokens and its head {head_size} outputs")
    if set(ids.values()) != set(range(head_size)):
        raise ModelError(f"the ids in {folder}/vocab.json are not 0 to {head_size - 1}, each once")
    return ids


def _one_language(folder: Path, languages: Mapping[str, Any], target: str | None) -> dict[str, int]:
    """MMS (arXiv:2305.13516) keeps one vocabulary per language; the tokenizer's target_lang says which the head has."""
    if target is None or target not in languages:
        some = ", ".join(sorted(languages)[:5])
        raise ModelError(
            f"{folder}/vocab.json holds {len(languages)} languages ({some}, …) and the target_lang of "
            f"tokenizer_config.json is {target!r}: set it to the one whose head these weights have"
        )
    return dict(languages[target])


def _optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _added(settings: Mapping[str, Any]) -> Mapping[str, dict[str, Any]]:
    return settings.get("added_tokens_decoder") or {}


def _content(token: str | Mapping[str, Any] | None) -> str | None:
    """A token as the files write it: plain, or an object with `content` (an AddedToken)."""
    return token["content"] if isinstance(token, Mapping) else token
