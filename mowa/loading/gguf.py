"""Load a model from a GGUF file: weights are dequantized, and the net is a stock transformers module.

Weights are read tensor by tensor, so that memory holds the net and one tensor. `load_tokenizer` takes the tokenizer
that `mowa export --to gguf` wrote beside the file, or else transformers' own reader of GGUF vocabularies. Files of
speech models are loaded by `gguf_ctc`.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from mowa.errors import DataError, MissingDependency, ModelError
from mowa.families import family_of
from mowa.io.gguf import GGUFFile, read_gguf
from mowa.io.hub import silence_transformers
from mowa.kernels.quant.gguf_blocks import BLOCK_TYPES, decode
from mowa.loading.causal import load_tokenizer as load_tokenizer_of_folder
from mowa.loading.causal import validate_tokenizer
from mowa.loading.checkpoint import validate_device, validate_dtype
from mowa.models.gguf import restore, rope
from mowa.models.gguf.architecture import TensorRule
from mowa.models.gguf.ctc import ARCHITECTURE as CTC_ARCHITECTURE
from mowa.quantization.formats import compute_buffers
from mowa.types import AnyModel, CausalModel, Model, Origin, TextProcessor

log = logging.getLogger("mowa")

SUFFIX = ".gguf"
ARCHITECTURE_KEY, LICENSE_KEY, TOKENS_KEY = "general.architecture", "general.license", "tokenizer.ggml.tokens"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_FILES = (
    *(TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    "config.json",
)


def is_gguf(name: str | Path) -> bool:
    """Return whether `name` is that of a GGUF file."""
    return Path(name).suffix.lower() == SUFFIX


def read_task(path: str | Path) -> str:
    """Return the task of the model in a GGUF file: ctc or causal. Raises DataError as `read_gguf`."""
    return "ctc" if read_gguf(path).metadata.get(ARCHITECTURE_KEY) == CTC_ARCHITECTURE else "causal"


def stored_dtype(path: str | Path) -> str:
    """Return the dtype to compute in where float32 is too large: float16 for files with float16 weights, else bfloat16.

    Raises DataError as `read_gguf`.
    """
    types = {info.type_name for info in read_gguf(path).tensors.values()}
    return "float16" if "f16" in types and types <= {"f16", "f32"} else "bfloat16"


def load(path: str | Path, *, dtype: str = "float32", device: str = "cpu") -> AnyModel:
    """Load the model of a GGUF file, of speech or text, in eval mode and without gradients. Raises as `load_causal`."""
    if read_task(path) == "causal":
        return load_causal(path, dtype=dtype, device=device)
    model: AnyModel = import_module("mowa.loading.gguf_ctc").load(path, dtype=dtype, device=device)
    return model


def load_causal(path: str | Path, *, dtype: str = "float32", device: str = "cpu") -> CausalModel:
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
    tokenizer = load_tokenizer(path, file.metadata.get(TOKENS_KEY, ()))
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


def load_tokenizer(path: Path, tokens: Sequence[str] = ()) -> Any:
    """Load the tokenizer of a GGUF file with transformers.

    Args:
        tokens: the vocabulary of the file. A tokenizer beside it, as `mowa export --to gguf` writes it, is used if its
            tokens have the same ids.

    Raises ModelError if it cannot be read; MissingDependency if there is none beside the file, and no package gguf.
    """
    from transformers import AutoTokenizer

    with _tokenizer_beside(path) as folder:
        if folder is not None:
            tokenizer = load_tokenizer_of_folder(folder)
            if (wrong := _first_difference(tokenizer, tokens)) is None:
                return tokenizer
            log.warning("the tokenizer beside %s is not used: %s", path, wrong)
    if find_spec("gguf") is None:
        raise MissingDependency("the tokenizer of a GGUF file needs the package gguf: pip install 'mowa[gguf]'")
    with silence_transformers(), TemporaryDirectory() as alone:  # files beside it would be read instead
        try:
            Path(alone, path.name).symlink_to(path.resolve())
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=path.name, local_files_only=True)
        except Exception as error:  # transformers raises whatever the vocabulary leads to
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(f"the tokenizer of {path} cannot be read: {reason}") from error
    tokenizer.mowa_from_gguf = True  # and so may differ from llama.cpp's
    return tokenizer


@contextmanager
def _tokenizer_beside(path: Path) -> Iterator[Path | None]:
    """Yield a folder with the tokenizer that lies beside a file, as tokenizer.json or MODEL.tokenizer.json."""
    named = path.with_name(f"{path.stem}.{TOKENIZER_FILE}")
    if not named.is_file():
        yield path.parent if path.with_name(TOKENIZER_FILE).is_file() else None
        return
    with TemporaryDirectory() as folder:
        for name in TOKENIZER_FILES:
            if (file := path.with_name(f"{path.stem}.{name}")).is_file():
                shutil.copy(file, Path(folder, name))
        yield Path(folder)


def _first_difference(tokenizer: Any, tokens: Sequence[str]) -> str | None:
    """Return the first token of a tokenizer that has another id in a GGUF file, in words; None if there is none."""
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        found = tokens[index] if index < len(tokens) else "no token"
        if found != token:
            return f"{index} is {token!r}, and {found!r} in the file"
    return None
