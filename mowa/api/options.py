"""Type and read the keyword arguments that several verbs share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar

from mowa.engines.settings import EngineSpec
from mowa.errors import ModelError

SettingsT = TypeVar("SettingsT")


class LoadOptions(TypedDict, total=False):
    """Options of `mowa.load`, which says what they mean."""

    adapter: str | Path | None
    revision: str | None
    dtype: str
    device: str
    accelerate: bool | Literal["auto"]
    offline: bool
    target_lang: str | None


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
    """Which engine runs a speech model, and how.

    adapter      an adapter's folder, or the name of one that the engine was opened with
    engine       auto (the fastest here), pytorch, onnx, or another in `engines.registry`; an export has its own
    device       cpu, cuda, cuda:1, …; auto: a GPU if there is one
    dtype        float32, bfloat16, float16 or int8; auto: the fastest on this machine
    threads      CPU threads; None: all cores
    revision, target_lang, offline   as in `mowa.load`
    """

    adapter: str | Path | None
    engine: str
    device: str
    dtype: str
    threads: int | None
    revision: str | None
    target_lang: str | None
    offline: bool


class TranscribeOptions(EngineOptions, TranscriptionOptions, total=False):
    """Options of `mowa.transcribe`, `mowa.transcribe_corpus` and `mowa.evaluate`."""


class StreamOptions(EngineOptions, StreamingOptions, total=False):
    """Options of `mowa.stream`."""


class GenerateOptions(GenerationOptions, total=False):
    """Options of `mowa.generate`."""

    system: str
    chat: bool | None
    threads: int | None
    batch_size: int
    chat_template_kwargs: Mapping[str, Any] | None
    engine: str


def read_settings(
    verb: str, settings: type[SettingsT], given: Mapping[str, Any], others: Iterable[str] = ()
) -> SettingsT:
    """Return a settings dataclass.

    Raises ModelError for an option that it lacks, with the closest name among its own and `others` of the verb.
    """
    known = [one.name for one in fields(settings)]  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            options = [*known, *others]
            close = difflib.get_close_matches(name, options, 1, 0.5)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(options)}"
            raise ModelError(f"{verb} has no option {name!r}: {hint}")
    return settings(**given)


def split_options(
    verb: str, settings: type[SettingsT], options: Mapping[str, Any], *, engine: str = "auto"
) -> tuple[EngineSpec, SettingsT]:
    """Return the engine, without a model's name, and the settings that the options of a verb name.

    `engine` is the default. Raises as `read_settings`.
    """
    of_engine = EngineOptions.__annotations__.keys()
    given = {name: value for name, value in options.items() if name not in of_engine}
    engine_options = {name: value for name, value in options.items() if name in of_engine}
    spec = EngineSpec(**({"model": "", "engine": engine} | engine_options))
    return spec, read_settings(verb, settings, given, of_engine)
