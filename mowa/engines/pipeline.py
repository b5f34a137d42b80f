"""Recordings → transcripts, in a pipeline: decoded ahead in threads, cut, pooled, batched, read, put together.

It knows recordings and windows; it refuses to know which net makes the numbers, and where transcripts go.

A recording longer than `window_s` is cut at silences into windows with `context_s` of sound on both sides; each window
is normalised by its own samples, as the recogniser was trained on utterances, not hours. The frames of all windows are
joined before letters are read, so a cut never doubles or splits one. Memory is bounded by the look-ahead, not by the
recordings. However many threads decode, windows are pooled in the order of the recordings, so the same recordings make
the same batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, pairwise, takewhile
from operator import attrgetter
from pathlib import Path
from queue import Full, Queue
from threading import Event

import numpy as np

from mowa.data import audio
from mowa.data.audio.decoders import AudioBytes
from mowa.data.audio.vad import MIN_TAIL_S, Window, split_windows
from mowa.decode import ctc
from mowa.engines.protocol import Engine, batch_by_length, hop_length, num_frames
from mowa.engines.settings import TranscriptionSettings
from mowa.errors import AudioError, ModelError, MowaError
from mowa.types import Example, Segment, Transcript

PREFETCH_BATCHES = 8  # batches' worth of windows read before they are sorted by length
MIN_TURN_GAP_S = 0.8  # who is silent so long on a channel of their own may have been answered on another
MAX_QUEUED_WINDOWS = 8  # windows of one recording that wait for their turn; its decoding waits for them


@dataclass(frozen=True, slots=True)
class Failure:
    """A recording that could not be transcribed, and why."""

    file: str
    error: MowaError


@dataclass(slots=True)
class _Voice:
    """One channel, or all as one, on its way: paths of its windows come in any order, and are read when all are in."""

    channel: int | None
    paths: dict[int, ctc.TokenPath] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    samples: int = 0


@dataclass(slots=True)
class _Job:
    """One recording on its way. `queue` brings (voice, window) from its thread, and at the end None or an error."""

    example: Example
    queue: Queue[tuple[_Voice, Window] | Exception | None] = field(default_factory=lambda: Queue(MAX_QUEUED_WINDOWS))
    voices: list[_Voice] = field(default_factory=list)
    waiting: int = 0
    failure: MowaError | None = None
    ended: bool = False

    @property
    def done(self) -> bool:
        return self.ended and (self.failure is not None or not self.waiting)


def transcribe_examples(
    examples: Iterable[Example],
    engine: Engine,
    settings: TranscriptionSettings,
    *,
    decode_threads: int = 1,
    ordered: bool = True,
    allow_remote: bool = False,
    before_decode: Callable[[Example], MowaError | None] = lambda example: None,
    on_progress: Callable[[float], object] = lambda seconds: None,
) -> Iterator[tuple[Example, Transcript | Failure]]:
    """One outcome a recording: in order, or (`ordered` False) as soon as it is there. A bad one is a Failure.

    `decoders` threads decode ahead; addresses (s3://…) are opened, through fsspec, only where `remote`. `begun`
    is called before one is decoded, and may say what is wrong with it. `heard` is called with the seconds of audio each
    batch brought, for progress. Where `examples` itself raises, what it gave
    before is finished first.
    """
    validate_window_length(engine, settings)
    budget = int(settings.batch_s * engine.preprocessing.rate_hz)
    queue: deque[_Job] = deque()
    pool: list[tuple[_Job, _Voice, Window]] = []
    pooled = 0
    broken: list[Exception] = []

    def finished() -> Iterator[tuple[Example, Transcript | Failure]]:
        ready = [job for job in queue if job.done] if not ordered else takewhile(attrgetter("done"), list(queue))
        for job in ready:
            queue.remove(job)
            yield job.example, _outcome(job, engine, settings)

    for job, item in _decoded(examples, engine, settings, decode_threads, allow_remote, before_decode, broken):
        if not queue or queue[-1] is not job:
            queue.append(job)
        if isinstance(item, tuple):
            voice, window = item
            pool.append((job, voice, window))
            voice.cuts.append(window.core_start)
            voice.samples = window.core_end
            job.waiting += 1
            pooled += len(window.samples)
            if pooled >= PREFETCH_BATCHES * budget:
                _run(pool, engine, settings, budget, on_progress)
                pool, pooled = [], 0
            continue
        job.ended, job.failure = True, item
        if item is not None:
            pool = [entry for entry in pool if entry[0] is not job]
            pooled = sum(len(window.samples) for _, _, window in pool)
        yield from finished()
    _run(pool, engine, settings, budget, on_progress)
    yield from finished()
    if broken:
        raise broken[0]


def validate_window_length(engine: Engine, settings: TranscriptionSettings) -> None:
    """ModelError where windows are longer than the positions of the net reach (config key `absolute_positions`)."""
    if (reach := getattr(engine.config, "absolute_positions", None)) is None:
        return
    longest_s = reach * hop_length(engine.config) / engine.preprocessing.rate_hz - MIN_TAIL_S - 2 * settings.context_s
    if settings.window_s > longest_s:
        raise ModelError(
            f"{engine.origin.name} hears windows of {longest_s:g} s at most"
            f" beside {settings.context_s:g} s of context on both sides; window_s is {settings.window_s:g}"
        )


# --- decoding, ahead of the net ---------------------------------------------------------------------------------------


def _decoded(
    examples: Iterable[Example],
    engine: Engine,
    settings: TranscriptionSettings,
    decoders: int,
    remote: bool,
    begun: Callable[[Example], MowaError | None],
    broken: list[Exception],
) -> Iterator[tuple[_Job, tuple[_Voice, Window] | MowaError | None]]:
    """Windows of every recording, in order, each recording closed by None or what is wrong with it.

    What `examples` raises goes into `broken`, and there are no more then.
    """
    stop = Event()
    ahead: deque[_Job] = deque()
    more = iter(examples)

    def start(pool: ThreadPoolExecutor) -> None:
        while not broken and len(ahead) < 2 * decoders:
            try:
                job = _Job(next(more))
            except StopIteration:
                return
            except Exception as raised:
                broken.append(raised)
                return
            ahead.append(job)
            if wrong := begun(job.example):
                job.queue.put(wrong)
            else:
                pool.submit(_decode, job, engine, settings, remote, stop)

    with ThreadPoolExecutor(decoders, thread_name_prefix="mowa-decode") as pool:
        try:
            start(pool)
            while ahead:
                job = ahead.popleft()
                while isinstance(item := job.queue.get(), tuple):
                    yield job, item
                if item is not None and not isinstance(item, MowaError):
                    raise item  # a bug, or no memory
                start(pool)
                yield job, item
        finally:
            stop.set()


def _decode(job: _Job, engine: Engine, settings: TranscriptionSettings, remote: bool, stop: Event) -> None:
    try:
        for item in _cut(job, engine, settings, remote):
            if not _put(job, item, stop):
                return
        _put(job, None, stop)
    except Exception as wrong:  # raised where it is waited for
        _put(job, wrong, stop)


def _put(job: _Job, item: tuple[_Voice, Window] | Exception | None, stop: Event) -> bool:
    while not stop.is_set():
        try:
            job.queue.put(item, timeout=0.2)
        except Full:
            continue
        return True
    return False


def _cut(job: _Job, engine: Engine, settings: TranscriptionSettings, remote: bool) -> Iterator[tuple[_Voice, Window]]:
    example, rate_hz = job.example, engine.preprocessing.rate_hz
    source = _source(example, remote)
    job.voices = [_Voice(channel) for channel in _channels(source, settings.channels)]
    for voice in job.voices:
        blocks = audio.stream_audio(
            source,
            rate_hz,
            resample=settings.resample,
            channel=voice.channel,
            offset_s=example.offset_s,
            duration_s=example.duration_s if example.is_excerpt else None,
        )
        pieces = split_windows(
            blocks, rate_hz, max_window_s=settings.window_s, context_s=settings.context_s, hop=hop_length(engine.config)
        )
        yield from ((voice, window) for window in pieces)


def _source(example: Example, remote: bool) -> Path | AudioBytes:
    """Where its bytes are: in a file, with it, or at an address. AudioError where it may not, or cannot, be opened."""
    if example.audio_bytes is not None:
        return AudioBytes(example.audio, example.audio_bytes)
    if "://" not in example.audio:
        return Path(example.audio)
    if not remote:
        raise AudioError(f"{example.audio}: is an address, and none is opened unasked. Say --remote, or fetch it.")
    import fsspec

    try:
        with fsspec.open(example.audio, "rb") as file:
            return AudioBytes(example.audio, file.read())
    except Exception as wrong:  # every protocol has errors of its own
        reason = (str(wrong).splitlines() or [type(wrong).__name__])[0]
        raise AudioError(f"{example.audio}: cannot be fetched ({reason}).") from None


def _channels(source: Path | AudioBytes, wanted: str) -> Sequence[int | None]:
    """Which channels are heard, each for itself; None: all as one, where they are mixed or say the same."""
    if wanted == "mix":
        return [None]
    among = None if wanted == "split" else [int(number) for number in wanted.split(",")]
    if wanted == "split" and audio.probe_audio(source).channels == 1:
        return [None]
    channels = audio.find_distinct_channels(source, among)
    return [None] if wanted == "split" and len(channels) == 1 else channels


# --- the net, and what is read of it ----------------------------------------------------------------------------------


def _run(
    pool: Sequence[tuple[_Job, _Voice, Window]],
    engine: Engine,
    settings: TranscriptionSettings,
    budget: int,
    heard: Callable[[float], object],
) -> None:
    """Read every window of the pool and hand each path to its recording."""
    rate_hz = engine.preprocessing.rate_hz
    spoken = []
    for job, voice, window in pool:
        short = not num_frames(
            engine.config, len(window.samples)
        )  # for front ends that reach further than `SAMPLE_MIN`
        if short or window.speech_prob < settings.vad_threshold or audio.is_silent(window.samples):
            voice.paths[window.core_start] = _silence(window, engine)
            job.waiting -= 1
            heard((window.core_end - window.core_start) / rate_hz)
        else:
            spoken.append((job, voice, window))
    for group in batch_by_length([len(window.samples) for _, _, window in spoken], budget, engine.batch_policy):
        chosen = [spoken[index] for index in group]
        clips = [window.samples for _, _, window in chosen]
        if engine.preprocessing.normalize:
            clips = [audio.normalize(clip) for clip in clips]
        seconds = 0.0
        for (job, voice, window), scores in zip(chosen, engine.emissions(clips), strict=True):
            try:
                first, end = _frames(window, engine)
                voice.paths[window.core_start] = ctc.best_path(scores[first:end], engine.vocabulary)
            except MowaError as wrong:
                job.failure = wrong
            job.waiting -= 1
            seconds += (window.core_end - window.core_start) / rate_hz
        heard(seconds)


def _frames(window: Window, engine: Engine) -> tuple[int, int]:
    """Which frames of the window belong to its core. The last core keeps all that the end of the recording gives."""
    step = hop_length(engine.config)
    first = (window.core_start - window.start) // step
    if window.is_last:
        return first, num_frames(engine.config, len(window.samples))
    return first, (window.core_end - window.start) // step


def _silence(window: Window, engine: Engine) -> ctc.TokenPath:
    first, end = _frames(window, engine)
    count = max(0, end - first)
    return ctc.TokenPath(np.full(count, engine.vocabulary.blank, np.int32), np.ones(count, np.float32))


def _outcome(job: _Job, engine: Engine, settings: TranscriptionSettings) -> Transcript | Failure:
    file = job.example.audio
    if job.failure is not None:
        return Failure(file, job.failure)
    heard = [_read(voice, engine) for voice in job.voices]
    segments = sorted(chain.from_iterable(heard), key=lambda segment: segment.start_s)
    return Transcript(
        file=file,
        text=" ".join(segment.text for segment in segments if segment.text),
        duration_s=max(voice.samples for voice in job.voices) / engine.preprocessing.rate_hz,
        segments=tuple(segments),
        model=f"{engine.origin.source}@{engine.origin.revision}" if engine.origin.revision else engine.origin.name,
        settings=asdict(settings) | {"device": engine.device, "dtype": engine.dtype},
    )


def _read(voice: _Voice, engine: Engine) -> list[Segment]:
    rate_hz = engine.preprocessing.rate_hz
    path = ctc.concat_paths(voice.paths[start] for start in voice.cuts)
    words = ctc.path_to_words(
        path, engine.vocabulary, frame_s=hop_length(engine.config) / rate_hz, end_s=voice.samples / rate_hz
    )
    cuts = [start / rate_hz for start in voice.cuts[1:]]
    if voice.channel is not None:  # so that those who speak in turn are read in turn
        cuts += [second.start_s for first, second in pairwise(words) if second.start_s - first.end_s >= MIN_TURN_GAP_S]
    return [replace(segment, channel=voice.channel) for segment in ctc.group_segments(words, cuts)]
