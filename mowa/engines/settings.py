"""Settings of transcription and generation, and engine specifications, as plain values; importable without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Literal

from mowa.errors import ModelError


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
class GenerationSettings:
    """How tokens are chosen and when to stop. None: as the model's generation_config.json says.

    max_new_tokens      most tokens of an answer
    temperature         0: the most probable token (greedy); else logits are divided by it and a token is drawn
    top_p               draw from the fewest tokens that have this probability together
    top_k               draw from this many tokens; 0: all
    repetition_penalty  1: none
    stop                strings that end an answer, and are not part of it; one may be a special token
    seed                seed of the draws; one seed gives one answer per prompt, machine and batch. torch's global
                        generator is used meanwhile: do not draw from it in other threads
    """

    max_new_tokens: int = 512
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None


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


def validate_generation(settings: GenerationSettings) -> None:
    """Raise ModelError for the first number that is out of range."""
    for name, least in (("max_new_tokens", 1), ("top_k", 0), ("seed", None)):
        value = getattr(settings, name)
        if value is None and name != "max_new_tokens":
            continue
        if not is_int(value):
            raise ModelError(f"{name} is {value!r}: it must be a whole number")
        if least is not None and value < least:
            raise ModelError(f"{name} is {value}: it must be at least {least}")
    for name in ("temperature", "top_p", "repetition_penalty"):
        value = getattr(settings, name)
        if value is not None and (not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value)):
            raise ModelError(f"{name} is {value!r}: it must be a finite number")
    if settings.temperature is not None and settings.temperature < 0:
        raise ModelError(f"temperature is {settings.temperature:g}: it must not be negative")
    if settings.top_p is not None and not 0 < settings.top_p <= 1:
        raise ModelError(f"top_p is {settings.top_p:g}: it must be above 0 and at most 1")
    if settings.repetition_penalty is not None and settings.repetition_penalty <= 0:
        raise ModelError(f"repetition_penalty is {settings.repetition_penalty:g}: it must be above 0")


def is_int(value: object) -> bool:
    """Return whether `value` is a whole number of any type, but no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)
