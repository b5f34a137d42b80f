"""Write GGUF files, version 3: the header first, then tensors, in pieces and in any order."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mowa.errors import DataError
from mowa.io.atomic import replace_atomically
from mowa.io.gguf.types import (
    ALIGNMENT_KEY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_KEY_BYTES,
    MAX_NAME_BYTES,
    NUMBER_TYPES,
    TENSOR_TYPES,
    VALUE_TYPES,
    VERSIONS,
    TensorInfo,
    misfit,
)


class GGUFWriter:
    """The tensors of a file whose header is written; see `open_writer`."""

    def __init__(self, file: BinaryIO, tensors: Mapping[str, TensorInfo]) -> None:
        """Write at the position of `file`, which is the start of the data."""
        self.tensors = tensors
        self._file = file
        self._data_offset = file.tell()
        self._written = dict.fromkeys(tensors, 0)

    def write(self, name: str, data: np.ndarray) -> None:
        """Append the bytes of an array to a tensor.

        Raises DataError if the tensor was not announced or would become larger than announced.
        """
        if name not in self.tensors:
            raise DataError(f"the tensor {name!r} is not in the header of {self._file.name}")
        chunk = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        info, start = self.tensors[name], self._written[name]
        if start + len(chunk) > info.nbytes:
            raise DataError(f"{name!r} has {start + len(chunk)} bytes, and its header says {info.nbytes}")
        self._file.seek(self._data_offset + info.offset + start)
        self._file.write(chunk.data)
        self._written[name] += len(chunk)

    def require_complete(self) -> None:
        """Raise DataError if a tensor is incomplete."""
        for name, info in self.tensors.items():
            if self._written[name] != info.nbytes:
                raise DataError(f"{name!r} has {self._written[name]} bytes, and its header says {info.nbytes}")


@contextmanager
def open_writer(
    path: str | Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    *,
    value_types: Mapping[str, str] | None = None,
) -> Iterator[GGUFWriter]:
    """Write a GGUF file: yield a writer for its tensors, and move the file to `path` when all of them are complete.

    Args:
        path: replaced atomically; untouched if the context fails.
        metadata: key → value. `general.alignment` is obeyed.
        tensors: name → shape and type; offsets are assigned in this order.
        value_types: key → type, as in `GGUFFile`; by default bool, string, float32, and for an int the
            first of uint32, int32, uint64 and int64 that holds it; in arrays, int32, int64 or uint64. numpy's numbers
            and arrays keep their type.

    Raises DataError if a key, value, name or shape cannot be stored, or if a tensor stays incomplete.
    """
    alignment = int(metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT))
    if alignment <= 0 or alignment & (alignment - 1):
        raise DataError(f"{ALIGNMENT_KEY} is {alignment}, and must be a power of two")
    placed = _assign_offsets(tensors, alignment)
    header = _pack_header(metadata, value_types or {}, placed)
    data_bytes = max((_pad(info.offset + info.nbytes, alignment) for info in placed.values()), default=0)
    data_offset = _pad(len(header), alignment)
    with replace_atomically(Path(path)) as unfinished, unfinished.open("wb") as file:
        file.write(header + bytes(data_offset - len(header)))
        writer = GGUFWriter(file, placed)
        yield writer
        writer.require_complete()
        file.truncate(data_offset + data_bytes)


def _pad(count: int, alignment: int) -> int:
    return -(-count // alignment) * alignment


def _assign_offsets(tensors: Mapping[str, TensorInfo], alignment: int) -> dict[str, TensorInfo]:
    placed, end = {}, 0
    for name, info in tensors.items():
        if problem := misfit(info):
            raise DataError(f"{name!r} {problem}")
        if not 0 < len(name.encode()) <= MAX_NAME_BYTES:
            raise DataError(f"the tensor name {name!r} has {len(name.encode())} bytes, of at most {MAX_NAME_BYTES}")
        placed[name] = TensorInfo(tuple(info.shape), info.type_name, end)
        end = _pad(end + info.nbytes, alignment)
    return placed


def _pack_header(
    metadata: Mapping[str, Any], value_types: Mapping[str, str], tensors: Mapping[str, TensorInfo]
) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(metadata))]
    for key, value in metadata.items():
        if not 0 < len(key.encode()) <= MAX_KEY_BYTES:
            raise DataError(f"the metadata key {key!r:.60} has {len(key.encode())} bytes, of at most {MAX_KEY_BYTES}")
        try:
            value_type = value_types.get(key) or infer_value_type(value)
            parts += [_pack_string(key), _pack_typed(value, value_type)]
        except (TypeError, ValueError, OverflowError, UnicodeEncodeError, struct.error) as error:
            raise DataError(f"the metadata value of {key!r} cannot be stored: {error}") from None
    for name, info in tensors.items():
        layout = f"<I{len(info.shape)}QIQ"
        type_id = TENSOR_TYPES[info.type_name].id
        parts += [_pack_string(name), struct.pack(layout, len(info.shape), *info.shape[::-1], type_id, info.offset)]
    return b"".join(parts)


def infer_value_type(value: Any) -> str:
    """Return the type that `open_writer` gives to a value. Raises TypeError if none is possible."""
    if isinstance(value, np.ndarray | np.generic):
        name = np.dtype(value.dtype).name
        if name not in NUMBER_TYPES:
            raise TypeError(f"numpy's {name} is not a type of GGUF")
        return f"array[{name}]" if isinstance(value, np.ndarray) else name
    if isinstance(value, bool | str):
        return "bool" if isinstance(value, bool) else "string"
    if isinstance(value, float):
        return "float32"
    if isinstance(value, int):
        return _infer_int(("uint32", "int32", "uint64", "int64"), value, value)
    if isinstance(value, Sequence):
        if {type(element) for element in value} == {int}:
            return f"array[{_infer_int(('int32', 'int64', 'uint64'), min(value), max(value))}]"
        elements = {infer_value_type(element) for element in {type(element): element for element in value}.values()}
        if len(elements) > 1:
            raise TypeError(f"its elements have different types: {', '.join(sorted(elements))}")
        return f"array[{elements.pop() if elements else 'string'}]"
    raise TypeError(f"{type(value).__name__} is not a type of GGUF")


def _infer_int(names: Sequence[str], low: int, high: int) -> str:
    """Return the first type that holds both numbers, or else the last one, which packing rejects."""
    limits = {name: np.iinfo(NUMBER_TYPES[name]) for name in names}
    return next((name for name in names if limits[name].min <= low and high <= limits[name].max), names[-1])


def _pack_string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _type_id(value_type: str) -> bytes:
    return struct.pack("<I", VALUE_TYPES.index(value_type.partition("[")[0]))


def _pack_typed(value: Any, value_type: str) -> bytes:
    return _type_id(value_type) + _pack_value(value, value_type)


def _pack_value(value: Any, value_type: str) -> bytes:
    if value_type == "string":
        return _pack_string(value)
    if value_type in NUMBER_TYPES:
        return _pack_numbers([value], value_type)
    if not value_type.startswith("array[") or not value_type.endswith("]"):
        raise TypeError(f"{value_type!r} is not a type of GGUF")
    element = value_type.removeprefix("array[").removesuffix("]")
    prefix = _type_id(element) + struct.pack("<Q", len(value))
    if element in NUMBER_TYPES:
        return prefix + _pack_numbers(value, element)
    return prefix + b"".join(_pack_value(item, element) for item in value)


def _pack_numbers(values: Any, value_type: str) -> bytes:
    """Pack numbers. Raises ValueError or OverflowError if the type does not hold one of them."""
    dtype = NUMBER_TYPES[value_type]
    given = np.asarray(values)
    with np.errstate(over="ignore", invalid="ignore"):
        packed = given.astype(dtype)
    lost = packed != given if dtype.kind in "iu?" else np.isinf(packed) & ~np.isinf(given)
    if lost.any():
        raise ValueError(f"{value_type} does not hold {given[lost][0]}")
    return packed.tobytes()
