"""Read GGUF files through a memory map, and reject damaged and hostile ones before anything large is allocated."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from mowa.errors import DataError
from mowa.io.gguf.types import (
    ALIGNMENT_KEY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMENSIONS,
    MAX_KEY_BYTES,
    MAX_NAME_BYTES,
    NUMBER_TYPES,
    TENSOR_TYPES,
    VALUE_TYPES,
    VERSIONS,
    TensorInfo,
    misfit,
)

MAX_NESTING = 4  # of arrays in arrays
MAX_PROBLEM_CHARS = 300
_MIN_PAIR_BYTES = 8 + 1 + 4 + 1  # length, key, type, value
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 4 + 8  # length, name, dimensions, type, offset
_unpack_length = struct.Struct("<Q").unpack_from
_TYPE_NAMES = {tensor_type.id: name for name, tensor_type in TENSOR_TYPES.items()}


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """A GGUF file: its header in memory, its tensors in a memory map.

    metadata     key → value: bool, int, float, str, a list of str, an array of numbers, or a list of arrays
    value_types  key → type of its value, such as `uint32` or `array[string]`; `open_writer` takes it
    tensors      name → shape, type and offset, in the order of the file
    """

    path: Path
    version: int
    alignment: int
    metadata: Mapping[str, Any]
    value_types: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    data_offset: int
    _bytes: Any = field(repr=False)

    def blocks(self, name: str) -> np.ndarray:
        """Return the stored bytes of a tensor, uint8 [*shape[:-1], bytes of a row], as a read-only view of the file.

        Raises DataError if there is no such tensor.
        """
        if name not in self.tensors:
            raise DataError(f"{self.path} has no tensor {name!r}: it has {len(self.tensors)} others")
        info = self.tensors[name]
        flat = np.frombuffer(self._bytes, np.uint8, info.nbytes, self.data_offset + info.offset)
        return flat.reshape(*info.shape[:-1], info.row_bytes)


def read_gguf(path: str | Path) -> GGUFFile:
    """Read the header of a GGUF file, version 2 or 3; tensors stay on disk.

    Every count and length is compared with the size of the file before it is used, so memory is proportional to the
    header whatever the file says.

    Raises DataError if the file is missing, truncated, damaged, big-endian, or of a newer version.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    cursor = _Cursor(path, content, size)
    version = _read_version(cursor)
    num_tensors, num_pairs = cursor.number("<Q", "the number of tensors"), cursor.number("<Q", "the number of keys")
    cursor.require(num_pairs, _MIN_PAIR_BYTES, "metadata keys")
    metadata, value_types = _read_metadata(cursor, num_pairs)
    alignment = _read_alignment(cursor, metadata, value_types)
    cursor.require(num_tensors, _MIN_TENSOR_BYTES, "tensors")
    tensors = _read_tensor_infos(cursor, num_tensors)
    data_offset = -(-cursor.offset // alignment) * alignment
    _validate_layout(cursor, tensors, alignment, size - data_offset)
    return GGUFFile(path, version, alignment, metadata, value_types, tensors, data_offset, content)


class _Cursor:
    """A position in the file. All reads are checked against its size."""

    def __init__(self, path: Path, content: Any, size: int) -> None:
        self.path, self.content, self.size, self.offset = path, content, size, 0

    def fail(self, problem: str) -> NoReturn:
        """Raise DataError; keys and names of a hostile file may be long."""
        raise DataError(f"{self.path} is not a valid GGUF file: {problem:.{MAX_PROBLEM_CHARS}}")

    def take(self, count: int, what: str) -> bytes:
        """Read `count` bytes."""
        if count > self.size - self.offset:
            self.fail(f"{what} needs {count} bytes at byte {self.offset}, and the file ends at {self.size}")
        start, self.offset = self.offset, self.offset + count
        found: bytes = self.content[start : self.offset]
        return found

    def number(self, layout: str, what: str) -> Any:
        """Read one number of a `struct` layout."""
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]

    def require(self, count: int, min_bytes: int, what: str) -> None:
        """Raise DataError if `count` items of at least `min_bytes` do not fit into the rest of the file."""
        if count * min_bytes > self.size - self.offset:
            self.fail(f"{count} {what} at byte {self.offset} do not fit into the file's {self.size} bytes")

    def texts(self, count: int, what: str) -> list[str]:
        """Read strings: each is its length, uint64, and UTF-8."""
        content, size, offset, found = self.content, self.size, self.offset, []
        for index in range(count):  # a vocabulary has hundreds of thousands
            if offset + 8 > size:
                self.fail(f"{what} is cut off at string {index} of {count}: the file ends at {size}")
            start = offset + 8
            offset = start + _unpack_length(content, offset)[0]
            if offset > size:
                self.fail(f"{what} needs {offset - start} bytes at byte {start}, and the file ends at {size}")
            try:
                found.append(content[start:offset].decode())
            except UnicodeDecodeError as error:
                self.fail(f"{what} is not UTF-8 at byte {start + error.start}")
        self.offset = offset
        return found

    def name(self, max_bytes: int, what: str) -> str:
        """Read a string of 1 to `max_bytes` bytes."""
        start = self.offset
        text = self.texts(1, what)[0]
        if not 0 < self.offset - start - 8 <= max_bytes:
            self.fail(f"{what} has {self.offset - start - 8} bytes, and 1 to {max_bytes} are possible")
        return text


