"""Importance in llama.cpp: inputs of weights, seen by its callback as by llama-imatrix, and its reader of matrices."""

import ctypes
import importlib.util
from pathlib import Path

import numpy as np

from tests.parity import llama_cpp

F32 = 0
LOAD_IMATRIX = "_Z19common_imatrix_loadRKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEER14common_imatrix"
STRING_BYTES = 32
MULTIPLY, MULTIPLY_BY_EXPERT = b"MUL_MAT", b"MUL_MAT_ID"


class _Tensor(ctypes.Structure):
    """`ggml_tensor` of ggml 0.20."""


_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
]
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.POINTER(_Tensor), ctypes.c_bool, ctypes.c_void_p)


def _array(tensor, dtype):
    """Return the data of a tensor as a view, [ne3, ne2, ne1, ne0]."""
    size = sum((count - 1) * step for count, step in zip(tensor.ne, tensor.nb, strict=True)) + tensor.nb[0]
    raw = np.frombuffer((ctypes.c_ubyte * size).from_address(tensor.data), np.uint8)
    return np.lib.stride_tricks.as_strided(raw.view(dtype), tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1])


def mean_squares(path, ids):
    """Run a model in GGUF on token ids. Returns name → float64 [K] or [E, K], NaN for experts without tokens."""
    lib = llama_cpp.library()
    lib.ggml_op_name.restype = ctypes.c_char_p
    found = {}

    def observe(pointer, ask, _):
        tensor = pointer.contents
        op = lib.ggml_op_name(tensor.op)
        if op not in (MULTIPLY, MULTIPLY_BY_EXPERT):
            return not ask
        weight, x = tensor.src[0].contents, tensor.src[1].contents
        if ask or x.type != F32 or not weight.name.endswith(b".weight"):
            return True
        inputs = _array(x, np.float32).astype(np.float64)
        name = weight.name.decode()
        if op == MULTIPLY_BY_EXPERT:
            chosen = _array(tensor.src[2].contents, np.int32)[0, 0]  # [T, experts per token]
            rows = np.broadcast_to(inputs[0], (*chosen.shape, inputs.shape[-1]))
            with np.errstate(invalid="ignore"):
                parts = [rows[chosen == expert] for expert in range(weight.ne[2])]
                found[name] = np.stack([(part**2).sum(0) / np.float64(len(part)) for part in parts])
        elif weight.ne[2] > 1:
            found[name] = (inputs[0] ** 2).mean(1)  # [heads, T, K]
        else:
            found[name] = (inputs.reshape(-1, inputs.shape[-1]) ** 2).mean(0)
        return True

    callback = _CALLBACK(observe)
    llama_cpp.logits(path, ids, eval_callback=ctypes.cast(callback, ctypes.c_void_p).value)
    return found


def load_imatrix(path):
    """Read an importance matrix by llama.cpp's own reader. Returns (entries, data sets, chunks, tokens per chunk).

    Its structs are those of libstdc++: a string is a pointer and two lengths, a map has an empty header to begin with.
    """
    folder = Path(importlib.util.find_spec(llama_cpp.PACKAGE).origin).parent / "bin"
    load = ctypes.CDLL(str(folder / "libllama-common.so"))[LOAD_IMATRIX]
    load.restype, load.argtypes = ctypes.c_bool, [ctypes.c_void_p, ctypes.c_void_p]
    name = ctypes.create_string_buffer(str(path).encode())
    text = (ctypes.c_uint64 * 4)(ctypes.addressof(name), len(name.value), len(name.value), 0)
    matrix = (ctypes.c_uint64 * 64)()
    matrix[3] = matrix[4] = ctypes.addressof(matrix) + 8
    assert load(ctypes.addressof(text), ctypes.addressof(matrix))
    chunks, chunk_size = matrix[9] & 0xFFFFFFFF, matrix[9] >> 32
    return matrix[5], (matrix[7] - matrix[6]) // STRING_BYTES, chunks, chunk_size
