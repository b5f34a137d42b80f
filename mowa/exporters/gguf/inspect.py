"""What is in a GGUF file, and how two of them differ, as values: `summarize` and `compare`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mowa.io.gguf import GGUFFile, TensorInfo, read_gguf
from mowa.kernels.quant.gguf_blocks import BLOCK_TYPES, decode

CHUNK_WEIGHTS = 1 << 22  # dequantized at a time
MAX_ELEMENTS = 6  # of an array that is shown
MAX_CHARS = 100  # of a text that is shown


@dataclass(frozen=True, slots=True)
class TypeCount:
    """Tensors of one type in a file."""

    tensors: int
    weights: int
    bytes: int


@dataclass(frozen=True, slots=True)
class GGUFSummary:
    """What is in a GGUF file.

    architecture     of `general.architecture`; empty if the file does not say
    size_bytes       of the whole file
    tensor_bytes     of its tensors, without padding
    bits_per_weight  8 · tensor_bytes / num_weights; 0 without tensors
    types            type of tensors → how many there are, the largest first
    metadata         key → value
    value_types      key → type of its value
    tensors          name → shape in torch's order, type and offset, in the order of the file
    """

    path: Path
    version: int
    architecture: str
    size_bytes: int
    tensor_bytes: int
    num_weights: int
    bits_per_weight: float
    types: Mapping[str, TypeCount]
    metadata: Mapping[str, Any]
    value_types: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class MetadataDifference:
    """A key whose value differs, or that one of the files lacks: its value there is None."""

    key: str
    first: Any
    second: Any


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """A tensor that differs, or that one of the files lacks: its shape and type there are None.

    `relative_rmse` is the root mean square of the difference of dequantized weights, divided by that of the first
    file's; None if shapes differ, a tensor is missing, or its type cannot be dequantized.
    """

    name: str
    first: TensorInfo | None
    second: TensorInfo | None
    relative_rmse: float | None = None


@dataclass(frozen=True, slots=True)
class GGUFDifference:
    """How two files differ. `num_equal` tensors have the same type, shape and bytes in both."""

    metadata: tuple[MetadataDifference, ...]
    tensors: tuple[TensorDifference, ...]
    num_equal: int

    @property
    def is_empty(self) -> bool:
        """Whether metadata and tensors are the same."""
        return not self.metadata and not self.tensors


def summarize(path: str | Path) -> GGUFSummary:
    """Read the header of a GGUF file. Raises DataError as `read_gguf`."""
    file = read_gguf(path)
    types: dict[str, TypeCount] = {}
    for info in file.tensors.values():
        found = types.get(info.type_name, TypeCount(0, 0, 0))
        types[info.type_name] = TypeCount(
            found.tensors + 1, found.weights + info.num_weights, found.bytes + info.nbytes
        )
    weights, size = (sum(getattr(one, name) for one in types.values()) for name in ("weights", "bytes"))
    return GGUFSummary(
        path=file.path,
        version=file.version,
        architecture=str(file.metadata.get("general.architecture", "")),
        size_bytes=file.path.stat().st_size,
        tensor_bytes=size,
        num_weights=weights,
        bits_per_weight=8 * size / weights if weights else 0.0,
        types=dict(sorted(types.items(), key=lambda item: -item[1].bytes)),
        metadata=file.metadata,
        value_types=file.value_types,
        tensors=file.tensors,
    )


def compare(first: str | Path, second: str | Path) -> GGUFDifference:
    """Compare metadata and tensors of two GGUF files; the order of keys and tensors, and padding, may differ.

    Bytes are compared where types and shapes are the same, and dequantized weights where the bytes differ; a few
    million weights are in memory at a time.

    Raises DataError as `read_gguf`.
    """
    one, other = read_gguf(first), read_gguf(second)
    metadata = [
        MetadataDifference(key, one.metadata.get(key), other.metadata.get(key))
        for key in {**one.metadata, **other.metadata}
        if one.value_types.get(key) != other.value_types.get(key)
        or not _is_same(one.metadata[key], other.metadata[key])
    ]
    names = {**one.tensors, **other.tensors}
    tensors = [found for name in names if (found := _compare_tensor(one, other, name)) is not None]
    return GGUFDifference(tuple(metadata), tuple(tensors), len(names) - len(tensors))


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return one.tobytes() == other.tobytes()
    if isinstance(one, list) and one and not isinstance(one[0], str):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return bool(one == other or (one != one and other != other))


def _compare_tensor(one: GGUFFile, other: GGUFFile, name: str) -> TensorDifference | None:
    before, after = one.tensors.get(name), other.tensors.get(name)
    if before is None or after is None or before.shape != after.shape:
        return TensorDifference(name, before, after)
    if before.type_name == after.type_name and np.array_equal(one.blocks(name), other.blocks(name)):
        return None
    if {before.type_name, after.type_name} - set(BLOCK_TYPES):
        return TensorDifference(name, before, after)
    error = total = 0.0
    for ours, theirs in zip(_weights(one, name), _weights(other, name), strict=True):
        error += (ours - theirs).square().sum().item()
        total += ours.square().sum().item()
    rmse = (error / total) ** 0.5 if total else (float("inf") if error else 0.0)
    return TensorDifference(name, before, after, rmse)


def _weights(file: GGUFFile, name: str) -> Iterator[Tensor]:
    """Yield the dequantized weights of a tensor, float64 [rows, row], in chunks that do not depend on its type."""
    info = file.tensors[name]
    blocks = file.blocks(name).reshape(-1, info.row_bytes)
    step = max(1, CHUNK_WEIGHTS // (info.shape[-1] if info.shape else 1))
    for start in range(0, len(blocks), step):
        yield decode(torch.from_numpy(blocks[start : start + step].copy()), info.type_name).double()


def shorten(value: Any) -> str:
    """Return a metadata value in one line, with the beginning and length of long texts and arrays."""
    if isinstance(value, str):
        text = repr(value)[1:-1]
        return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]}… ({len(value):,} characters)"
    if not isinstance(value, list | np.ndarray):
        return str(value)
    shown = ", ".join(
        shorten(one) if isinstance(one, list | np.ndarray) else _element(one) for one in value[:MAX_ELEMENTS]
    )
    return f"[{shown}]" if len(value) <= MAX_ELEMENTS else f"[{shown}, … ({len(value):,} values)]"


def _element(value: Any) -> str:
    return repr(value[:MAX_CHARS]) if isinstance(value, str) else str(value)


def to_json(value: Any) -> Any:
    """Return a metadata value for JSON; long arrays become their length and beginning."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    if not isinstance(value, list | np.ndarray):
        return value
    first = [to_json(one) for one in value[:MAX_ELEMENTS]]
    return first if len(value) <= MAX_ELEMENTS else {"length": len(value), "first": first}
