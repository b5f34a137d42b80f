"""Write GGUF files from weights that are loaded one at a time, several schemes in one pass over them.

Memory holds the tensor that is being written and one buffer of `CHUNK` weights per file.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mowa.errors import DataError, ModelError
from mowa.io.gguf import GGUFFile, TensorInfo, open_writer, read_gguf
from mowa.kernels.quant.gguf_blocks import encode
from mowa.models.gguf.state import LazyTensor

CHUNK = 2**23  # weights encoded at a time: 32 MB in float32
READ_BYTES = 2**24

OnProgress = Callable[[float], object]
ImportanceOf = Callable[[str, Sequence[int]], Tensor | None]


def no_importance(name: str, shape: Sequence[int]) -> Tensor | None:
    """Return no importance for any tensor."""


@dataclass(frozen=True, slots=True)
class Target:
    """A file to write.

    path      it must not exist in part: it is moved into place when it is complete
    scheme    name of the mix
    metadata  of the file
    types     name of each tensor → how it is stored
    """

    path: Path
    scheme: str
    metadata: Mapping[str, Any]
    types: Mapping[str, str]

    def infos(self, tensors: Mapping[str, LazyTensor]) -> dict[str, TensorInfo]:
        """Return shape and type of each tensor."""
        return {name: TensorInfo(tensor.shape, self.types[name]) for name, tensor in tensors.items()}


def write_targets(
    tensors: Mapping[str, LazyTensor],
    targets: Sequence[Target],
    *,
    importance: ImportanceOf = no_importance,
    on_progress: OnProgress = lambda fraction: None,
) -> list[dict[str, str]]:
    """Write all targets, and return the digest of each tensor's bytes for each of them.

    Args:
        tensors: name in GGUF → weights, in the order of the files; of any float dtype.
        importance: name and shape of a tensor → mean squares of its inputs, float32 [K], or [E, K] of experts.
        on_progress: called with the fraction of the weights that is written.

    Raises:
        ModelError: a weight is NaN or infinite, or does not fit its type; the message names the tensor.
        DataError: the disk has too little space, which is checked before anything is written.
    """
    _require_space(tensors, targets)
    total = sum(math.prod(tensor.shape) for tensor in tensors.values()) * len(targets) or 1
    digests: list[dict[str, str]] = [{} for _ in targets]
    done = 0
    with ExitStack() as stack:
        writers = [stack.enter_context(open_writer(one.path, one.metadata, one.infos(tensors))) for one in targets]
        for name, tensor in tensors.items():
            weights, weighting = _load(name, tensor), importance(name, tensor.shape)
            for target, writer, digest in zip(targets, writers, digests, strict=True):
                type_name, hashed = target.types[name], hashlib.sha256()
                for rows, columns in _chunks(weights, weighting):
                    blocks = _encode(name, rows, type_name, columns)
                    hashed.update(blocks.numpy().data)
                    writer.write(name, blocks.numpy())
                    done += rows.numel()
                    on_progress(done / total)
                digest[name] = hashed.hexdigest()
    return digests


def verify_digests(path: Path, digests: Mapping[str, str]) -> GGUFFile:
    """Read a file back and return its header. Raises ModelError if a tensor does not have the bytes that were written.

    It is read without the memory map, whose pages would count as memory.
    """
    file = read_gguf(path)
    if list(file.tensors) != list(digests):
        raise ModelError(f"{path.name} does not have the tensors that were written: check the disk")
    with path.open("rb") as opened:
        for name, info in file.tensors.items():
            hashed, remaining = hashlib.sha256(), info.nbytes
            opened.seek(file.data_offset + info.offset)
            while content := opened.read(min(remaining, READ_BYTES)):
                hashed.update(content)
                remaining -= len(content)
            if hashed.hexdigest() != digests[name]:
                raise ModelError(f"{name} in {path.name} does not read back as it was written: check the disk")
    return file


def file_bytes(tensors: Mapping[str, LazyTensor], target: Target) -> int:
    """Return the size of the tensors of a file."""
    return sum(info.nbytes for info in target.infos(tensors).values())


def _require_space(tensors: Mapping[str, LazyTensor], targets: Sequence[Target]) -> None:
    if not targets:
        return
    folder = targets[0].path.parent
    need, free = sum(file_bytes(tensors, one) for one in targets), shutil.disk_usage(folder).free
    if need > free:
        raise DataError(
            f"{folder} has {free / 1e9:.2f} GB of free space, and the files need {need / 1e9:.2f} GB: free some space,"
            " or choose another folder. Nothing was written"
        )


def _load(name: str, tensor: LazyTensor) -> Tensor:
    weights = tensor.load().detach().cpu()
    if tuple(weights.shape) != tensor.shape:
        raise ModelError(
            f"{name} has shape {list(weights.shape)}, expected {list(tensor.shape)}: export the model again"
        )
    return weights


def _chunks(weights: Tensor, importance: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield rows [R, K], about `CHUNK` weights each, with the importance of their columns; experts do not share one."""
    if weights.ndim < 2:
        yield weights.reshape(1, -1), importance
        return
    columns = weights.shape[-1]
    step = max(1, -(-CHUNK // columns))
    shared = importance is None or importance.ndim == 1
    parts = [weights.reshape(-1, columns)] if shared else list(weights.reshape(len(weights), -1, columns))
    for index, rows in enumerate(parts):
        weighting = importance if importance is None or shared else importance[index]
        for start in range(0, len(rows), step):
            yield rows[start : start + step], weighting


def _encode(name: str, rows: Tensor, type_name: str, importance: Tensor | None) -> Tensor:
    try:
        return encode(rows, type_name, importance, threads=torch.get_num_threads())
    except (ModelError, DataError) as error:
        raise type(error)(f"{name}: {error}") from error