def _read_version(cursor: _Cursor) -> int:
    if cursor.take(4, "the magic number") != MAGIC:
        raise DataError(f"{cursor.path} is not a GGUF file: it does not begin with {MAGIC.decode()}")
    version: int = cursor.number("<I", "the version")
    if version and version & 0xFFFF == 0:
        raise DataError(f"{cursor.path} is a big-endian GGUF file: only little-endian files can be read")
    if version > VERSIONS[-1]:
        raise DataError(
            f"{cursor.path} is GGUF version {version}, and mowa reads up to version {VERSIONS[-1]}: update mowa"
        )
    if version not in VERSIONS:
        raise DataError(f"{cursor.path} is GGUF version {version}, which is obsolete: convert the model again")
    return version


def _read_metadata(cursor: _Cursor, count: int) -> tuple[dict[str, Any], dict[str, str]]:
    metadata: dict[str, Any] = {}
    value_types: dict[str, str] = {}
    for index in range(count):
        key = cursor.name(MAX_KEY_BYTES, f"metadata key {index}")
        if key in metadata:
            cursor.fail(f"the metadata key {key!r} is there twice")
        metadata[key], value_types[key] = _read_value(cursor, _read_value_type(cursor, key), key)
    return metadata, value_types


def _read_value_type(cursor: _Cursor, key: str) -> str:
    found = cursor.number("<I", f"the type of {key!r}")
    if found >= len(VALUE_TYPES):
        cursor.fail(f"{key!r} has the unknown value type {found} at byte {cursor.offset - 4}")
    return VALUE_TYPES[found]


def _read_value(cursor: _Cursor, value_type: str, key: str, depth: int = 0) -> tuple[Any, str]:
    """Return a value and its type."""
    if value_type == "string":
        return cursor.texts(1, f"the value of {key!r}")[0], value_type
    if value_type != "array":
        values = _read_numbers(cursor, value_type, 1, key)
        return values[0].item(), value_type
    if depth == MAX_NESTING:
        cursor.fail(f"{key!r} has arrays in arrays, more than {MAX_NESTING} deep")
    element, length = _read_value_type(cursor, key), cursor.number("<Q", f"the length of {key!r}")
    if element in NUMBER_TYPES:
        return _read_numbers(cursor, element, length, key), f"array[{element}]"
    cursor.require(length, 8 if element == "string" else 12, f"elements of {key!r}")
    if element == "string":
        return cursor.texts(length, f"the value of {key!r}"), "array[string]"
    inner = [_read_value(cursor, "array", key, depth + 1) for _ in range(length)]
    inner_types = {inner_type for _, inner_type in inner} or {"array[uint8]"}
    if len(inner_types) > 1:
        cursor.fail(f"{key!r} is an array of arrays of different types: {', '.join(sorted(inner_types))}")
    return [value for value, _ in inner], f"array[{inner_types.pop()}]"


def _read_numbers(cursor: _Cursor, value_type: str, count: int, key: str) -> np.ndarray:
    """Return numbers or bools, [count], in memory."""
    dtype = NUMBER_TYPES[value_type]
    raw = cursor.take(count * dtype.itemsize, f"the value of {key!r}")
    if value_type == "bool" and raw.translate(None, b"\0\1"):
        cursor.fail(f"{key!r} is a bool that is neither 0 nor 1, before byte {cursor.offset}")
    return np.frombuffer(raw, dtype)


def _read_alignment(cursor: _Cursor, metadata: Mapping[str, Any], value_types: Mapping[str, str]) -> int:
    if ALIGNMENT_KEY not in metadata:
        return DEFAULT_ALIGNMENT
    alignment = metadata[ALIGNMENT_KEY]
    if value_types[ALIGNMENT_KEY] != "uint32" or alignment == 0 or alignment & (alignment - 1):
        cursor.fail(f"{ALIGNMENT_KEY} is {alignment!r:.40} ({value_types[ALIGNMENT_KEY]}), and must be a power of two")
    return int(alignment)


def _read_tensor_infos(cursor: _Cursor, count: int) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for index in range(count):
        name = cursor.name(MAX_NAME_BYTES, f"the name of tensor {index}")
        if name in tensors:
            cursor.fail(f"the tensor {name!r} is there twice")
        num_dimensions = cursor.number("<I", f"the dimensions of {name!r}")
        if num_dimensions > MAX_DIMENSIONS:
            cursor.fail(f"{name!r} has {num_dimensions} dimensions, and at most {MAX_DIMENSIONS} are possible")
        shape = struct.unpack(f"<{num_dimensions}Q", cursor.take(8 * num_dimensions, f"the shape of {name!r}"))
        type_id = cursor.number("<I", f"the type of {name!r}")
        offset = cursor.number("<Q", f"the offset of {name!r}")
        if type_id not in _TYPE_NAMES:
            cursor.fail(f"{name!r} has the unknown tensor type {type_id}")
        tensors[name] = TensorInfo(shape[::-1], _TYPE_NAMES[type_id], offset)
    return tensors


def _validate_layout(cursor: _Cursor, tensors: Mapping[str, TensorInfo], alignment: int, available: int) -> None:
    """Check that tensors have whole blocks, lie within the `available` bytes of data, and do not overlap."""
    for name, info in tensors.items():
        if problem := misfit(info):
            cursor.fail(f"{name!r} {problem}")
        if info.offset % alignment:
            cursor.fail(f"{name!r} is at offset {info.offset}, which is not a multiple of the alignment {alignment}")
        if info.offset + info.nbytes > available:
            cursor.fail(
                f"{name!r} needs {info.nbytes} bytes at offset {info.offset}, and {max(available, 0)} bytes of data"
                " are there: the file is truncated"
            )
    end, last = 0, ""
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset < end:
            cursor.fail(f"{name!r} at offset {info.offset} overlaps {last!r}, which ends at {end}")
        end, last = info.offset + info.nbytes, name
