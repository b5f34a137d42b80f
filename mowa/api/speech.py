"""Transcribe recordings (`mowa.transcribe`) and live audio (`mowa.stream`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, TypeAlias, Unpack, overload

import numpy as np
import torch

from mowa.api.models import Run
from mowa.api.options import StreamOptions, TranscribeOptions, split_options
from mowa.data.audio import find_audio_files
from mowa.data.audio.values import to_audio_source
from mowa.decode.stream import DEFAULT_ENDPOINTING, EndpointConfig, TranscriptionStream
from mowa.engines import streaming, transcription
from mowa.engines.protocol import Engine
from mowa.engines.registry import AUTO
from mowa.engines.settings import EngineSpec, TranscriptionSettings
from mowa.engines.streaming import StreamingConfig
from mowa.errors import AudioError
from mowa.types import CTCModel, Failure, Transcript

__all__ = ["AudioInput", "SpeechModel", "stream", "transcribe"]

SpeechModel: TypeAlias = str | Path | Run | CTCModel | Engine
AudioInput: TypeAlias = str | Path | bytes | IO[bytes] | np.ndarray | torch.Tensor | Mapping[str, Any]


@overload
def transcribe(  # type: ignore[overload-overlap]  # str and Mapping are iterables too
    audio: AudioInput,
    model: SpeechModel | None = ...,
    *,
    sampling_rate: int | None = ...,
    word_timestamps: bool = ...,
    on_progress: Callable[[float], object] = ...,
    **options: Unpack[TranscribeOptions],
) -> Transcript: ...
@overload
def transcribe(
    audio: Iterable[AudioInput],
    model: SpeechModel | None = ...,
    *,
    sampling_rate: int | None = ...,
    word_timestamps: bool = ...,
    on_progress: Callable[[float], object] = ...,
    **options: Unpack[TranscribeOptions],
) -> Iterator[Transcript | Failure]: ...
def transcribe(
    audio: AudioInput | Iterable[AudioInput],
    model: SpeechModel | None = None,
    *,
    sampling_rate: int | None = None,
    word_timestamps: bool = True,
    on_progress: Callable[[float], object] = lambda seconds: None,
    **options: Unpack[TranscribeOptions],
) -> Transcript | Iterator[Transcript | Failure]:
    """Transcribe a recording, or several.

    Args:
        audio: a path, bytes, a binary file, an array with `sampling_rate`, a row of `datasets` (see
            `data.audio.values.to_audio_source`); or a list or iterator of these, in which a folder stands for the
            recordings in it.
        model: an alias, a folder (also of an export or an adapter), a Hub id, a `Model`, or an engine that
            `mowa.open_engine` returned, a `Run`; None is the adapter's base model, or pl-tiny.
        sampling_rate: sampling rate of arrays, in Hz.
        word_timestamps: return words with their times; without, only the text of each segment.
        on_progress: called with the seconds of audio of each batch.
        options: adapter, engine, device, dtype, threads, revision, target_lang and offline (`EngineOptions`), and
            fields of `TranscriptionSettings`, such as batch_s, window_s, vad_threshold and channels.

    Returns:
        The Transcript of a single recording; for several, an iterator that yields, in order, a Transcript or, for a
        recording that cannot be read to its end, a Failure.

    Raises:
        MowaError: the model cannot be loaded, there is no such option, or a single recording cannot be read.
    """
    if not _is_single(audio) and not isinstance(audio, Iterable):
        raise AudioError(f"a value of type {type(audio).__name__} is not audio: pass a path, bytes, an array or a list")
    if isinstance(audio, list | tuple) and audio and isinstance(audio[0], int | float):
        raise AudioError("a list of numbers: pass numpy.array(samples), or {'array': …, 'sampling_rate': …}")
    spec, settings = split_options("transcribe", TranscriptionSettings, options)
    outcomes = transcription.iter_transcripts(
        _sources(audio, sampling_rate), _open_engine(model, spec), settings, on_progress=on_progress
    )
    if not word_timestamps:
        outcomes = map(_without_words, outcomes)
    if not _is_single(audio):
        return outcomes
    outcome = next(outcomes)
    if isinstance(outcome, Failure):
        raise outcome.error
    return outcome


def stream(
    model: SpeechModel | None = None,
    *,
    endpointing: EndpointConfig = DEFAULT_ENDPOINTING,
    **options: Unpack[StreamOptions],
) -> TranscriptionStream:
    """Open a live stream: `feed(samples)` returns new segments; `close()` returns the remaining ones.

    docs/live.md shows an example.

    Args:
        model: as in `mowa.transcribe`. Streams over one engine share its weights and may be fed from different threads.
        endpointing: when a segment ends.
        options: as in `mowa.transcribe`, but engine is pytorch if it is not given (for an export, its own), and fields
            of `StreamingConfig`: mode, chunk_s, left_context_s and lookahead_s.

    Raises:
        ModelError: the model or engine does not support the configuration, or as `mowa.load`.
    """
    spec, config = split_options("stream", StreamingConfig, options, engine="")
    return streaming.stream(_open_engine(model, spec), config, endpointing)


def _open_engine(model: SpeechModel | None, spec: EngineSpec) -> Engine:
    source = model.folder if isinstance(model, Run) else model
    if not spec.engine:
        is_export = isinstance(source, str | Path) and transcription.resolve_artifact(str(source)) is not None
        spec = replace(spec, engine=AUTO if is_export else "pytorch")
    return transcription.open_engine(source, spec)


def _is_single(audio: Any) -> bool:
    if isinstance(audio, str | Path | bytes | bytearray | memoryview | Mapping) or hasattr(audio, "read"):
        return True
    return hasattr(audio, "__array__") or hasattr(audio, "get_all_samples")


def _sources(audio: Any, sampling_rate: int | None) -> Iterator[Any]:
    """Yield what `iter_transcripts` reads; a value that is not audio is yielded as a Failure."""
    if _is_single(audio):
        if isinstance(audio, str | Path) and Path(audio).is_dir():
            raise AudioError(f"{audio}: is a folder: pass it in a list, transcribe([folder])")
        yield to_audio_source(audio, sampling_rate=sampling_rate)
        return
    for number, value in enumerate(audio, 1):
        name = f"recording {number}"
        try:
            is_folder = isinstance(value, str | Path) and Path(value).is_dir()
            found = find_audio_files([value]) if is_folder else []
            source = None if is_folder else to_audio_source(value, sampling_rate=sampling_rate, name=name)
        except AudioError as error:
            yield Failure(name, error)
        except (TypeError, ValueError, OSError) as error:  # from a closed file, a ragged array, a path with a null byte
            yield Failure(name, AudioError(f"{name}: is not audio ({error})"))
        else:
            yield from map(str, found) if is_folder else (source,)


def _without_words(outcome: Transcript | Failure) -> Transcript | Failure:
    if isinstance(outcome, Failure):
        return outcome
    return replace(outcome, segments=tuple(replace(segment, words=()) for segment in outcome.segments))
