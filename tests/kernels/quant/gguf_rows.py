"""Rows that are hard to quantize, made without a random generator, and other encoders to compare with."""

import ctypes
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from mowa.kernels.quant.gguf_blocks import BLOCK_TYPES

COLUMNS = 512
QUANTIZED = [name for name, one in BLOCK_TYPES.items() if one.block_size > 1]


def noise(count, seed=0, terms=4):
    """Return `count` numbers in -2 … 2, nearly normal: sums of hashed counters, the same on every machine."""
    counters = np.arange(count * terms, dtype=np.uint64) + np.uint64(seed * 1_000_003)
    for factor in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9):
        counters = (counters ^ counters >> np.uint64(29)) * np.uint64(factor)
    uniform = (counters >> np.uint64(40)).astype(np.float32) / np.float32(2**24) - np.float32(0.5)
    return uniform.reshape(terms, count).sum(0, dtype=np.float32)


def adversarial_rows():
    """Name → float32 [COLUMNS]."""
    i = np.arange(COLUMNS)
    x, y = noise(COLUMNS), noise(COLUMNS, 1, 1)
    rows = {
        "normal": x,
        "small": x / 50,
        "heavy-tailed": x * x * x * x * x,
        "offset": x / 1000 + 5,
        "positive": np.abs(x),
        "negative": -np.abs(x),
        "sparse": np.where(y > 0.4, x, 0),
        "sparse, zeros negative": np.where(y > 0, np.abs(x), -0.0),
        "zeros": 0 * x,
        "negative zeros": np.full(COLUMNS, -0.0),
        "zeros of both signs": np.where(y > 0, 0.0, -0.0),
        "equal": np.full(COLUMNS, 0.3),
        "equal, negative": np.full(COLUMNS, -0.3),
        "one weight": np.where(i % 256 == 7, 1.5, 0),
        "outliers": np.where(i % 256 == 5, -70, x / 100),
        "alternating": np.where(i % 2, 0.7, -0.7),
        "alternating, peaks of both signs": np.where(i % 16 < 2, np.where(i % 2, 1, -1), x / 4),
        "ramp": i / 255.5 - 1,
        "integers": i % 37 - 18,
        "halves": (i * 7 % 61 - 30) / 4,
        "ties": (i * 11 % 31 - 15 + 0.5) / 127,
        "powers of two": np.where(y > 0, 1, -1) * np.ldexp(1.0, i % 23 - 18),
        "below powers of two": np.nextafter(np.ldexp(np.float32(1), i % 23 - 18), np.float32(0)),
        "bfloat16": torch.from_numpy(x).bfloat16().float().numpy(),
        "scales apart": x * np.array([float(f"1e{e}") for e in range(-9, 4)])[i // 16 % 13],
        "denormals": (i * 13 % 199 - 99) * 1e-45,
        "nearly denormal": x * 1e-37,
        "thousands": x * 1e4,
        "1e20": x * 1e20,
        "1e30": x * 1e30,
    }
    tiny = {f"1e-{e}": x * float(f"1e-{e}") for e in (5, 6, 7, 8, 10, 12, 14, 15, 16, 20)}
    return {name: row.astype(np.float32) for name, row in (rows | tiny).items()}


def importance():
    """Mean squares of inputs: some columns count a thousand times more than others, and some do not count."""
    y = noise(COLUMNS, 2, 1) + np.float32(0.5)
    return np.where(y < 0.1, 0, y * y * y * y * y + np.float32(0.001)).astype(np.float32)


def digest(blocks):
    return hashlib.sha256(np.ascontiguousarray(blocks)).hexdigest()


class Ggml:
    """ggml's own quantizer, from the shared library in the package libggml-python."""

    def __init__(self):
        libggml = pytest.importorskip("libggml")
        folder = Path(libggml.__file__).parent
        self.library = ctypes.CDLL(str(next(folder.glob("lib*/libggml-base.so"))))
        self.library.ggml_quantize_chunk.restype = ctypes.c_size_t
        self.library.ggml_quantize_chunk.argtypes = [
            *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
            *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
        ]

    def encode(self, rows, type_name, weights=None):
        """Return uint8 [R, bytes] for float32 [R, K] and importance [K] or None."""
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        blocks = np.zeros((len(rows), BLOCK_TYPES[type_name].row_bytes(rows.shape[1])), np.uint8)
        address = None if weights is None else weights.ctypes.data
        size = self.library.ggml_quantize_chunk(
            BLOCK_TYPES[type_name].type_id, rows.ctypes.data, blocks.ctypes.data, 0, *rows.shape, address
        )
        assert size == blocks.size
        return blocks
