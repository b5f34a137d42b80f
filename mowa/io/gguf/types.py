"""Types of GGUF: metadata values, and tensors, whose rows are stored in blocks of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # 3 differs from 2 only in that it permits big-endian files, which are rejected here
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
MAX_KEY_BYTES = 65_535
MAX_NAME_BYTES = 63  # of a tensor; ggml keeps them in 64 bytes with a NUL
MAX_DIMENSIONS = 4

NUMBER_TYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "uint8": np.dtype("<u1"),
        "int8": np.dtype("<i1"),
        "uint16": np.dtype("<u2"),
        "int16": np.dtype("<i2"),
        "uint32": np.dtype("<u4"),
        "int32": np.dtype("<i4"),
        "float32": np.dtype("<f4"),
        "bool": np.dtype("?"),
        "uint64": np.dtype("<u8"),
        "int64": np.dtype("<i8"),
        "float64": np.dtype("<f8"),
    }
)
VALUE_TYPES = (
    *("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool"),
    *("string", "array", "uint64", "int64", "float64"),
)
"""Types of metadata values; the position is the id in the file."""


@dataclass(frozen=True, slots=True)
class TensorType:
    """How a row of weights is stored: its id in the file, weights per block, and bytes per block."""

    id: int
    block_weights: int
    block_bytes: int


def _types(*rows: tuple[str, int, int, int]) -> Mapping[str, TensorType]:
    return MappingProxyType({name: TensorType(*numbers) for name, *numbers in rows})


TENSOR_TYPES = _types(
    *(("f32", 0, 1, 4), ("f16", 1, 1, 2), ("bf16", 30, 1, 2), ("f64", 28, 1, 8)),
    *(("i8", 24, 1, 1), ("i16", 25, 1, 2), ("i32", 26, 1, 4), ("i64", 27, 1, 8)),
    *(("q4_0", 2, 32, 18), ("q4_1", 3, 32, 20), ("q5_0", 6, 32, 22), ("q5_1", 7, 32, 24)),
    *(("q8_0", 8, 32, 34), ("q8_1", 9, 32, 40), ("q1_0", 41, 128, 18)),
    *(("q2_k", 10, 256, 84), ("q3_k", 11, 256, 110), ("q4_k", 12, 256, 144)),
    *(("q5_k", 13, 256, 176), ("q6_k", 14, 256, 210), ("q8_k", 15, 256, 292)),
    *(("iq1_s", 19, 256, 50), ("iq1_m", 29, 256, 56), ("iq2_xxs", 16, 256, 66), ("iq2_xs", 17, 256, 74)),
    *(("iq2_s", 22, 256, 82), ("iq3_xxs", 18, 256, 98), ("iq3_s", 21, 256, 110)),
    *(("iq4_nl", 20, 32, 18), ("iq4_xs", 23, 256, 136)),
    *(("tq1_0", 34, 256, 54), ("tq2_0", 35, 256, 66), ("mxfp4", 39, 32, 17), ("nvfp4", 40, 64, 36)),
)
"""Name in ggml, in lower case → type. Ids that ggml has withdrawn are missing."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a file: shape in torch's order (rows last), name of its type, and offset in bytes in the data."""

    shape: tuple[int, ...]
    type_name: str
    offset: int = 0

    @property
    def row_bytes(self) -> int:
        """Size in bytes of a row, which is the last dimension."""
        tensor_type = TENSOR_TYPES[self.type_name]
        return (self.shape[-1] if self.shape else 1) // tensor_type.block_weights * tensor_type.block_bytes

    @property
    def num_weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes without padding."""
        return math.prod(self.shape[:-1]) * self.row_bytes


def misfit(info: TensorInfo) -> str:
    """Return why a tensor of this shape cannot be stored in its type; empty if it can."""
    if info.type_name not in TENSOR_TYPES:
        return f"has the unknown type {info.type_name!r}"
    if len(info.shape) > MAX_DIMENSIONS:
        return f"has {len(info.shape)} dimensions, and at most {MAX_DIMENSIONS} are possible"
    if 0 in info.shape:
        return f"has an empty dimension: {list(info.shape)}"
    block = TENSOR_TYPES[info.type_name].block_weights
    row = info.shape[-1] if info.shape else 1
    return f"has rows of {row} weights, and {info.type_name} stores blocks of {block}" if row % block else ""
