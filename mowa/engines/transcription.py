"""Recordings → transcripts: decode, cut, batch, read, in the order the files were named.

This is the one path that the command line and `mowa.transcribe` share. It knows files and windows; it refuses to know
which net makes the numbers.

A recording longer than `window_s` is cut at silences into windows with `context_s` of sound on both sides; each window
is normalised by its own samples, as the recogniser was trained on utterances, not hours. The frames of all windows are
joined before letters are read, so a cut never doubles or splits one. Memory is bounded by the look-ahead, not the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from mowa.adapt import store
from mowa.data import audio
from mowa.data.speech import TAIL_S, Window, windows
from mowa.decode import ctc
from mowa.engines import native
from mowa.engines.native import Native
from mowa.engines.settings import Settings
from mowa.errors import AudioError, ModelError, MowaError
from mowa.loading.speech import load
from mowa.nouns import Model, Transcript

DEFAULT = "pl-tiny"
LOOK_AHEAD = 8  # batches' worth of windows read before they are sorted by length


@dataclass(frozen=True, slots=True)
class Failure:
    """A recording that could not be transcribed, and why."""

    file: str
    error: MowaError


@dataclass(slots=True)
class _Recording:
    """One file on its way: its windows' paths arrive in any order, and the transcript is read when all are there."""

    file: str
    paths: dict[int, ctc.Path] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    samples: int = 0
    waiting: int = 0
    failure: MowaError | None = None
    ended: bool = False


@overload
def transcribe(files: str | Path, model: str | Model | Native | None = ..., **options: Any) -> Transcript: ...
@overload
def transcribe(
    files: Sequence[str | Path], model: str | Model | Native | None = ..., **options: Any
) -> list[Transcript]: ...
def transcribe(
    files: str | Path | Sequence[str | Path],
    model: str | Model | Native | None = None,
    *,
    adapter: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    **settings: Any,
) -> Transcript | list[Transcript]:
    """One recording → its Transcript; a list of recordings and folders → a list, in order.

    `model` is an alias, a folder, a hub id, or what `load` or `engine` gave; None is the adapter's base, or pl-tiny.
    `adapter` is an adapter's folder, or the name of one that `engine` was given. `settings` are the fields of
    `Settings`. The first bad recording raises its MowaError; `transcripts` goes on past it.
    """
    chosen = Settings(**settings)
    if not isinstance(model, Native):
        loaded = load(model or base_of(adapter)) if model is None or isinstance(model, str) else model
        model = native.engine(loaded, device=device, dtype=dtype, threads=threads)
    model = model.choose(adapter)
    alone = isinstance(files, str | Path)
    if alone and Path(str(files)).is_dir():
        raise AudioError(f"{files}: is a folder. Give it in a list, transcribe([folder]), for a list of transcripts.")
    done = []
    for outcome in transcripts(audio.find([files] if isinstance(files, str | Path) else files), model, chosen):
        if isinstance(outcome, Failure):
            raise outcome.error
        done.append(outcome)
    return done[0] if alone else done


def base_of(adapter: str | Path | None) -> str:
    """By which name the model loads that `adapter` (a folder) was made over; pl-tiny without one."""
    return DEFAULT if adapter is None else store.read(adapter).base.where


def transcripts(
    files: Iterable[str | Path],
    engine: Native,
    settings: Settings | None = None,
    *,
    heard: Callable[[float], object] = lambda seconds: None,
) -> Iterator[Transcript | Failure]:
    """One outcome a file, in the order given. A bad file is a Failure and the others go on.

    `heard` is called with the seconds of audio each batch brought, for progress. Cut-off recordings are refused whole.
    """
    settings = settings or Settings()
    rate_hz = engine.model.preprocessing.rate_hz
    _fits(engine, settings)
    budget = int(settings.batch_s * rate_hz)
    queue: list[_Recording] = []
    pool: list[tuple[_Recording, Window]] = []
    pooled = 0
    for file in files:
        recording = _Recording(str(file))
        queue.append(recording)
        try:
            for window in _cut(file, engine, settings):
                recording.cuts.append(window.core_start)
                recording.samples = window.core_end
                recording.waiting += 1
                pool.append((recording, window))
                pooled += len(window.samples)
                if pooled >= LOOK_AHEAD * budget:
                    _run(pool, engine, settings, budget, heard)
                    pool, pooled = [], 0
        except MowaError as wrong:
            recording.failure = wrong
            pool = [(owner, window) for owner, window in pool if owner is not recording]
        recording.ended = True
        while queue and queue[0].ended and (queue[0].failure or not queue[0].waiting):
            yield _outcome(queue.pop(0), engine, settings)
    _run(pool, engine, settings, budget, heard)
    for recording in queue:
        yield _outcome(recording, engine, settings)


