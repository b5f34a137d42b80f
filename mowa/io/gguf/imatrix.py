"""Read and write importance matrices of llama.cpp: how large the inputs of each weight column are on calibration text.

    importance of column j = Σ x_j² / n    over the n tokens that the tensor was applied to

There are two formats, and both are read. In GGUF, sums are `NAME.in_sum2` and tokens `NAME.counts`, one per expert; the
older `.dat` has means times the number of chunks, and no counts of experts. Experts that no token chose have importance
1 in every column, as in llama.cpp's quantizer, so that their weights are rounded as without a matrix; never 0 / 0.

Source: tools/imatrix, tools/quantize and common/imatrix-loader of llama.cpp (MIT).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from mowa.errors import DataError
from mowa.io.gguf.reader import GGUFFile, read_gguf
from mowa.io.gguf.types import MAGIC, TensorInfo
from mowa.io.gguf.writer import open_writer

SUMS, COUNTS = ".in_sum2", ".counts"  # after the name of the tensor
DATASETS, CHUNKS, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_MIN_ENTRY_BYTES = 4 + 1 + 4 + 4 + 4  # of the older format: length, name, chunks, values, one value


@dataclass(frozen=True, slots=True, eq=False)
class ImportanceMatrix:
    """Mean squares of the inputs of weight columns.

    values      tensor name in GGUF → float32 [K], or [E, K] of stacked experts or heads. What was read may have a
                stack flattened to [E · K]; `importance_for` shapes it
    counts      tensor name → tokens, int64 [] or [E]. Of the older format: chunks
    datasets    names of the calibration texts
    chunks      number of chunks that the model was run on
    chunk_size  tokens per chunk; 0: unknown, as in the older format
    """

    values: Mapping[str, Tensor]
    counts: Mapping[str, Tensor]
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int


def mean_squares(sums: Tensor, counts: Tensor) -> Tensor:
    """Return sums / counts, float32 [..., K], rounded as by llama.cpp; 1 where the count is 0.

    Args:
        sums: Σ x², float [..., K].
        counts: tokens, int64 [...].
    """
    tokens = counts.float()[..., None]
    return torch.where(tokens > 0, sums.float() / tokens.clamp(min=1), 1.0)


def importance_for(matrix: ImportanceMatrix, name: str, shape: Sequence[int]) -> Tensor | None:
    """Return the importance of the columns of a tensor, float32 [K], or [E, K] for stacks; None if it has none.

    Args:
        matrix: as read or collected.
        name: of the tensor in GGUF.
        shape: of its weights, (N, K) or (E, N, K).

    Raises DataError if the matrix has another number of values, as one of another model has.
    """
    values = matrix.values.get(name)
    if values is None:
        return None
    leading, columns = tuple(shape[:-2]), shape[-1]
    expected = math.prod(leading) * columns
    if values.numel() != expected:
        raise DataError(
            f"the importance matrix has {values.numel()} values for {name}, whose weights {list(shape)} have {expected}"
            " columns: it was made for another model"
        )
    return values.reshape(*leading, columns)


def missing(matrix: ImportanceMatrix, names: Iterable[str]) -> list[str]:
    """Return those of the tensor names that the matrix does not have, in order."""
    return [name for name in names if name not in matrix.values]


def write_imatrix(path: str | Path, matrix: ImportanceMatrix) -> None:
    """Write the GGUF format, atomically; read back, the values are the same, to the bit if they were read or collected.

    Raises DataError if a name is too long for GGUF.
    """
    sums = {name: _sums(values, matrix.counts[name]) for name, values in sorted(matrix.values.items())}
    tensors: dict[str, TensorInfo] = {}
    for name, total in sums.items():
        counts = matrix.counts[name]
        tensors[name + SUMS] = TensorInfo(tuple(total.shape), "f32")
        tensors[name + COUNTS] = TensorInfo((*counts.shape, 1), "f32")
    metadata: dict[str, Any] = {
        "general.type": "imatrix",
        DATASETS: list(matrix.datasets),
        CHUNKS: np.uint32(matrix.chunks),
        CHUNK_SIZE: np.uint32(matrix.chunk_size),
    }
    with open_writer(path, metadata, tensors) as writer:
        for name, total in sums.items():
            writer.write(name + SUMS, total.numpy())
            writer.write(name + COUNTS, matrix.counts[name].float().numpy())


def _sums(values: Tensor, counts: Tensor) -> Tensor:
    """Return sums, float32 [..., K], that `mean_squares` turns into these values, if there are any."""
    tokens = counts.cpu().float()[..., None]
    values = values.cpu().float()
    best = values * tokens
    for other in (torch.nextafter(best, best.new_tensor(math.inf)), torch.nextafter(best, best.new_tensor(-math.inf))):
        nearer = (other / tokens - values).abs() < (best / tokens - values).abs()  # False where tokens are 0
        best = torch.where(nearer, other, best)
    return best.contiguous()


def read_imatrix(path: str | Path) -> ImportanceMatrix:
    """Read an importance matrix, GGUF or the older `.dat`. Memory is proportional to the size of the file.

    Raises DataError if the file is missing, damaged or not an importance matrix.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            magic = file.read(len(MAGIC))
            content = b"" if magic == MAGIC else magic + file.read()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    return _from_gguf(read_gguf(path)) if magic == MAGIC else _from_dat(path, content)


