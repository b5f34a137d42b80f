"""Find a checkpoint's weights, and convert pickled ones to safetensors without running their code."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mowa.errors import ModelError
from mowa.hardware import cache_folder
from mowa.io.atomic import read_json, replace_atomically

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("mowa")

SAFETENSORS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
_COMPILED = re.compile(r"(?<![^.])_orig_mod\.")  # a whole component of a key
PICKLES = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")


def ensure_safetensors(folder: Path) -> Path:
    """Return a folder that holds `folder`'s weights as safetensors: itself, or a converted copy in the cache.

    Pickles are converted, and weights that were saved from a wrapper (`unwrap_keys`). A pickle is read once with
    `weights_only=True` and memory-mapped; the copy records path, size and modification time of its source, and a
    changed file is converted again. The copy has no config: pass the original's config to `from_pretrained`. Loading
    then stays lazy, whereas `state_dict=` would hold a second copy of the weights.

    Raises ModelError if weights are missing or damaged, or if a pickle would run code.
    """
    files = weight_files(folder)
    if not files:
        raise ModelError(f"{folder} has no complete weights: neither model.safetensors nor pytorch_model.bin")
    if files[0].suffix == ".safetensors" and not _is_wrapped(files):
        return folder
    return _convert_to_safetensors(folder, files)


def unwrap_keys(keys: Collection[str]) -> dict[str, str]:
    """Return key → key without what torch's wrappers put into it.

    `torch.compile` puts `_orig_mod.` before the keys of the module that it compiles, and DistributedDataParallel
    `module.` before all keys.
    """
    names = {key: _COMPILED.sub("", key) for key in keys}
    while names and all(name.startswith("module.") for name in names.values()):
        names = {key: name.removeprefix("module.") for key, name in names.items()}
    return names


def _is_wrapped(files: Sequence[Path]) -> bool:
    keys = [key for file in files for key in safetensors_header(file) if key != "__metadata__"]
    return any(key != name for key, name in unwrap_keys(keys).items())


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint, else its pickles; empty if there are none or a shard is missing."""
    for single in (folder / "model.safetensors", folder / "pytorch_model.bin"):
        if single.is_file():
            return [single]
        index = single.with_name(f"{single.name}.index.json")
        if index.is_file():
            shards = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
            return shards if all(shard.is_file() for shard in shards) else []
    return []


def _convert_to_safetensors(folder: Path, files: list[Path]) -> Path:
    sources = [file.resolve() for file in files]
    stamp = json.dumps([(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sources])
    key = hashlib.sha256("\n".join(map(str, sources)).encode()).hexdigest()[:16]
    converted = cache_folder() / "converted" / key / "model.safetensors"
    if converted.is_file() and safetensors_metadata(converted).get("stamp") == stamp:
        return converted.parent

    from safetensors.torch import save_file

    log.info("converting the weights of %s", folder)
    state = {key: tensor for file in sources for key, tensor in read_tensors(file).items()}
    names = unwrap_keys(state)
    tensors = _separate_storages({names[key]: tensor for key, tensor in state.items()})
    converted.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(converted) as unfinished:
        save_file(tensors, unfinished, metadata={"format": "pt", "source": str(folder.absolute()), "stamp": stamp})
    return converted.parent


def _read_pickle(path: Path) -> dict[str, Tensor]:
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):  # about unusual pickle protocols
            # Only the zip format (torch >= 1.6) can be memory-mapped.
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        called = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"would run {called[1]}" if called else "holds more than tensors"
        raise ModelError(f"{path} was not loaded: its pickle {reason}, and only tensors are read") from None
    except (RuntimeError, EOFError, OSError) as error:
        reason, *_ = str(error).splitlines() or ["the file is truncated"]
        raise ModelError(f"{path} is damaged: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(f"{path} is not a state dict of tensors: write it with save_pretrained first")
    return state


def _separate_storages(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share a storage or are not contiguous: safetensors rejects both."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        dense = tensor.contiguous()
        separate[name] = dense.clone() if dense.untyped_storage().data_ptr() in seen else dense
        seen.add(dense.untyped_storage().data_ptr())
    return separate


def safetensors_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file; empty if the file is not safetensors."""
    metadata: dict[str, str] = safetensors_header(path).get("__metadata__", {})
    return metadata


def safetensors_header(path: Path) -> dict[str, Any]:
    """Read the header of a safetensors file (u64 length, then JSON); empty if the file is not safetensors."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, path.stat().st_size)))  # a damaged length may be of any size
    except (OSError, ValueError, OverflowError):
        return {}
    return header if isinstance(header, dict) else {}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, or a pickle without running its code. Raises ModelError if it is damaged."""
    if path.suffix != ".safetensors":
        return _read_pickle(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(f"{path} is damaged: {error}") from error


def fix_weight_permissions(folder: Path) -> None:
    """Give weights the permissions of config.json; safetensors makes them readable by their owner only."""
    mode = (folder / "config.json").stat().st_mode
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)
