"""Inspect the machine (cores, memory, GPU, installed packages) and choose a compute precision by measurement.

torch is imported only by the functions that need it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# What each package is used for, as `mowa doctor` prints it.
OPTIONAL_PACKAGES = {
    "torch": "all models",
    "transformers": "all models",
    "soundfile": "wav, flac, ogg, opus, mp3",
    "av": "m4a, mp4, webm, mkv",
    "soxr": "resampling",
    "onnxruntime": "voice activity detection, --engine onnx",
    "silero-vad": "voice activity detection",
    "onnx": "ONNX export",
    "onnxscript": "ONNX export",
    "accelerate": "mowa train",
    "pyyaml": "mowa train",
    "matplotlib": "plots",
    "jiwer": "word error rates",
    "peft": "LoRA",
    "datasets": "Hugging Face data sets, parquet, language-model training",
    "trl": "language-model training",
    "deepspeed": "training on several devices",
    "torchao": "quantization-aware training",
    "coremltools": "Core ML export",
    "ctranslate2": "CTranslate2 export and engine",
    "gguf": "tokenizers of GGUF files",
    "xllamacpp": "GGUF files in llama.cpp",
}
MIN_BFLOAT16_SPEEDUP = 1.5  # below this, bfloat16 is not worth its rounding errors
FLOAT32_TOLERANCE = 1e-5  # largest relative error that still counts as float32


@dataclass(frozen=True, slots=True)
class Precision:
    """A dtype for the weights and, for float32, torch's matmul precision ("highest" or "medium")."""

    dtype: str
    matmul: str = "highest"


@dataclass(frozen=True, slots=True)
class MatmulTiming:
    """Seconds per [499, hidden] × [hidden, intermediate] matmul; `medium_error` is relative, against float64."""

    highest_s: float
    medium_s: float
    medium_error: float
    bfloat16_s: float


def cpu_count() -> int:
    """Return the number of cores this process may use: its CPU affinity, limited by the container's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return allowed
    return allowed if quota == "max" else max(1, min(allowed, int(quota) // int(period)))


def total_memory_bytes() -> int:
    """Return the size of the physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory_bytes() -> int:
    """Return the memory that this process can still allocate: the kernel's estimate, limited by the container."""
    free = total_memory_bytes()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    with suppress(OSError, ValueError):  # ValueError: "max"
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, max(0, limit - used))
    return free


def peak_rss_bytes() -> int:
    """Return the peak resident memory of this process.

    On Linux it is read from /proc, because getrusage includes the parent's memory at the time of the fork.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def enable_huge_pages() -> None:
    """Let torch allocate large tensors in 2 MB pages on Linux, which reduces memory fragmentation.

    Call it before torch allocates memory, in programs rather than in a library. Sets THP_MEM_ALLOC_ENABLE, which torch
    reads in c10/core/impl/alloc_cpu.cpp, unless it is set already.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def set_passive_openmp() -> None:
    """Let OpenMP threads sleep while they wait, unless the user chose how they wait.

    Where cores are busy with something else, threads that spin keep those that compute from running. libgomp reads
    OMP_WAIT_POLICY and GOMP_SPINCOUNT when it is loaded, and torch loads it: call this before torch is imported, in
    programs rather than in a library.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "0")


def cpu_name() -> str:
    """Return the processor's model name."""
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_machine() -> str:
    """Return the CPU and its number of cores, for reports."""
    return f"{cpu_name()}, {cpu_count()} cores"


def cpu_features() -> tuple[str, ...]:
    """Return which of the instruction sets avx2, avx512, vnni, bf16 and amx the processor has."""
    flags = {flag for line in _cpuinfo() if line.startswith("flags") for flag in line.split()}
    known = {"avx2": "avx2", "avx512f": "avx512", "avx512_vnni": "vnni", "avx512_bf16": "bf16", "amx_bf16": "amx"}
    return tuple(name for flag, name in known.items() if flag in flags)


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def installed_version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def optional_package_versions() -> dict[str, str | None]:
    """Return the installed version of every optional package, None where it is missing."""
    return {name: installed_version(name) for name in OPTIONAL_PACKAGES}


