"""Find a checkpoint's weights on disk, and convert pickled ones to safetensors once, without running their code."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from mowa.errors import ModelError
from mowa.hardware import cache_folder
from mowa.io.atomic import read_json, replace_atomically

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("mowa")

SAFETENSORS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")


def ensure_safetensors(folder: Path) -> Path:
    """The folder that holds `folder`'s weights as safetensors: itself, or one under the cache made of its pickles.

    A pickle is read once, with `weights_only`, straight from the file's pages, and written as safetensors next to a
    stamp of the files it came from (path, size, time); a later call finds it, a changed file is converted again. The
    made folder holds no config: give `from_pretrained` the original's config beside it. That keeps loading lazy, one
    tensor at a time from the file, where `state_dict=` would hold a whole second copy.

    Raises ModelError where weights are missing, damaged, or a pickle wants to run code (it is not run).
    """
    files = weight_files(folder)
    if not files:
        raise ModelError(f"{folder} has no complete weights: neither model.safetensors nor pytorch_model.bin")
    return folder if files[0].suffix == ".safetensors" else _converted(folder, files)


def weight_files(folder: Path) -> list[Path]:
    """Safetensors if there are any, else pickles, whole or in shards; empty if there are none or a shard is missing."""
    for single in (folder / "model.safetensors", folder / "pytorch_model.bin"):
        if single.is_file():
            return [single]
        index = single.with_name(f"{single.name}.index.json")
        if index.is_file():
            shards = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
            return shards if all(shard.is_file() for shard in shards) else []
    return []


def _converted(folder: Path, pickles: list[Path]) -> Path:
    real = [file.resolve() for file in pickles]
    stamp = json.dumps([(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in real])
    key = hashlib.sha256("\n".join(map(str, real)).encode()).hexdigest()[:16]
    made = cache_folder() / "converted" / key / "model.safetensors"
    if made.is_file() and safetensors_metadata(made).get("stamp") == stamp:
        return made.parent

    from safetensors.torch import save_file

    log.info("converting the pickled weights of %s to safetensors, once", folder)
    tensors = _owning_their_memory({name: tensor for file in real for name, tensor in _read_pickle(file).items()})
    made.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(made) as unfinished:
        save_file(tensors, unfinished, metadata={"format": "pt", "source": str(folder.absolute()), "stamp": stamp})
    return made.parent


def _read_pickle(path: Path) -> dict[str, Tensor]:
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):  # of odd protocols: a pickle is read or refused
            # Only the zip format (torch >= 1.6) can be mapped; older pickles are read into memory.
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        culprit = f"wants to run {wanted[1]}" if wanted else "holds more than tensors"
        raise ModelError(f"{path} is refused: its pickle {culprit}, and only tensors are read") from None
    except (RuntimeError, EOFError, OSError) as error:
        reason, *_ = str(error).splitlines() or ["it ends early"]
        raise ModelError(f"{path} is damaged: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(f"{path} is not a plain name → tensor pickle: export it with save_pretrained first")
    return state


def _owning_their_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Safetensors holds contiguous tensors with memory of their own: copy the few that are not so, no others."""
    seen: set[int] = set()
    owned = {}
    for name, tensor in tensors.items():
        dense = tensor.contiguous()
        owned[name] = dense.clone() if dense.untyped_storage().data_ptr() in seen else dense
        seen.add(dense.untyped_storage().data_ptr())
    return owned


def safetensors_metadata(path: Path) -> dict[str, str]:
    """What is noted in a safetensors header (u64 length, then JSON); empty if the file is not one."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except (OSError, ValueError, OverflowError):
        return {}
    return header.get("__metadata__", {}) if isinstance(header, dict) else {}


def fix_weight_permissions(folder: Path) -> None:
    """Whoever may read the config in `folder` may read its weights too, which safetensors keeps to their writer."""
    readers = (folder / "config.json").stat().st_mode
    for file in folder.glob("*.safetensors"):
        file.chmod(readers)
