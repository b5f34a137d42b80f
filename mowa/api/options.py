"""Types of the keyword arguments of the verbs that take many; the functions say what they mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypedDict


class TranscriptionOptions(TypedDict, total=False):
    """Fields of `TranscriptionSettings`."""

    resample: Literal["best", "fast"]
    window_s: float
    context_s: float
    batch_s: float
    vad_threshold: float
    channels: str


class StreamingOptions(TypedDict, total=False):
    """Fields of `StreamingConfig`."""

    mode: Literal["auto", "cached", "window"]
    chunk_s: float | None
    left_context_s: float | None
    lookahead_s: float | None


class GenerationOptions(TypedDict, total=False):
    """Fields of `GenerationSettings`; `stop` may be one string."""

    max_new_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    repetition_penalty: float | None
    stop: str | Sequence[str]
    seed: int | None


class EngineOptions(TypedDict, total=False):
    """Which engine runs a speech model, and how."""

    adapter: str | Path | None
    engine: str
    device: str
    dtype: str
    threads: int | None
    revision: str | None
    target_lang: str | None
    offline: bool


class TranscribeOptions(EngineOptions, TranscriptionOptions, total=False):
    """Options of `mowa.transcribe`."""

    word_timestamps: bool
    on_progress: Callable[[float], object]


class GenerateOptions(GenerationOptions, total=False):
    """Options of `mowa.generate`."""

    system: str
    chat: bool | None
    threads: int | None
    batch_size: int
