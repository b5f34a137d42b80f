"""Load a causal language model from a GGUF file: weights are dequantized, and the net is a stock transformers module.

Weights are read tensor by tensor, so that memory holds the net and one tensor. `load_tokenizer` uses transformers' own
reader of GGUF vocabularies.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mowa.errors import DataError, MissingDependency, ModelError
from mowa.families import family_of
from mowa.io.gguf import GGUFFile, read_gguf
from mowa.io.hub import silence_transformers
from mowa.kernels.quant.gguf_blocks import BLOCK_TYPES, decode
from mowa.loading.causal import validate_tokenizer
from mowa.loading.checkpoint import validate_device, validate_dtype
from mowa.models.gguf import restore, rope
from mowa.models.gguf.architecture import TensorRule
from mowa.quantization.formats import compute_buffers
from mowa.types import CausalModel, Model, Origin, TextProcessor

SUFFIX = ".gguf"
LICENSE_KEY = "general.license"


def load(path: str | Path, *, dtype: str = "float32", device: str = "cpu") -> CausalModel:
    """Load the model and the tokenizer of a GGUF file onto `device` in `dtype`, in eval mode and without gradients.

    Raises:
        ModelError: the architecture or a tensor type is not supported, tensors are missing or do not fit the metadata,
            the file is one part of several, or its tokenizer does not fit.
        DataError: the file is missing or damaged.
        MissingDependency: transformers cannot read its tokenizer without the package gguf.
    """
    validate_dtype(dtype)
    validate_device(device)
    path = Path(path)
    file = read_gguf(path)
    net = load_net(file, dtype=dtype)
    tokenizer = load_tokenizer(path)
    validate_tokenizer(tokenizer, net, str(path))
    origin = Origin(str(path), str(path), path.parent, license=file.metadata.get(LICENSE_KEY))
    return Model(net.to(device), family_of(net), origin, TextProcessor(tokenizer))


def load_net(file: GGUFFile, *, dtype: str = "float32") -> Any:
    """Return the net of a GGUF file, dequantized to `dtype`, on the CPU, in eval mode and without gradients.

    Raises ModelError as `load`.
    """
    from transformers import AutoModelForCausalLM

    _validate_file(file)
    divisors = {name: read_tensor(file, name) for name in rope.TENSORS if name in file.tensors}
    restoration = restore(file.metadata, {name: info.shape for name, info in file.tensors.items()}, divisors)
    restoration.config.dtype = torch.float32
    with silence_transformers(), torch.device("meta"):
        net = AutoModelForCausalLM.from_config(restoration.config)
    for rule in restoration.rules:
        tensors = [read_tensor(file, name) for name in rule.targets]
        _assign(net, rule, tensors, restoration.config, getattr(torch, dtype))
    net.tie_weights()
    if missing := [name for name, parameter in net.named_parameters() if parameter.is_meta]:
        raise ModelError(
            f"{file.path} does not hold {missing[0]}, which its metadata requires ({len(missing)} missing)"
        )
    compute_buffers(net)
    return net.eval().requires_grad_(False)


def _validate_file(file: GGUFFile) -> None:
    if (parts := int(file.metadata.get("split.count", 1))) > 1:
        raise ModelError(f"{file.path} is one of {parts} parts: join them with llama-gguf-split --merge")
    for name, info in file.tensors.items():
        if info.type_name not in BLOCK_TYPES:
            raise ModelError(
                f"{file.path} stores {name} as {info.type_name}, which cannot be dequantized; supported are"
                f" {', '.join(BLOCK_TYPES)}"
            )


def read_tensor(file: GGUFFile, name: str) -> Tensor:
    """Return a tensor of a file, dequantized, float32. Raises DataError if there is no such tensor."""
    info = file.tensors.get(name)
    if info is None:
        raise DataError(f"{file.path} has no tensor {name}")
    rows = torch.from_numpy(file.blocks(name).reshape(-1, info.row_bytes).copy())
    return decode(rows, info.type_name).reshape(info.shape)


def _assign(net: Any, rule: TensorRule, tensors: Sequence[Tensor], config: Any, dtype: torch.dtype) -> None:
    """Put a tensor of the state dict into `net`; buffers stay in float32."""
    module_name, _, leaf = rule.source.rpartition(".")
    try:
        module = net.get_submodule(module_name)
        target = getattr(module, leaf)
    except AttributeError:
        raise ModelError(f"{rule.targets[0]} has no place in {config.model_type} with these metadata") from None
    try:
        tensor = rule.transform.inverse(tensors, config)
    except RuntimeError as error:
        raise ModelError(f"{rule.targets[0]} does not fit the metadata: {str(error).splitlines()[0]}") from error
    if tensor.shape != target.shape:
        shapes = f"{list(tensor.shape)}, and its metadata requires {list(target.shape)}"
        raise ModelError(f"{rule.targets[0]} gives {rule.source} {shapes}")
    if isinstance(target, nn.Parameter):
        module._parameters[leaf] = nn.Parameter(tensor.to(dtype), requires_grad=False)
    else:
        module._buffers[leaf] = tensor.to(target.dtype)


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer of a GGUF file with transformers. Raises ModelError if it cannot be read."""
    from transformers import AutoTokenizer

    if find_spec("gguf") is None:
        raise MissingDependency("the tokenizer of a GGUF file needs the package gguf: pip install gguf")
    with silence_transformers():
        try:
            return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        except Exception as error:  # transformers raises whatever the vocabulary leads to
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(f"the tokenizer of {path} cannot be read: {reason}") from error
