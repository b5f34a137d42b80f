"""How recordings are transcribed, as one value. Kept apart so that the command line can read its defaults cheaply."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ENGINES = ("pytorch", "onnx", "auto")


@dataclass(frozen=True, slots=True)
class TranscriptionSettings:
    """Everything that may change a transcript or its cost, beside the model. Times in seconds.

    `speech` is how sure the speech detector must be, at its surest moment in a window, for the window to be read at
    all; 0 reads everything. `batch_s` bounds the (padded) audio in one batch. `channels`: mix (their average), split
    (each for itself, twins once), or numbers with commas (0,1).
    """

    resample: Literal["best", "fast"] = "best"
    window_s: float = 20.0
    context_s: float = 2.0
    batch_s: float = 32.0
    vad_threshold: float = 0.1
    channels: str = "mix"


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Which model is to hear, and on what: names only, so that it can be said to other processes and machines."""

    model: str
    adapter: Path | None = None
    revision: str | None = None
    offline: bool = False
    engine: str = "pytorch"
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class WorkerPool:
    """Processes that hear: at least and at most so many, each with so many processors and GPUs (or parts of one)."""

    min_size: int = 1
    max_size: int = 0  # 0: as many as there is room for
    num_cpus: float = 1.0
    num_gpus: float = 0.0
