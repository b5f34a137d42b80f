"""Load a CTC model from the GGUF file that `mowa.exporters.gguf.speech` describes: everything is in its metadata.

The net is a stock transformers module with dequantized weights; where it has weight norm, the folded weight is split
into magnitude and direction again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mowa.errors import ModelError
from mowa.families import family_of, get_family
from mowa.io.gguf import GGUFFile, read_gguf
from mowa.io.hub import silence_transformers
from mowa.loading.checkpoint import validate_device, validate_dtype
from mowa.loading.gguf import LICENSE_KEY, read_tensor
from mowa.models.gguf import ctc
from mowa.quantization.formats import compute_buffers
from mowa.types import CTCModel, Model, Origin, Preprocessing, SpeechProcessor, Vocabulary

_BATCH_COUNT = "num_batches_tracked"  # of batch norm; used in training only


def is_ctc_file(file: GGUFFile) -> bool:
    """Return whether a GGUF file holds a CTC model."""
    return file.metadata.get("general.architecture") == ctc.ARCHITECTURE


def load(path: str | Path, *, dtype: str = "float32", device: str = "cpu") -> CTCModel:
    """Load the CTC model of a GGUF file onto `device` in `dtype`, in eval mode and without gradients.

    Raises:
        ModelError: the file holds another model, or tensors or metadata are missing or do not fit each other.
        DataError: the file is missing or damaged.
    """
    validate_dtype(dtype)
    validate_device(device)
    path = Path(path)
    file = read_gguf(path)
    if not is_ctc_file(file):
        raise ModelError(f"{path} holds a {file.metadata.get('general.architecture')} model, not {ctc.ARCHITECTURE}")
    try:
        processor = SpeechProcessor(_read_vocabulary(file.metadata), _read_preprocessing(file.metadata))
    except KeyError as error:
        raise ModelError(f"{path} has no metadata {error.args[0]}") from None
    net = _load_net(file, getattr(torch, dtype))
    if len(processor.vocabulary) != (outputs := net.config.vocab_size):
        raise ModelError(f"{path} has {len(processor.vocabulary)} tokens, and its head has {outputs} outputs")
    origin = Origin(str(path), str(path), path.parent, license=file.metadata.get(LICENSE_KEY))
    return Model(net.to(device), family_of(net), origin, processor)


def _load_net(file: GGUFFile, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCTC

    config = ctc.read_config(file.metadata)
    if get_family(config.model_type).task != "ctc":
        raise ModelError(f"{file.path} describes a {config.model_type} model, which is no speech model")
    _validate_counts(file, config)
    try:
        with silence_transformers(), torch.device("meta"):
            net = AutoModelForCTC.from_config(config)
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ModelError(f"{file.path} describes no {config.model_type} model: {reason:.200}") from error
    names = ctc.tensor_names(
        (name for name in net.state_dict() if not name.endswith(_BATCH_COUNT)), net.base_model_prefix
    )
    if missing := sorted(set(names.values()) - set(file.tensors)):
        raise ModelError(
            f"{file.path} has no tensor {missing[0]}, which its metadata requires ({len(missing)} missing)"
        )
    if unknown := sorted(set(file.tensors) - set(names.values())):
        raise ModelError(f"{file.path} has the tensor {unknown[0]}, which its metadata does not describe")
    for name, short in names.items():
        _assign(net, name, file, short, dtype)
    compute_buffers(net)
    return net.eval().requires_grad_(False)


def _validate_counts(file: GGUFFile, config: Any) -> None:
    """Raise ModelError if a file describes more layers than it has tensors, before modules are made of them."""
    counts = [config.num_hidden_layers, getattr(config, "num_adapter_layers", 0)]
    if hasattr(config, "conv_pos_kernel_size"):  # a stack of positional convolutions
        counts.append(config.num_conv_pos_embeddings)
    if (layers := max(counts)) > len(file.tensors):
        raise ModelError(f"{file.path} describes {layers} layers, and has {len(file.tensors)} tensors")


def _assign(net: Any, name: str, file: GGUFFile, short: str, dtype: torch.dtype) -> None:
    """Put a tensor of the file into `net`; buffers keep their dtype."""
    module_name, _, leaf = name.rpartition(".")
    module = net.get_submodule(module_name)
    target = getattr(module, leaf)
    tensor = read_tensor(file, short)
    part = ctc.weight_norm_part(name)
    if part is not None:
        directions = target if part else module.original1
        if tensor.shape == directions.shape:
            tensor = _split_weight(tensor, module.original0)[part]
    if tensor.shape != target.shape:
        raise ModelError(
            f"{file.path} has {short} {list(tensor.shape)}, and its metadata requires {list(target.shape)}"
        )
    if isinstance(target, nn.Parameter):
        module._parameters[leaf] = nn.Parameter(tensor.to(dtype), requires_grad=False)
    else:
        module._buffers[leaf] = tensor.to(target.dtype)


def _split_weight(weight: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return magnitude, in the shape of `like`, and direction. Where all weights are 0, the direction is 1."""
    over = [index for index, size in enumerate(like.shape) if size == 1]
    magnitude = torch.linalg.vector_norm(weight, dim=over, keepdim=True)
    return magnitude, torch.where(magnitude == 0, torch.ones_like(weight), weight)


def _read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    prefix = "tokenizer.ctc."
    delimiter = metadata.get(f"{prefix}delimiter_token_id")
    tokens = tuple(metadata["tokenizer.ggml.tokens"])
    specials = frozenset(int(index) for index in metadata[f"{prefix}special_token_ids"])
    blank = int(metadata[f"{prefix}blank_token_id"])
    if outside := [index for index in (blank, delimiter or 0, *specials) if index >= len(tokens)]:
        raise ModelError(f"the vocabulary of the GGUF file has {len(tokens)} tokens, and no token {outside[0]}")
    return Vocabulary(
        tokens,
        blank=blank,
        delimiter=None if delimiter is None else int(delimiter),
        specials=specials,
        separator=metadata[f"{prefix}separator"],
        lower_case=bool(metadata[f"{prefix}lower_case"]),
    )


def _read_preprocessing(metadata: Mapping[str, Any]) -> Preprocessing:
    prefix = f"{ctc.ARCHITECTURE}.audio."
    return Preprocessing(
        rate_hz=int(metadata[f"{prefix}sample_rate"]),
        normalize=bool(metadata[f"{prefix}normalize"]),
        attention_mask=bool(metadata[f"{prefix}attention_mask"]),
        padding_value=float(metadata[f"{prefix}padding_value"]),
    )