def _from_gguf(file: GGUFFile) -> ImportanceMatrix:
    names = [name.removesuffix(SUMS) for name in file.tensors if name.endswith(SUMS)]
    if (kind := file.metadata.get("general.type", "imatrix")) != "imatrix":
        raise DataError(f"{file.path} is a GGUF file of type {kind!r:.40}, and must be an importance matrix")
    if not names:
        _fail(file.path, f"it has no tensors called NAME{SUMS}")
    datasets = file.metadata.get(DATASETS, [])
    chunks, chunk_size = file.metadata.get(CHUNKS), file.metadata.get(CHUNK_SIZE)
    if {file.value_types.get(key) for key in (CHUNKS, CHUNK_SIZE)} != {"uint32"} or not _are_texts(datasets):
        _fail(file.path, f"it needs {DATASETS}, an array of strings, and {CHUNKS} and {CHUNK_SIZE}, both uint32")
    values, counts = {}, {}
    for name in names:
        sums, tokens = _floats(file, name + SUMS), _floats(file, name + COUNTS)
        if sums.numel() % tokens.numel():
            _fail(file.path, f"{name} has {sums.numel()} sums for {tokens.numel()} counts")
        if int(tokens.max()) > 2**62:
            _fail(file.path, f"{name} has a count of {float(tokens.max()):.3g}")
        counts[name] = tokens.round().long().reshape(() if tokens.numel() == 1 else -1)
        values[name] = mean_squares(sums.reshape(*counts[name].shape, -1), counts[name])
    return ImportanceMatrix(values, counts, tuple(datasets), int(chunks or 0), int(chunk_size or 0))


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _floats(file: GGUFFile, name: str) -> Tensor:
    """Return a tensor of finite numbers that are not negative, float32 [n]."""
    if name not in file.tensors or file.tensors[name].type_name != "f32":
        _fail(file.path, f"it needs a float32 tensor {name}")
    return _validated(file.path, name, file.blocks(name).reshape(-1))


def _validated(path: Path, name: str, raw: np.ndarray | bytes) -> Tensor:
    found = torch.from_numpy(np.frombuffer(raw, "<f4").astype(np.float32))
    if not bool(((found >= 0) & found.isfinite()).all()):
        _fail(path, f"{name} has a value that is negative or not finite")
    return found


def _fail(path: Path, problem: str) -> NoReturn:
    raise DataError(f"{path} is not a valid importance matrix: {problem:.300}")


class _Cursor:
    """A position in a file of the older format, little-endian. All reads are checked against its size."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path, self.content, self.offset = path, content, 0

    @property
    def left(self) -> int:
        return len(self.content) - self.offset

    def take(self, count: int, what: str) -> bytes:
        """Read `count` bytes."""
        if not 0 <= count <= self.left:
            _fail(self.path, f"{what} needs {count} bytes at byte {self.offset}, and {self.left} are left")
        self.offset += count
        return self.content[self.offset - count : self.offset]

    def number(self, what: str) -> int:
        """Read an int32."""
        return int(struct.unpack("<i", self.take(4, what))[0])

    def text(self, what: str) -> str:
        """Read a length, int32, and UTF-8; invalid bytes are replaced."""
        return self.take(self.number(f"the length of {what}"), what).decode(errors="replace")


def _from_dat(path: Path, content: bytes) -> ImportanceMatrix:
    cursor = _Cursor(path, content)
    num_entries = cursor.number("the number of tensors")
    if not 0 < num_entries * _MIN_ENTRY_BYTES <= cursor.left:
        _fail(path, f"it neither begins with {MAGIC.decode()} nor has room for {num_entries} tensors")
    values: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for index in range(num_entries):
        name = cursor.text(f"the name of tensor {index}")
        chunks, size = cursor.number(f"the chunks of {name!r}"), cursor.number(f"the size of {name!r}")
        if not name or name in values or chunks < 0 or size < 1:
            _fail(path, f"tensor {index} is called {name!r} and has {size} values from {chunks} chunks")
        counts[name] = torch.tensor(max(chunks, 1))
        values[name] = _validated(path, name, cursor.take(4 * size, f"the values of {name!r}")) / counts[name]
    chunks = cursor.number("the number of chunks") if cursor.left else 0  # older versions end before it
    dataset = cursor.text("the name of the text") if cursor.left else ""
    return ImportanceMatrix(values, counts, (dataset,) if dataset else (), max(chunks, 0), 0)
