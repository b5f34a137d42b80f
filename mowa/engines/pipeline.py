"""The transcription pipeline: decode audio in threads, split it into windows, batch the windows, and join the results.

A recording longer than `window_s` is split at silences into windows with `context_s` of extra audio on both sides. Each
window is normalized by its own samples, since recognizers are trained on utterances. The frames of all windows are
joined before tokens are decoded, so a split neither duplicates nor breaks a character. Memory is bounded by the number
of windows read ahead, not by the length of recordings. Windows are batched in the order of the recordings whatever the
number of decoding threads, so the batches are reproducible.
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
from mowa.decode import confidence, ctc
from mowa.engines.protocol import Engine, batch_by_length
from mowa.engines.settings import TranscriptionSettings
from mowa.errors import AudioError, ModelError, MowaError
from mowa.models.ctc_encoder.geometry import frame_geometry, max_absolute_position
from mowa.types import Example, Failure, Segment, Transcript

PREFETCH_BATCHES = 8  # batches of windows that are read ahead and sorted by length
MIN_TURN_GAP_S = 0.8  # a silence this long on a separate channel ends a segment: another speaker may have answered
MAX_QUEUED_WINDOWS = 8  # per recording; its decoding thread blocks when the queue is full


@dataclass(slots=True)
class _ChannelResult:
    """Decoded windows of one channel, or of the mix (channel None): start sample → token path, in any order."""

    number: int | None
    paths: dict[int, ctc.TokenPath] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    samples: int = 0


@dataclass(slots=True)
class _Job:
    """One recording in the pipeline. Its decoding thread puts (channel, window) into `queue`; last None or an error."""

    example: Example
    queue: Queue[tuple[_ChannelResult, Window] | Exception | None] = field(
        default_factory=lambda: Queue(MAX_QUEUED_WINDOWS)
    )
    channels: list[_ChannelResult] = field(default_factory=list)
    num_pending: int = 0
    failure: MowaError | None = None
    ended: bool = False

    @property
    def done(self) -> bool:
        return self.ended and (self.failure is not None or not self.num_pending)


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
    """Yield (example, outcome) for every recording; a recording that fails has a Failure as outcome.

    Args:
        examples: recordings. If this iterable raises, earlier recordings are finished before the error is raised.
        decode_threads: number of threads that decode audio ahead.
        ordered: yield outcomes in the order of `examples` instead of as they are finished.
        allow_remote: open URLs (s3://…) with fsspec.
        before_decode: called before a recording is decoded; an error it returns is the recording's outcome.
        on_progress: called with the seconds of audio of each batch.
    """
    validate_window_length(engine, settings)
    max_batch_samples = int(settings.batch_s * engine.preprocessing.rate_hz)
    queue: deque[_Job] = deque()
    pool: list[tuple[_Job, _ChannelResult, Window]] = []
    pooled_samples = 0
    source_errors: list[Exception] = []

    def finished() -> Iterator[tuple[Example, Transcript | Failure]]:
        ready = [job for job in queue if job.done] if not ordered else takewhile(attrgetter("done"), list(queue))
        for job in ready:
            queue.remove(job)
            yield job.example, _outcome(job, engine, settings)

    for job, item in _decoded(examples, engine, settings, decode_threads, allow_remote, before_decode, source_errors):
        if not queue or queue[-1] is not job:
            queue.append(job)
        if isinstance(item, tuple):
            channel, window = item
            pool.append((job, channel, window))
            channel.cuts.append(window.core_start)
            channel.samples = window.core_end
            job.num_pending += 1
            pooled_samples += len(window.samples)
            if pooled_samples >= PREFETCH_BATCHES * max_batch_samples:
                _run(pool, engine, settings, max_batch_samples, on_progress)
                pool, pooled_samples = [], 0
            continue
        job.ended, job.failure = True, item
        if item is not None:
            pool = [entry for entry in pool if entry[0] is not job]
            pooled_samples = sum(len(window.samples) for _, _, window in pool)
        yield from finished()
    _run(pool, engine, settings, max_batch_samples, on_progress)
    yield from finished()
    if source_errors:
        raise source_errors[0]


def validate_window_length(engine: Engine, settings: TranscriptionSettings) -> None:
    """Raise ModelError if windows are longer than the net's positions (config key `absolute_positions`) allow."""
    if (max_frames := max_absolute_position(engine.config)) is None:
        return
    max_samples = max_frames * frame_geometry(engine.config).hop
    longest_s = max_samples / engine.preprocessing.rate_hz - MIN_TAIL_S - 2 * settings.context_s
    if settings.window_s > longest_s:
        raise ModelError(
            f"{engine.origin.name} takes windows of at most {longest_s:g} s with {settings.context_s:g} s of context on"
            f" both sides; window_s is {settings.window_s:g}"
        )


# --- decoding audio ---------------------------------------------------------------------------------------------------


def _decoded(
    examples: Iterable[Example],
    engine: Engine,
    settings: TranscriptionSettings,
    decode_threads: int,
    allow_remote: bool,
    before_decode: Callable[[Example], MowaError | None],
    source_errors: list[Exception],
) -> Iterator[tuple[_Job, tuple[_ChannelResult, Window] | MowaError | None]]:
    """Yield the windows of every recording, in order; None or an error ends each recording.

    An exception that `examples` raises is appended to `source_errors` and ends the iteration.
    """
    stop = Event()
    ahead: deque[_Job] = deque()
    more = iter(examples)

    def start(pool: ThreadPoolExecutor) -> None:
        while not source_errors and len(ahead) < 2 * decode_threads:
            try:
                job = _Job(next(more))
            except StopIteration:
                return
            except Exception as error:
                source_errors.append(error)
                return
            ahead.append(job)
            if failure := before_decode(job.example):
                job.queue.put(failure)
            else:
                pool.submit(_decode, job, engine, settings, allow_remote, stop)

    with ThreadPoolExecutor(decode_threads, thread_name_prefix="mowa-decode") as pool:
        try:
            start(pool)
            while ahead:
                job = ahead.popleft()
                while isinstance(item := job.queue.get(), tuple):
                    yield job, item
                if item is not None and not isinstance(item, MowaError):
                    raise item  # a bug, or out of memory
                start(pool)
                yield job, item
        finally:
            stop.set()


def _decode(job: _Job, engine: Engine, settings: TranscriptionSettings, allow_remote: bool, stop: Event) -> None:
    try:
        for item in _split(job, engine, settings, allow_remote):
            if not _put(job, item, stop):
                return
        _put(job, None, stop)
    except Exception as error:  # raised by the thread that reads the queue
        _put(job, error, stop)


def _put(job: _Job, item: tuple[_ChannelResult, Window] | Exception | None, stop: Event) -> bool:
    while not stop.is_set():
        try:
            job.queue.put(item, timeout=0.2)
        except Full:
            continue
        return True
    return False


def _split(
    job: _Job, engine: Engine, settings: TranscriptionSettings, allow_remote: bool
) -> Iterator[tuple[_ChannelResult, Window]]:
    example, rate_hz = job.example, engine.preprocessing.rate_hz
    source = _source(example, allow_remote)
    job.channels = [_ChannelResult(number) for number in _select_channels(source, settings.channels)]
    for channel in job.channels:
        blocks = audio.stream_audio(
            source,
            rate_hz,
            resample=settings.resample,
            channel=channel.number,
            offset_s=example.offset_s,
            duration_s=example.duration_s if example.is_excerpt else None,
        )
        windows = split_windows(
            blocks,
            rate_hz,
            max_window_s=settings.window_s,
            context_s=settings.context_s,
            hop=frame_geometry(engine.config).hop,
        )
        yield from ((channel, window) for window in windows)


def _source(example: Example, allow_remote: bool) -> Path | AudioBytes:
    """Return the audio as a path or as bytes. Raises AudioError for a bad line, or a URL that cannot be opened."""
    if example.error:
        raise AudioError(example.error)
    if example.audio_bytes is not None:
        return AudioBytes(example.audio, example.audio_bytes)
    if "://" not in example.audio:
        return Path(example.audio)
    if not allow_remote:
        raise AudioError(f"{example.audio}: is a URL. Allow remote files with --allow-remote, or download it.")
    import fsspec

    try:
        with fsspec.open(example.audio, "rb") as file:
            return AudioBytes(example.audio, file.read())
    except Exception as error:  # fsspec raises other types for each protocol
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise AudioError(f"{example.audio}: cannot be downloaded ({reason}).") from None


def _select_channels(source: Path | AudioBytes, channels: str) -> Sequence[int | None]:
    """Return the channels to transcribe separately; [None] to transcribe their mix, also where all are identical."""
    if channels == "mix":
        return [None]
    if channels == "split" and audio.probe_audio(source).channels == 1:
        return [None]
    among = None if channels == "split" else [int(number) for number in channels.split(",")]
    distinct = audio.find_distinct_channels(source, among)
    return [None] if channels == "split" and len(distinct) == 1 else distinct


# --- the net and decoding of tokens -----------------------------------------------------------------------------------


def _run(
    pool: Sequence[tuple[_Job, _ChannelResult, Window]],
    engine: Engine,
    settings: TranscriptionSettings,
    max_batch_samples: int,
    on_progress: Callable[[float], object],
) -> None:
    """Run the net on every window of the pool and store each window's token path with its recording."""
    rate_hz = engine.preprocessing.rate_hz
    spoken = []
    for job, channel, window in pool:
        too_short = not frame_geometry(engine.config).num_frames(len(window.samples))
        if too_short or window.speech_prob < settings.vad_threshold or audio.is_silent(window.samples):
            channel.paths[window.core_start] = _blank_path(window, engine)
            job.num_pending -= 1
            on_progress((window.core_end - window.core_start) / rate_hz)
        else:
            spoken.append((job, channel, window))
    for group in batch_by_length(
        [len(window.samples) for _, _, window in spoken], max_batch_samples, engine.batch_policy
    ):
        chosen = [spoken[index] for index in group]
        clips = [audio.preprocess(window.samples, engine.preprocessing) for _, _, window in chosen]
        seconds = 0.0
        for (job, channel, window), scores in zip(chosen, engine.emissions(clips), strict=True):
            try:
                first, end = _frames(window, engine)
                channel.paths[window.core_start] = ctc.best_path(scores[first:end], engine.vocabulary)
            except MowaError as error:
                job.failure = error
            job.num_pending -= 1
            seconds += (window.core_end - window.core_start) / rate_hz
        on_progress(seconds)


def _frames(window: Window, engine: Engine) -> tuple[int, int]:
    """Return the range of frames that belong to the window's core; the last window keeps all frames to its end."""
    step = frame_geometry(engine.config).hop
    first = (window.core_start - window.start) // step
    if window.is_last:
        return first, frame_geometry(engine.config).num_frames(len(window.samples))
    return first, (window.core_end - window.start) // step


def _blank_path(window: Window, engine: Engine) -> ctc.TokenPath:
    first, end = _frames(window, engine)
    count = max(0, end - first)
    return ctc.TokenPath(np.full(count, engine.vocabulary.blank, np.int32), np.ones(count, np.float32))


def _outcome(job: _Job, engine: Engine, settings: TranscriptionSettings) -> Transcript | Failure:
    file = job.example.audio
    if job.failure is not None:
        return Failure(file, job.failure)
    by_channel = [_segments(channel, engine) for channel in job.channels]
    segments = sorted(chain.from_iterable(by_channel), key=lambda segment: segment.start_s)
    transcript = Transcript(
        file=file,
        text=ctc.join_segments(segments),
        duration_s=max(channel.samples for channel in job.channels) / engine.preprocessing.rate_hz,
        segments=tuple(segments),
        model=f"{engine.origin.source}@{engine.origin.revision}" if engine.origin.revision else engine.origin.name,
        settings=asdict(settings) | {"device": engine.device, "dtype": engine.dtype},
    )
    confidence.warn_if_low(transcript, engine.origin.name)
    return transcript


def _segments(channel: _ChannelResult, engine: Engine) -> list[Segment]:
    rate_hz = engine.preprocessing.rate_hz
    path = ctc.concat_paths(channel.paths[start] for start in channel.cuts)
    words = ctc.path_to_words(
        path, engine.vocabulary, frame_s=frame_geometry(engine.config).hop / rate_hz, end_s=channel.samples / rate_hz
    )
    cuts = [start / rate_hz for start in channel.cuts[1:]]
    if channel.number is not None:  # so that the turns of speakers on separate channels interleave
        cuts += [second.start_s for first, second in pairwise(words) if second.start_s - first.end_s >= MIN_TURN_GAP_S]
    return [replace(segment, channel=channel.number) for segment in ctc.group_segments(words, cuts)]
