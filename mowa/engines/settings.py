"""Transcription settings and engine specifications as plain values, importable without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True)
class TranscriptionSettings:
    """Everything besides the model that may change a transcript or its cost. Times in seconds.

    resample       resampling quality
    window_s       longer recordings are split at silences into windows of at most this length
    context_s      extra audio on both sides of each window
    batch_s        audio per batch, padding included
    vad_threshold  windows whose peak speech probability is below this are skipped; 0 skips none
    channels       mix (average all), split (transcribe each separately, identical ones once), or numbers (0,1)
    """

    resample: Literal["best", "fast"] = "best"
    window_s: float = 20.0
    context_s: float = 2.0
    batch_s: float = 32.0
    vad_threshold: float = 0.1
    channels: str = "mix"


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Which model to load and how to run it; names only, so that it can be sent to other processes and machines."""

    model: str
    adapter: str | Path | None = None
    revision: str | None = None
    offline: bool = False
    engine: str = "pytorch"
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    target_lang: str | None = None


@dataclass(frozen=True, slots=True)
class WorkerPool:
    """Number of worker processes, and the CPUs and GPUs (or fractions) of each."""

    min_size: int = 1
    max_size: int = 0  # 0: as many as fit
    num_cpus: float = 1.0
    num_gpus: float = 0.0