def _fits(engine: Native, settings: Settings) -> None:
    """ModelError where windows are longer than the positions of the net reach (config key `absolute_positions`)."""
    config = engine.model.net.config
    if (frames := getattr(config, "absolute_positions", None)) is None:
        return
    longest_s = frames * native.hop(config) / engine.model.preprocessing.rate_hz - TAIL_S - 2 * settings.context_s
    if settings.window_s > longest_s:
        raise ModelError(
            f"{engine.model.origin.name} hears windows of {longest_s:g} s at most"
            f" beside {settings.context_s:g} s of context on both sides; window_s is {settings.window_s:g}"
        )


def _cut(file: str | Path, engine: Native, settings: Settings) -> Iterator[Window]:
    rate_hz = engine.model.preprocessing.rate_hz
    blocks = audio.stream(file, rate_hz, resample=settings.resample)
    return windows(
        blocks,
        rate_hz,
        longest_s=settings.window_s,
        context_s=settings.context_s,
        hop=native.hop(engine.model.net.config),
    )


def _run(
    pool: Sequence[tuple[_Recording, Window]],
    engine: Native,
    settings: Settings,
    budget: int,
    heard: Callable[[float], object],
) -> None:
    """Read every window of the pool and hand each path to its recording."""
    spoken = []
    for recording, window in pool:
        if window.speech < settings.speech or audio.is_silent(window.samples):
            recording.paths[window.core_start] = _silence(window, engine)
            recording.waiting -= 1
            heard((window.core_end - window.core_start) / engine.model.preprocessing.rate_hz)
        else:
            spoken.append((recording, window))
    lengths = [len(window.samples) for _, window in spoken]
    for group in native.batches(lengths, budget, engine.sharing):
        chosen = [spoken[index] for index in group]
        clips = [window.samples for _, window in chosen]
        if engine.model.preprocessing.normalize:
            clips = [audio.normalize(clip) for clip in clips]
        seconds = 0.0
        for (recording, window), scores in zip(chosen, engine.emissions(clips), strict=True):
            try:
                first, end = _frames(window, engine)
                recording.paths[window.core_start] = ctc.best_path(scores[first:end], engine.model.vocabulary)
            except MowaError as wrong:
                recording.failure = wrong
            recording.waiting -= 1
            seconds += (window.core_end - window.core_start) / engine.model.preprocessing.rate_hz
        heard(seconds)


def _frames(window: Window, engine: Native) -> tuple[int, int]:
    """Which frames of the window belong to its core. The last core keeps all that the end of the recording gives."""
    hop = native.hop(engine.model.net.config)
    first = (window.core_start - window.start) // hop
    if window.last:
        return first, native.frames(engine.model.net.config, len(window.samples))
    return first, (window.core_end - window.start) // hop


def _silence(window: Window, engine: Native) -> ctc.Path:
    first, end = _frames(window, engine)
    count = max(0, end - first)
    return ctc.Path(np.full(count, engine.model.vocabulary.blank, np.int32), np.ones(count, np.float32))


def _outcome(recording: _Recording, engine: Native, settings: Settings) -> Transcript | Failure:
    if recording.failure is not None:
        return Failure(recording.file, recording.failure)
    model = engine.model
    rate_hz = model.preprocessing.rate_hz
    duration_s = recording.samples / rate_hz
    path = ctc.join(recording.paths[start] for start in recording.cuts)
    frame_s = native.hop(model.net.config) / rate_hz
    words = ctc.read(path, model.vocabulary, frame_s=frame_s, end_s=duration_s)
    return Transcript(
        file=recording.file,
        text=ctc.text(words),
        duration_s=duration_s,
        segments=ctc.segments(words, [start / rate_hz for start in recording.cuts[1:]]),
        model=f"{model.origin.source}@{model.origin.revision}" if model.origin.revision else model.origin.name,
        settings=asdict(settings) | {"device": engine.device, "dtype": engine.precision.dtype},
    )
