"""Load a causal language model: the transformers model and its tokenizer, which must match."""

from __future__ import annotations

import logging
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from mowa.errors import ModelError
from mowa.families import is_registered
from mowa.io.hub import resolve_model, silence_transformers
from mowa.loading import checkpoint, quantized
from mowa.loading.checkpoint import validate_device, validate_dtype
from mowa.types import CausalModel, Family, Model, TextProcessor

log = logging.getLogger("mowa")


def load(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    offline: bool = False,
) -> CausalModel:
    """Load a causal language model by folder or Hub id onto `device` in `dtype`, in eval mode and without gradients.

    The linear layers of a quantized checkpoint are `QuantizedLinear` modules; `dtype` is that of the other weights. On
    the device meta no weights are read.

    Raises ModelError if the name, family, dtype or device is unknown, if it is a model for another task, or if config,
    weights or tokenizer are missing, damaged or do not match. Also raises as `resolve_model`.
    """
    validate_dtype(dtype)
    validate_device(device)
    origin = resolve_model(name, revision=revision, offline=offline, validate=partial(read_causal_family, name=name))
    family = read_causal_family(origin.folder, origin.source)  # `resolve_model` validates Hub models only
    manifest = quantized.read_checkpoint_manifest(origin.folder)
    tokenizer = load_tokenizer(origin.folder)
    net = (_build_net if device == "meta" else _load_net)(origin.folder, family, dtype)
    validate_tokenizer(tokenizer, net, origin.name)
    if not is_registered(family):
        _warn_unregistered(family.name)
    scheme = quantized.infer_scheme(manifest, net, family)
    return Model(net.to(device), family, origin, TextProcessor(tokenizer), scheme)


@cache
def _warn_unregistered(model_type: str) -> None:
    """Warn once per process that models of this type are not accelerated."""
    log.warning("%s has no registry entry: it runs unaccelerated, with transformers' own modules", model_type)


def read_causal_family(folder: Path, name: str = "") -> Family:
    """Return the family of the causal checkpoint in `folder`, which is called `name`.

    Raises ModelError if it is unsupported or not causal.
    """
    family = checkpoint.read_family(folder, name)
    if family.task == "ctc":
        raise ModelError(f"{folder} is a speech model ({family.name}); a language model is needed here")
    if family.task != "causal":
        raise ModelError(f"{folder} is a model for {family.task} ({family.name}), which mowa cannot load yet")
    return family


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer in `folder`, without running its code. Raises ModelError if it is missing or damaged."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ModelError(f"{folder} has no tokenizer: add tokenizer.json or tokenizer.model")
    with silence_transformers():
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # tokenizers raises bare Exceptions for damaged files
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(f"the tokenizer of {folder} cannot be read: {reason}") from error


def validate_tokenizer(tokenizer: Any, net: Any, name: str) -> None:
    """Raise ModelError if the tokenizer has ids for which the net has no embedding."""
    num_embeddings, highest_id = net.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values())
    if highest_id >= num_embeddings:
        raise ModelError(
            f"the tokenizer of {name} has ids up to {highest_id}, but the model has {num_embeddings} embeddings: it"
            " belongs to another model, or tokens were added to the tokenizer only"
        )


def _load_net(folder: Path, family: Family, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    if quantization_config := quantized.read_quantization_config(folder):
        net = quantized.load_quantized_net(AutoModelForCausalLM, folder, family, dtype, quantization_config)
    else:
        net, loading_info = checkpoint.load_net(AutoModelForCausalLM, folder, family, dtype)
        checkpoint.validate_loading_info(folder, net.base_model_prefix, loading_info)
    return _finish(net, folder, family)


def _build_net(folder: Path, family: Family, dtype: str) -> Any:
    """Return the net on the meta device. Raises ModelError if the checkpoint is quantized."""
    from transformers import AutoModelForCausalLM

    if quantized.read_quantization_config(folder):
        raise ModelError(f"{folder} is quantized: it can be loaded on a CPU or GPU, not on the meta device")
    with silence_transformers(), torch.device("meta"):
        net = AutoModelForCausalLM.from_config(checkpoint.load_config(folder, family))
    return _finish(net.to(getattr(torch, dtype)), folder, family)


def _finish(net: Any, folder: Path, family: Family) -> Any:
    if net.base_model is net:  # Llama 4's prefix is that of another class
        net.base_model_prefix = family.tensor_names["block"].partition(".")[0]
    if (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        net.generation_config = GenerationConfig.from_pretrained(folder)
    return net.eval().requires_grad_(False)
