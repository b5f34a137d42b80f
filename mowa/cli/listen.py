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

from mowa import machine
from mowa.cli.screen import Screen
from mowa.data.decoders import RATE_RANGE_HZ
from mowa.data.live import Block, Bounded, Source
from mowa.data.piped import RAW_HZ
from mowa.decode.stream import RULES, Stream
from mowa.engines.settings import Wanted
from mowa.errors import AudioError, DataError
from mowa.nouns import Segment, Word

ASKED = Wanted("")


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
              help=f"Of raw samples from standard input: 16 bits, one channel. [default: {RAW_HZ}]")
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
@click.option("--pause-s", type=click.FloatRange(min=0), default=RULES.pause_s, show_default=True,
              help="Quiet that ends a segment.")
@click.option("--longest-s", type=click.FloatRange(min=0), default=RULES.longest_s, show_default=True,
              help="A longer segment ends at its next word.")
@click.option("--no-detect", is_flag=True, help="Hear all that comes, without looking for speech in it.")
@click.option("--engine", "kind", type=click.Choice(["native", "onnx"]), default=ASKED.engine, show_default=True,
              help="What computes: PyTorch (native) or ONNX Runtime (onnx).")
@click.option("--device", default=ASKED.device, show_default=True, help="cpu, cuda, cuda:1, …")
@click.option(
    "--dtype", default=ASKED.dtype, show_default=True, help="float32, bfloat16, float16, int8, or what measures"
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
    machine.huge_pages()
    sound = _source(source, raw_hz, simulate, speed, input_device)
    from mowa.engines import live
    from mowa.engines.transcription import base_of, opened

    wanted = Wanted(
        model or base_of(adapter), adapter, revision, offline, engine=kind, device=device, dtype=dtype, threads=threads
    )
    rules = replace(RULES, pause_s=pause_s, longest_s=longest_s, detect=not no_detect)
    given = live.Live(**{name: value for name, value in how.items() if value is not None})
    hearing = Hearing(live.stream(opened(wanted).engine, given, rules))
    blocks = Bounded(sound, hearing.stream.listener.rate_hz)
    with stoppable(blocks) as stopped, blocks:
        output = _output(form)
        try:
            for events in hearing.events(blocks):
                output.show(events, hearing)
        finally:
            output.end()
            if hearing.lost_s:
                click.echo(f"mowa: {_lost(hearing.lost_s, blocks.dropped_s)}", err=True)
    return 130 if stopped and sound.ends else 0


@dataclass(frozen=True, slots=True)
class Event:
    """A segment, with times of the source. `latency_s`: how long ago the end of its last word was recorded; None
    without words."""

    segment: Segment
    heard_s: float
    latency_s: float | None


class Hearing:
    """A stream that is fed with blocks. It knows when each was recorded, how long computing took, and what was lost.

    Where sound was lost the stream is flushed, and all that follows is later by what was lost.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.computed_s = self.lost_s = 0.0
        self.latency_s: float | None = None  # of the last words
        self._moments: deque[tuple[float, float]] = deque(maxlen=8192)  # ends of blocks, and when they were recorded

    @property
    def heard_s(self) -> float:
        return self.stream.heard_s + self.lost_s

    def events(self, blocks: Bounded) -> Iterator[list[Event]]:
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

    def _fed(self, block: Block) -> list[Event]:
        before = []
        if block.lost_s:
            before = self._timed(time.monotonic(), self.stream.flush())
            self.lost_s += block.lost_s
        begun_s = time.monotonic()
        found = self.stream.feed(block.samples)
        if len(block.samples):
            self._moments.append((self.heard_s, block.recorded_s))
        return before + self._timed(begun_s, found)

    def _timed(self, begun_s: float, found: list[Segment]) -> list[Event]:
        now_s = time.monotonic()
        self.computed_s += now_s - begun_s
        events = []
        for segment in found:
            late = _later(segment, self.lost_s)
            latency_s = max(0.0, now_s - self._recorded_s(late.end_s)) if late.words else None
            self.latency_s = self.latency_s if latency_s is None else latency_s
            events.append(Event(late, self.heard_s, latency_s))
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


class Output(Protocol):
    def show(self, events: list[Event], hearing: Hearing) -> None: ...

    def end(self) -> None: ...


class Json:
    """A line for each event, for programs."""

    def show(self, events: list[Event], hearing: Hearing) -> None:
        for event in events:
            click.echo(json.dumps(_row(event), ensure_ascii=False, allow_nan=False))

    def end(self) -> None:
        pass


class Lines:
    """A line for each segment, when it has ended."""

    def __init__(self) -> None:
        self._words: list[str] = []

    def show(self, events: list[Event], hearing: Hearing) -> None:
        for event in events:
            if event.segment.final:
                self._words += [word.text for word in event.segment.words]
                if event.segment.ends:
                    self.end()

    def end(self) -> None:
        words, self._words = self._words, []
        if words:
            click.echo(" ".join(words))


class Terminal:
    """Words as they come, and below them how things stand."""

    def __init__(self) -> None:
        self._screen = Screen("waiting for sound")

    def show(self, events: list[Event], hearing: Hearing) -> None:
        self._screen.show([event.segment for event in events], status(hearing))

    def end(self) -> None:
        self._screen.end()


def status(hearing: Hearing) -> str:
    """How much was heard; computing time per time of sound; how late the last words came; what was lost."""
    minutes, seconds = divmod(int(hearing.heard_s), 60)
    clock = f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
    parts = [f"{clock} heard", f"{hearing.computed_s / max(hearing.stream.heard_s, 1e-3):.2f}× real time"]
    if hearing.latency_s is not None:
        parts.append(f"{hearing.latency_s:.2f} s behind")
    if hearing.lost_s:
        parts.append(f"{hearing.lost_s:.1f} s lost")
    return " · ".join(parts)


@contextmanager
def stoppable(blocks: Bounded) -> Iterator[list[int]]:
    """The first Ctrl-C, or SIGTERM, ends the source, and what came is still heard; the second ends all at once.

    Gives a list, empty until then.
    """
    asked: list[int] = []

    def stop(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        blocks.finish()

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
) -> Source:
    from mowa.data import live, microphones, piped

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
        return microphones.microphone(input_device)
    if source == "-":
        return piped.standard_input(raw_hz)
    if not file:
        return live.address(source)
    if simulate:
        return live.simulated(source) if speed is None else live.simulated(source, speed)
    return live.recording(source)


def _list_devices() -> int:
    from mowa.cli import show
    from mowa.data import microphones

    there = microphones.devices()
    if not there:
        raise AudioError("there is no microphone here")
    rows = [
        (str(one.number), one.name, str(one.channels), f"{one.rate_hz} Hz", "default" if one.default else "")
        for one in there
    ]
    show.table(("number", "name", "channels", "rate", ""), rows)
    return 0


def _output(form: str) -> Output:
    if form == "json":
        return Json()
    return Terminal() if sys.stdout.isatty() else Lines()


def _lost(lost_s: float, dropped_s: float) -> str:
    if not dropped_s:
        return f"{lost_s:.1f} s of sound were lost: what came of them could not be decoded"
    return (
        f"{lost_s:.1f} s of sound were lost: it came faster than it could be heard. Try a smaller model, or --mode"
        " cached with a model that was trained so"
    )


def _later(segment: Segment, by_s: float) -> Segment:
    if not by_s:
        return segment
    words = tuple(replace(word, start_s=word.start_s + by_s, end_s=word.end_s + by_s) for word in segment.words)
    return replace(segment, start_s=segment.start_s + by_s, end_s=segment.end_s + by_s, words=words)


def _row(event: Event) -> dict[str, Any]:
    segment = event.segment
    return {
        "type": "final" if segment.final else "partial",
        **_timed_row(segment),
        "ends": segment.ends,
        "stability": round(segment.stability, 4),
        "words": [_timed_row(word) for word in segment.words],
        "heard_s": round(event.heard_s, 3),
        "latency_s": None if event.latency_s is None else round(event.latency_s, 3),
    }


def _timed_row(item: Segment | Word) -> dict[str, Any]:
    return {
        "text": item.text,
        "start_s": round(item.start_s, 3),
        "end_s": round(item.end_s, 3),
        "confidence": round(item.confidence, 4),
    }