def gpu_name() -> str | None:
    """Return name and compute capability of the CUDA device, or None."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (capability {major}.{minor})"


def cache_folder() -> Path:
    """Return mowa's cache folder: $MOWA_CACHE, else $XDG_CACHE_HOME/mowa, else ~/.cache/mowa."""
    if folder := os.environ.get("MOWA_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mowa"


def select_precision(hidden_size: int, intermediate_size: int) -> Precision:
    """Choose the fastest precision for matmuls of these sizes on this processor. Timings are cached on disk.

    bfloat16 is chosen only if the processor has instructions for it and it is at least `MIN_BFLOAT16_SPEEDUP` times as
    fast; else float32, with torch's "medium" matmul precision if that is faster and its error is within
    `FLOAT32_TOLERANCE` (on some processors "medium" means bfloat16).
    """
    timing = _cached_timing(hidden_size, intermediate_size)
    exact = select_float32_precision(hidden_size, intermediate_size)
    best_s = timing.medium_s if exact.matmul == "medium" else timing.highest_s
    if {"bf16", "amx"} & set(cpu_features()) and timing.bfloat16_s * MIN_BFLOAT16_SPEEDUP < best_s:
        return Precision("bfloat16")
    return exact


def select_float32_precision(hidden_size: int, intermediate_size: int) -> Precision:
    """Choose the fastest matmul precision whose result is exact to float32. Timings are cached on disk."""
    timing = _cached_timing(hidden_size, intermediate_size)
    medium = timing.medium_s < timing.highest_s and timing.medium_error <= FLOAT32_TOLERANCE
    return Precision("float32", "medium" if medium else "highest")


def _cached_timing(hidden_size: int, intermediate_size: int) -> MatmulTiming:
    import torch

    threads = torch.get_num_threads()
    key = f"{cpu_name()} · torch {torch.__version__} · {threads} threads · {hidden_size}×{intermediate_size}"
    file = cache_folder() / "hardware.json"
    try:
        cached: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):
        cached = {}
    if key in cached:
        return MatmulTiming(**cached[key])
    timing = benchmark_matmul(hidden_size, intermediate_size)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")  # io.atomic is above this module
        unfinished.write_text(json.dumps(cached | {key: asdict(timing)}, ensure_ascii=False, indent=1))
        unfinished.replace(file)
    except OSError:
        pass  # without a writable cache, the next process measures again
    return timing


def benchmark_matmul(hidden_size: int, intermediate_size: int, *, rounds: int = 15) -> MatmulTiming:
    """Time a matmul in three precisions, interleaved, and return the minimum of each over `rounds`."""
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(499, hidden_size, generator=generator)
    w = torch.randn(hidden_size, intermediate_size, generator=generator) / hidden_size**0.5
    x16, w16 = x.bfloat16(), w.bfloat16()
    seconds: dict[str, list[float]] = {"highest": [], "medium": [], "bfloat16": []}
    with torch.inference_mode():
        for _ in range(rounds):
            for precision, times in seconds.items():
                started = time.perf_counter()
                with matmul_precision("highest" if precision == "bfloat16" else precision):
                    _ = x16 @ w16 if precision == "bfloat16" else x @ w
                times.append(time.perf_counter() - started)
        with matmul_precision("medium"):
            medium = (x @ w).double()
        truth = x.double() @ w.double()
    error = float((medium - truth).norm() / truth.norm())
    highest_s, medium_s, bfloat16_s = (min(times) for times in seconds.values())
    return MatmulTiming(highest_s, medium_s, error, bfloat16_s)


_PRECISIONS = ("highest", "high", "medium")  # most exact first
_requested: list[str] = []  # by the contexts that are open now, in any thread
_initial = "highest"  # the setting before the first of them
_lock = threading.Lock()


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Set torch's float32 matmul precision within the context and restore it afterwards.

    The setting is global to the process. When several threads hold such contexts at once, the most exact precision
    applies, and the original one is restored when the last context exits.
    """
    import torch

    global _initial
    with _lock:
        if not _requested:
            _initial = torch.get_float32_matmul_precision()
        _requested.append(name)
        torch.set_float32_matmul_precision(min(_requested, key=_PRECISIONS.index))
    try:
        yield
    finally:
        with _lock:
            _requested.remove(name)
            torch.set_float32_matmul_precision(min(_requested, key=_PRECISIONS.index, default=_initial))
