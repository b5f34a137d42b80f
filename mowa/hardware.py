"""Facts about the machine at hand, and the measurements that choices of precision rest on.

Nothing here knows a model. torch is imported only where a tensor is measured.
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
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# What each optional part is for; `mowa doctor` prints the table.
OPTIONAL_PACKAGES = {
    "torch": "runs every model",
    "transformers": "the models themselves",
    "soundfile": "wav, flac, ogg, opus, mp3",
    "av": "m4a, mp4, webm, mkv",
    "soxr": "resampling",
    "onnxruntime": "speech detection; the onnx engine",
    "silero-vad": "speech detection",
    "onnx": "writing models as ONNX",
    "onnxscript": "writing models as ONNX",
    "accelerate": "mowa train",
    "pyyaml": "mowa train",
    "matplotlib": "training curves",
    "jiwer": "error rates",
    "peft": "LoRA",
    "datasets": "data sets and parquet; language models",
    "trl": "training language models",
    "deepspeed": "training across devices",
    "torchao": "training with rounded weights",
    "coremltools": "writing models for Core ML",
    "ctranslate2": "writing and running models as CTranslate2 has them",
}
MIN_BFLOAT16_SPEEDUP = 1.5  # how much faster a half-precision product must be for the net to be worth its roundings
FLOAT32_TOLERANCE = 1e-5  # relative: what still counts as float32 arithmetic


@dataclass(frozen=True, slots=True)
class Precision:
    """`dtype` of the weights and, for float32, torch's matmul precision ("highest" or "medium")."""

    dtype: str
    matmul: str = "highest"


@dataclass(frozen=True, slots=True)
class MatmulTiming:
    """Seconds for one [499, width] × [width, inner] product per way of doing it; `medium_error` relative to float64."""

    highest_s: float
    medium_s: float
    medium_error: float
    bfloat16_s: float


def cpu_count() -> int:
    """Cores this process may use: its affinity, and a container's quota where one is set."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return allowed
    return allowed if quota == "max" else max(1, min(allowed, int(quota) // int(period)))


def total_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_rss_bytes() -> int:
    """The most bytes that this process had resident.

    On Linux getrusage would count what the parent had when it began this process, so the kernel's own mark is read.
    """
    marks = Path("/proc/self/status")
    if marks.is_file():
        for line in marks.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def enable_huge_pages() -> None:
    """Let torch ask Linux for pages of 2 MB: big tensors that come and go then leave less behind.

    To be said before torch takes its first memory, so by programs and not by the library; the environment's own word
    stands. Read by torch (c10/core/impl/alloc_cpu.cpp) as THP_MEM_ALLOC_ENABLE.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def cpu_name() -> str:
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_features() -> tuple[str, ...]:
    """Which of the instructions that matter to us the processor has: AVX-512, VNNI, bf16, AMX."""
    flags = {flag for line in _cpuinfo() if line.startswith("flags") for flag in line.split()}
    known = {"avx2": "avx2", "avx512f": "avx512", "avx512_vnni": "vnni", "avx512_bf16": "bf16", "amx_bf16": "amx"}
    return tuple(name for flag, name in known.items() if flag in flags)


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def optional_package_versions() -> dict[str, str | None]:
    """Installed version of every optional part, None where it is missing."""
    found: dict[str, str | None] = {}
    for name in OPTIONAL_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def gpu_name() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (capability {major}.{minor})"


def cache_folder() -> Path:
    """Where mowa keeps what it can make again: $MOWA_CACHE, else $XDG_CACHE_HOME/mowa, else ~/.cache/mowa."""
    if own := os.environ.get("MOWA_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mowa"


def select_precision(hidden_size: int, intermediate_size: int) -> Precision:
    """The fastest trustworthy way to multiply matrices of a net of this width on this processor, measured once.

    bfloat16 only where the processor computes in it and is half as fast again; else float32, with torch's
    "medium" matmul precision where that is faster and yet as exact as float32 (on others it means bfloat16).
    """
    timing = _remembered(hidden_size, intermediate_size)
    exact = select_float32_precision(hidden_size, intermediate_size)
    best_s = timing.medium_s if exact.matmul == "medium" else timing.highest_s
    if {"bf16", "amx"} & set(cpu_features()) and timing.bfloat16_s * MIN_BFLOAT16_SPEEDUP < best_s:
        return Precision("bfloat16")
    return exact


def select_float32_precision(hidden_size: int, intermediate_size: int) -> Precision:
    """The fastest way that is float32 in result, measured once."""
    timing = _remembered(hidden_size, intermediate_size)
    medium = timing.medium_s < timing.highest_s and timing.medium_error <= FLOAT32_TOLERANCE
    return Precision("float32", "medium" if medium else "highest")


def _remembered(width: int, inner: int) -> MatmulTiming:
    import torch

    key = f"{cpu_name()} · torch {torch.__version__} · {torch.get_num_threads()} threads · {width}×{inner}"
    file = cache_folder() / "machine.json"
    try:
        known: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):
        known = {}
    if key in known:
        return MatmulTiming(**known[key])
    timing = benchmark_matmul(width, inner)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(known | {key: asdict(timing)}, ensure_ascii=False, indent=1))
        fresh.replace(file)
    except OSError:
        pass  # a read-only home only means measuring again
    return timing


def benchmark_matmul(hidden_size: int, intermediate_size: int, *, rounds: int = 15) -> MatmulTiming:
    """Time a linear layer of the net in three precisions, interleaved. The least of each: what was disturbed least."""
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(499, hidden_size, generator=generator)
    w = torch.randn(hidden_size, intermediate_size, generator=generator) / hidden_size**0.5
    x16, w16 = x.bfloat16(), w.bfloat16()
    seconds: dict[str, list[float]] = {"highest": [], "medium": [], "bfloat16": []}
    with torch.inference_mode():
        for _ in range(rounds):
            for way, spent in seconds.items():
                started = time.perf_counter()
                with matmul_precision("highest" if way == "bfloat16" else way):
                    _ = x16 @ w16 if way == "bfloat16" else x @ w
                spent.append(time.perf_counter() - started)
        with matmul_precision("medium"):
            medium = (x @ w).double()
        truth = x.double() @ w.double()
    error = float((medium - truth).norm() / truth.norm())
    highest_s, medium_s, bfloat16_s = (min(spent) for spent in seconds.values())
    return MatmulTiming(highest_s, medium_s, error, bfloat16_s)


_EXACT_FIRST = ("highest", "high", "medium")
_asked: list[str] = []  # by the blocks that are open now, in any thread
_before = "highest"  # what there was before the first of them
_asking = threading.Lock()


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """torch's float32 matmul precision within the block, put back after it.

    torch has one for the whole process: of blocks open at once in several threads, the most exact one's holds, and
    what there was comes back when the last is left.
    """
    import torch

    global _before
    with _asking:
        if not _asked:
            _before = torch.get_float32_matmul_precision()
        _asked.append(name)
        torch.set_float32_matmul_precision(min(_asked, key=_EXACT_FIRST.index))
    try:
        yield
    finally:
        with _asking:
            _asked.remove(name)
            torch.set_float32_matmul_precision(min(_asked, key=_EXACT_FIRST.index, default=_before))
