"""`mowa listen`: transcribe live audio from a microphone, a URL, standard input or a file as it arrives."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from mowa import hardware
from mowa.cli.live_display import LiveDisplay
from mowa.data.audio.decoders import RATE_RANGE_HZ
from mowa.data.inputs.source import AudioSource, BufferedSource
from mowa.data.inputs.stdin import RAW_ENCODINGS, RAW_RATE_HZ
from mowa.decode.ctc import join_words
from mowa.decode.stream import DEFAULT_ENDPOINTING
from mowa.engines.registry import ENGINES
from mowa.engines.settings import EngineSpec
from mowa.errors import AudioError, DataError
from mowa.types import Segment, Word

if TYPE_CHECKING:
    from mowa.engines.streaming import StreamSession, TimedSegment

DEFAULTS = EngineSpec("")


# fmt: off
@click.command(short_help="Transcribe live audio as it arrives.")
@click.argument("source", required=False)
@click.option("-m", "--model", help="Model alias, local folder, or Hub id owner/name[@revision]. [default: the"
              " adapter's base model, else pl-tiny]")
@click.option("--adapter", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Adapter folder written by `mowa train`.")
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
@click.option("--target-lang", metavar="LANG", help="Language of an MMS checkpoint, such as pol.")
@click.option("--offline", is_flag=True, help="Do not contact the Hugging Face Hub; use cached files only.")
@click.option("-f", "--format", "format_name", type=click.Choice(["text", "json"]), default="text", show_default=True,
              help="text: final words, with partial words dimmed on a terminal; json: one JSON object per event.")
@click.option("--input-device", metavar="NUMBER|NAME", help="Microphone to use. [default: the system's default]")
@click.option("--list-devices", is_flag=True, help="List microphones and exit.")
@click.option("--sample-rate", type=click.IntRange(*RATE_RANGE_HZ), metavar="HZ",
              help=f"Sample rate of raw mono input on standard input. [default: {RAW_RATE_HZ}; of mulaw and alaw 8000]")
@click.option("--encoding", type=click.Choice([*RAW_ENCODINGS]),
              help="Encoding of raw input on standard input: 16-bit PCM, or G.711 as in telephony. [default: s16le]")
@click.option("--realtime", is_flag=True, help="Read a file at its recorded speed instead of as fast as possible.")
@click.option("--speed", type=click.FloatRange(min=0, min_open=True), help="With --realtime: playback speed factor.")
@click.option("--mode", type=click.Choice(["auto", "cached", "window"]),
              help="cached: cache-aware streaming, for models trained with chunked attention; window: re-encode each"
              " chunk with its context, for any model. [default: auto: cached if the model supports it]")
@click.option("--chunk-s", type=click.FloatRange(min=0, min_open=True),
              help="Audio per chunk, in seconds. [default: depends on --mode]")
@click.option("--left-context-s", type=click.FloatRange(min=0),
              help="Left context per chunk, in seconds. [default: depends on --mode]")
@click.option("--lookahead-s", type=click.FloatRange(min=0),
              help="Look-ahead per chunk, in seconds; adds this much latency. [default: depends on --mode]")
@click.option("--min-silence-s", type=click.FloatRange(min=0), default=DEFAULT_ENDPOINTING.min_silence_s,
              show_default=True, help="Silence that ends a segment, in seconds.")
@click.option("--max-segment-s", type=click.FloatRange(min=0), default=DEFAULT_ENDPOINTING.max_segment_s,
              show_default=True, help="End a segment at the next word after this many seconds.")
@click.option("--no-vad", is_flag=True, help="Transcribe everything; do not run voice activity detection.")
@click.option("--engine", type=click.Choice(ENGINES.names()),
              help="Inference engine. [default: pytorch; for an export, its own]")
@click.option("--device", default=DEFAULTS.device, show_default=True, help="cpu, cuda, cuda:1, …")
@click.option("--dtype", default=DEFAULTS.dtype, show_default=True,
              help="Compute dtype: float32, bfloat16, float16, int8, or auto (the fastest on this machine).")
@click.option("--threads", type=click.IntRange(min=1), help="Number of CPU threads. [default: all available cores]")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def listen(
    source: str | None, model: str | None, adapter: Path | None, revision: str | None,
    target_lang: str | None, offline: bool, format_name: str,
    input_device: str | None, list_devices: bool, sample_rate: int | None, encoding: str | None,
    realtime: bool, speed: float | None,
    min_silence_s: float, max_segment_s: float, no_vad: bool, engine: str | None, device: str, dtype: str,
    threads: int | None, debug: bool, **streaming_options: Any,
) -> int:
    # fmt: on
    """Transcribe live audio as it arrives.

    SOURCE is - for standard input (an audio file or raw samples), a URL (http://…, rtp://…) or a file; without one, the
    microphone is used. Final words never change; partial results (dim on a terminal, type partial in JSON) may.

    Ctrl-C or SIGTERM stops the source and transcribes what has arrived. The exit code is then 0 for microphones and
    URLs, and 130 for files and standard input. A shell starts background jobs with Ctrl-C ignored: stop those with
    SIGTERM (`kill PID`).
    """
    if list_devices:
        return _list_devices()
    hardware.enable_huge_pages()
    audio_source = _open_source(source, sample_rate, encoding, realtime, speed, input_device)
    import mowa
    from mowa.engines.streaming import StreamSession

    endpointing = replace(
        DEFAULT_ENDPOINTING, min_silence_s=min_silence_s, max_segment_s=max_segment_s, vad=not no_vad
    )
    given = {key: value for key, value in streaming_options.items() if value is not None}
    stream = mowa.stream(
        model, adapter=adapter, revision=revision, target_lang=target_lang, offline=offline, engine=engine or "",
        device=device, dtype=dtype, threads=threads, endpointing=endpointing, **given,
    )  # fmt: skip
    session = StreamSession(stream)
    blocks = BufferedSource(audio_source, session.stream.encoder.rate_hz)
    with stop_on_signal(blocks) as stopped, blocks:
        writer = _event_writer(format_name)
        try:
            for events in session.events(blocks):
                writer.write(events, session)
        finally:
            writer.close()
            if session.lost_s:
                click.echo(f"mowa: {_lost_audio_message(session.lost_s, blocks.dropped_s)}", err=True)
    return 130 if stopped and audio_source.finite else 0


class EventWriter(Protocol):
    """Writes the events of a session to standard output."""

    def write(self, events: list[TimedSegment], session: StreamSession) -> None: ...

    def close(self) -> None: ...


class JsonWriter:
    """Write one JSON object per event."""

    def write(self, events: list[TimedSegment], session: StreamSession) -> None:
        for event in events:
            click.echo(json.dumps(_event_dict(event), ensure_ascii=False, allow_nan=False))

    def close(self) -> None:
        pass


class LineWriter:
    """Write one line per segment, when the segment has ended."""

    def __init__(self) -> None:
        self._words: list[Word] = []

    def write(self, events: list[TimedSegment], session: StreamSession) -> None:
        for event in events:
            if event.segment.is_final:
                self._words += event.segment.words
                if event.segment.is_endpoint:
                    self.close()

    def close(self) -> None:
        words, self._words = self._words, []
        if words:
            click.echo(join_words(words))


class TerminalWriter:
    """Show words on a terminal as they come, with a status line below them."""

    def __init__(self) -> None:
        self._display = LiveDisplay("waiting for audio")

    def write(self, events: list[TimedSegment], session: StreamSession) -> None:
        self._display.update([event.segment for event in events], format_status(session))

    def close(self) -> None:
        self._display.close()


def format_status(session: StreamSession) -> str:
    """Return the status line: audio processed, real-time factor, latency of the latest words, audio lost."""
    minutes, seconds = divmod(int(session.processed_s), 60)
    clock = f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
    parts = [f"{clock} processed", f"RTF {session.compute_s / max(session.stream.received_s, 1e-3):.2f}"]
    if session.latency_s is not None:
        parts.append(f"{session.latency_s:.2f} s latency")
    if session.lost_s:
        parts.append(f"{session.lost_s:.1f} s lost")
    return " · ".join(parts)


@contextmanager
def stop_on_signal(blocks: BufferedSource) -> Iterator[list[int]]:
    """Stop the source at the first SIGINT or SIGTERM, so that the audio that has arrived is still transcribed.

    A second signal raises KeyboardInterrupt. A signal that the parent process ignores, as a shell does with SIGINT for
    background jobs, stays ignored. Yield the list of signals received, empty until then.
    """
    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        blocks.stop()

    signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    previous = {number: signal.getsignal(number) for number in signals}
    handled = [number for number, handler in previous.items() if handler != signal.SIG_IGN]
    for number in handled:
        signal.signal(number, stop)
    try:
        yield received
    finally:
        for number in handled:
            signal.signal(number, previous[number] or signal.SIG_DFL)


def _open_source(
    source: str | None, sample_rate: int | None, encoding: str | None, realtime: bool, speed: float | None,
    input_device: str | None,
) -> AudioSource:
    from mowa.data.inputs import microphone, network, stdin
    from mowa.data.inputs.source import open_file, open_realtime_file

    is_file = source is not None and source != "-" and "://" not in source
    if realtime and not is_file:
        raise DataError("--realtime needs an audio file as SOURCE")
    if speed is not None and not realtime:
        raise DataError("--speed needs --realtime")
    for flag, value in (("--sample-rate 8000", sample_rate), ("--encoding mulaw", encoding)):
        if value is not None and source != "-":
            raise DataError(f"{flag.split()[0]} is for raw samples on standard input: mowa listen - {flag}")
    if input_device is not None and source is not None:
        raise DataError(f"--input-device selects a microphone, but SOURCE is {source}: give one of them")
    if source is None:
        return microphone.open_microphone(input_device)
    if source == "-":
        return stdin.open_stdin(sample_rate, encoding or "s16le")
    if not is_file:
        return network.open_url(source)
    if realtime:
        return open_realtime_file(source) if speed is None else open_realtime_file(source, speed)
    return open_file(source)


def _list_devices() -> int:
    from mowa.cli.output import print_table
    from mowa.data.inputs.microphone import list_microphones

    devices = list_microphones()
    if not devices:
        raise AudioError("no microphone found")
    rows = [
        (str(one.number), one.name, str(one.channels), f"{one.rate_hz} Hz", "default" if one.default else "")
        for one in devices
    ]
    print_table(("number", "name", "channels", "rate", ""), rows)
    return 0


def _event_writer(format_name: str) -> EventWriter:
    if format_name == "json":
        return JsonWriter()
    return TerminalWriter() if sys.stdout.isatty() else LineWriter()


def _lost_audio_message(lost_s: float, dropped_s: float) -> str:
    if not dropped_s:
        return f"{lost_s:.1f} s of audio were lost: they were not sent, or could not be decoded"
    return (
        f"{lost_s:.1f} s of audio were lost: transcription is slower than real time. Use a smaller model, or --mode"
        " cached with a streaming model"
    )


def _event_dict(event: TimedSegment) -> dict[str, Any]:
    segment = event.segment
    return {
        "type": "final" if segment.is_final else "partial",
        **_timed_dict(segment),
        "end_of_segment": segment.is_endpoint,
        "stability": round(segment.stability, 4),
        "words": [_timed_dict(word) | ({} if word.space_before else {"space_before": False}) for word in segment.words],
        "processed_s": round(event.processed_s, 3),
        "latency_s": None if event.latency_s is None else round(event.latency_s, 3),
    }


def _timed_dict(item: Segment | Word) -> dict[str, Any]:
    return {
        "text": item.text,
        "start_s": round(item.start_s, 3),
        "end_s": round(item.end_s, 3),
        "confidence": round(item.confidence, 4),
    }
