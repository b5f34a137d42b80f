"""`mowa listen`: live sound in, words out as they are said."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import click

from mowa import hardware
from mowa.cli.live_display import LiveDisplay
from mowa.data.audio.decoders import RATE_RANGE_HZ
from mowa.data.inputs.source import AudioBlock, AudioSource, BufferedSource
from mowa.data.inputs.stdin import RAW_RATE_HZ
from mowa.decode.stream import DEFAULT_ENDPOINTING, TranscriptionStream
from mowa.engines.settings import EngineSpec
from mowa.errors import AudioError, DataError
from mowa.types import Segment, Word

DEFAULTS = EngineSpec("")


# fmt: off
@click.command(short_help="Write down what is said, as it is said.")
@click.argument("source", required=False)
@click.option("-m", "--model", help="Alias, folder, or hub id owner/name[@revision]. [default: pl-tiny, or what the"
              " adapter was made for]")
@click.option("--adapter", type=click.Path(path_type=Path), metavar="FOLDER",
              help="An adapter of the model, as `mowa train` writes it.")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--offline", is_flag=True, help="Never ask the hub; use what is cached.")
@click.option("-f", "--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True,
              help="text: final words; on a terminal, those that may change after them. json: a line for each event.")
@click.option("--input-device", metavar="NUMBER|NAME", help="Which microphone. [default: the system's]")
@click.option("--list-devices", is_flag=True, help="List the microphones, and hear nothing.")
@click.option("--rate", "raw_hz", type=click.IntRange(*RATE_RANGE_HZ), metavar="HZ",
              help=f"Of raw samples from standard input: 16 bits, one channel. [default: {RAW_RATE_HZ}]")
@click.option("--simulate", is_flag=True, help="Hear a file as fast as it was recorded, not as fast as can be.")
@click.option("--speed", type=click.FloatRange(min=0, min_open=True), help="With --simulate: so many times as fast.")
@click.option("--mode", type=click.Choice(["auto", "cached", "window"]),
              help="cached: with a memory, for models that were trained so; window: with what is before and after it"
              " anew, for all. [default: auto, cached where it can be]")
@click.option("--chunk-s", type=click.FloatRange(min=0, min_open=True),
              help="Seconds that are heard at a time. [default: as the mode has it]")
@click.option("--left-s", type=click.FloatRange(min=0),
              help="Seconds before them that are heard with them. [default: as the mode has it]")
@click.option("--right-s", type=click.FloatRange(min=0),
              help="Seconds after them that are heard with them, and waited for. [default: as the mode has it]")
@click.option("--pause-s", type=click.FloatRange(min=0), default=DEFAULT_ENDPOINTING.min_silence_s, show_default=True,
              help="Quiet that ends a segment.")
@click.option("--longest-s", type=click.FloatRange(min=0), default=DEFAULT_ENDPOINTING.max_segment_s, show_default=True,
              help="A longer segment ends at its next word.")
@click.option("--no-detect", is_flag=True, help="Hear all that comes, without looking for speech in it.")
@click.option("--engine", "kind", type=click.Choice(["pytorch", "onnx"]), default=DEFAULTS.engine, show_default=True,
              help="What computes: PyTorch (native) or ONNX Runtime (onnx).")
@click.option("--device", default=DEFAULTS.device, show_default=True, help="cpu, cuda, cuda:1, …")
@click.option(
    "--dtype", default=DEFAULTS.dtype, show_default=True, help="float32, bfloat16, float16, int8, or what measures"
    " fastest."
)
@click.option("--threads", type=click.IntRange(min=1), help="Processor threads. [default: the cores there are]")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def listen(
    source: str | None, model: str | None, adapter: Path | None, revision: str | None, offline: bool, form: str,
    input_device: str | None, list_devices: bool, raw_hz: int | None, simulate: bool, speed: float | None,
    pause_s: float, longest_s: float, no_detect: bool, kind: str, device: str, dtype: str, threads: int | None,
    debug: bool, **how: Any,
) -> int:
    # fmt: on
    """Write down what is said, as it is said.

    SOURCE is - for standard input (a recording, or raw samples), an address (http://…, rtp://…) or a file; without
    one, a microphone. What is written stays as it is; only what is dim on a terminal, and partial in JSON, may change.

    Ctrl-C ends it: what came until then is still written. The exit code is then 0 for microphones and addresses, and
    130 for what has an end of its own.
    """
    if list_devices:
        return _list_devices()
    hardware.enable_huge_pages()
    sound = _source(source, raw_hz, simulate, speed, input_device)
    from mowa.engines import streaming
    from mowa.engines.transcription import load_engine, resolve_base_model

    wanted = EngineSpec(
        model or resolve_base_model(adapter), adapter, revision, offline, engine=kind, device=device, dtype=dtype, threads=threads
    )
    rules = replace(DEFAULT_ENDPOINTING, min_silence_s=pause_s, max_segment_s=longest_s, vad=not no_detect)
    given = streaming.StreamingConfig(**{name: value for name, value in how.items() if value is not None})
    hearing = StreamSession(streaming.stream(load_engine(wanted).engine, given, rules))
    blocks = BufferedSource(sound, hearing.stream.encoder.rate_hz)
    with stop_on_signal(blocks) as stopped, blocks:
        output = _output(form)
        try:
            for events in hearing.events(blocks):
                output.write(events, hearing)
        finally:
            output.close()
            if hearing.lost_s:
                click.echo(f"mowa: {_lost(hearing.lost_s, blocks.dropped_s)}", err=True)
    return 130 if stopped and sound.finite else 0


@dataclass(frozen=True, slots=True)
class TimedSegment:
    """A segment, with times of the source. `latency_s`: how long ago the end of its last word was recorded; None
    without words."""

    segment: Segment
    processed_s: float
    latency_s: float | None


class StreamSession:
    """A stream that is fed with blocks. It knows when each was recorded, how long computing took, and what was lost.

    Where sound was lost the stream is flushed, and all that follows is later by what was lost.
    """

    def __init__(self, stream: TranscriptionStream) -> None:
        self.stream = stream
        self.compute_s = self.lost_s = 0.0
        self.latency_s: float | None = None  # of the last words
        self._moments: deque[tuple[float, float]] = deque(maxlen=8192)  # ends of blocks, and when they were recorded

    @property
    def processed_s(self) -> float:
        return self.stream.received_s + self.lost_s

    def events(self, blocks: BufferedSource) -> Iterator[list[TimedSegment]]:
        """What every block brings, often nothing; at the end, and before an AudioError, what was still open."""
        failure = None
        try:
            for block in blocks:
                yield self._fed(block)
        except AudioError as wrong:
            failure = wrong
        yield self._timed(time.monotonic(), self.stream.close())
        if failure is not None:
            raise failure

    def _fed(self, block: AudioBlock) -> list[TimedSegment]:
        before = []
        if block.lost_s:
            before = self._timed(time.monotonic(), self.stream.flush())
            self.lost_s += block.lost_s
        begun_s = time.monotonic()
        found = self.stream.feed(block.samples)
        if len(block.samples):
            self._moments.append((self.processed_s, block.captured_at_s))
        return before + self._timed(begun_s, found)

    def _timed(self, begun_s: float, found: list[Segment]) -> list[TimedSegment]:
        now_s = time.monotonic()
        self.compute_s += now_s - begun_s
        events = []
        for segment in found:
            late = _shifted(segment, self.lost_s)
            latency_s = max(0.0, now_s - self._recorded_s(late.end_s)) if late.words else None
            self.latency_s = self.latency_s if latency_s is None else latency_s
            events.append(TimedSegment(late, self.processed_s, latency_s))
        return events

    def _recorded_s(self, at_s: float) -> float:
        """When the sound at `at_s` was recorded: the moment of the block that it is in, less what follows it there."""
        later_end_s, later_s = self._moments[-1]
        for end_s, moment_s in reversed(self._moments):
            if end_s < at_s:
                share = min(1.0, (at_s - end_s) / (later_end_s - end_s)) if later_end_s > end_s else 1.0
                return moment_s + share * (later_s - moment_s)
            later_end_s, later_s = end_s, moment_s
        return later_s


class EventWriter(Protocol):
    def write(self, events: list[TimedSegment], hearing: StreamSession) -> None: ...

    def close(self) -> None: ...


class JsonWriter:
    """A line for each event, for programs."""

    def write(self, events: list[TimedSegment], hearing: StreamSession) -> None:
        for event in events:
            click.echo(json.dumps(_row(event), ensure_ascii=False, allow_nan=False))

    def close(self) -> None:
        pass


class LineWriter:
    """A line for each segment, when it has ended."""

    def __init__(self) -> None:
        self._words: list[str] = []

    def write(self, events: list[TimedSegment], hearing: StreamSession) -> None:
        for event in events:
            if event.segment.is_final:
                self._words += [word.text for word in event.segment.words]
                if event.segment.is_endpoint:
                    self.close()

    def close(self) -> None:
        words, self._words = self._words, []
        if words:
            click.echo(" ".join(words))


class TerminalWriter:
    """Words as they come, and below them how things stand."""

    def __init__(self) -> None:
        self._screen = LiveDisplay("waiting for sound")

    def write(self, events: list[TimedSegment], hearing: StreamSession) -> None:
        self._screen.update([event.segment for event in events], format_status(hearing))

    def close(self) -> None:
        self._screen.close()


def format_status(hearing: StreamSession) -> str:
    """How much was heard; computing time per time of sound; how late the last words came; what was lost."""
    minutes, seconds = divmod(int(hearing.processed_s), 60)
    clock = f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
    parts = [f"{clock} heard", f"{hearing.compute_s / max(hearing.stream.received_s, 1e-3):.2f}× real time"]
    if hearing.latency_s is not None:
        parts.append(f"{hearing.latency_s:.2f} s behind")
    if hearing.lost_s:
        parts.append(f"{hearing.lost_s:.1f} s lost")
    return " · ".join(parts)


@contextmanager
def stop_on_signal(blocks: BufferedSource) -> Iterator[list[int]]:
    """The first Ctrl-C, or SIGTERM, ends the source, and what came is still heard; the second ends all at once.

    Gives a list, empty until then.
    """
    asked: list[int] = []

    def stop(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        blocks.stop()

    signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {one: signal.getsignal(one) for one in signals}
    ours = [one for one, handler in before.items() if handler != signal.SIG_IGN]
    for one in ours:
        signal.signal(one, stop)
    try:
        yield asked
    finally:
        for one in ours:
            signal.signal(one, before[one] or signal.SIG_DFL)


def _source(
    source: str | None, raw_hz: int | None, simulate: bool, speed: float | None, input_device: str | None
) -> AudioSource:
    from mowa.data.inputs import microphone, network, stdin
    from mowa.data.inputs import source as live

    file = source is not None and source != "-" and "://" not in source
    if simulate and not file:
        raise DataError("--simulate plays a file: name one")
    if speed is not None and not simulate:
        raise DataError("--speed is for --simulate")
    if raw_hz is not None and source != "-":
        raise DataError("--rate is for raw samples from standard input: mowa listen - --rate 8000")
    if input_device is not None and source is not None:
        raise DataError(f"--input-device is a microphone, and {source} is another source: name one of both")
    if source is None:
        return microphone.open_microphone(input_device)
    if source == "-":
        return stdin.open_stdin(raw_hz)
    if not file:
        return network.open_url(source)
    if simulate:
        return live.open_realtime_file(source) if speed is None else live.open_realtime_file(source, speed)
    return live.open_file(source)


def _list_devices() -> int:
    from mowa.cli import output as show
    from mowa.data.inputs import microphone

    there = microphone.list_microphones()
    if not there:
        raise AudioError("there is no microphone here")
    rows = [
        (str(one.number), one.name, str(one.channels), f"{one.rate_hz} Hz", "default" if one.default else "")
        for one in there
    ]
    show.print_table(("number", "name", "channels", "rate", ""), rows)
    return 0


def _output(form: str) -> EventWriter:
    if form == "json":
        return JsonWriter()
    return TerminalWriter() if sys.stdout.isatty() else LineWriter()


def _lost(lost_s: float, dropped_s: float) -> str:
    if not dropped_s:
        return f"{lost_s:.1f} s of sound were lost: what came of them could not be decoded"
    return (
        f"{lost_s:.1f} s of sound were lost: it came faster than it could be heard. Try a smaller model, or --mode"
        " cached with a model that was trained so"
    )


def _shifted(segment: Segment, by_s: float) -> Segment:
    if not by_s:
        return segment
    words = tuple(replace(word, start_s=word.start_s + by_s, end_s=word.end_s + by_s) for word in segment.words)
    return replace(segment, start_s=segment.start_s + by_s, end_s=segment.end_s + by_s, words=words)


def _row(event: TimedSegment) -> dict[str, Any]:
    segment = event.segment
    return {
        "type": "final" if segment.is_final else "partial",
        **_timed_row(segment),
        "ends": segment.is_endpoint,
        "stability": round(segment.stability, 4),
        "words": [_timed_row(word) for word in segment.words],
        "heard_s": round(event.processed_s, 3),
        "latency_s": None if event.latency_s is None else round(event.latency_s, 3),
    }


def _timed_row(item: Segment | Word) -> dict[str, Any]:
    return {
        "text": item.text,
        "start_s": round(item.start_s, 3),
        "end_s": round(item.end_s, 3),
        "confidence": round(item.confidence, 4),
    }
