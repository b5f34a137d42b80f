"""`mowa transcribe --results`: transcribe a corpus into a results log, resumable and optionally on a Ray cluster."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import click

from mowa.errors import DataError, MowaError

if TYPE_CHECKING:
    from mowa.engines.batch import CorpusSource
    from mowa.engines.results import ResultsFile
    from mowa.engines.selection import EngineChoice
    from mowa.engines.settings import WorkerPool
    from mowa.types import Failure


def transcribe_batch(source: CorpusSource, path: Path, model: str | None, **options: Any) -> int:
    """Run `mowa.transcribe_corpus` with a progress bar. Return the exit code: 2 if any recording failed, else 0."""
    import mowa
    from mowa.cli import output

    stop = Event()
    done: Collection[str] = ()

    def on_open(choice: EngineChoice, log: ResultsFile) -> None:
        nonlocal done
        done = log.done_ids
        if options["engine"] == "auto":
            click.echo(choice.reason, err=True)
        if done:
            click.echo(f"{path}: resuming, {len(done)} recordings are already in it", err=True)
        if sys.stderr.isatty():
            Thread(target=_sum_durations, args=(source, frozenset(done), bar, stop), daemon=True).start()

    def on_failure(failure: Failure) -> None:
        bar.clear()
        click.echo(f"mowa: {failure.error}", err=True)

    callbacks: Any = {"on_open": on_open, "on_failure": on_failure}
    parts: Any = {"split": source.split, "columns": source.columns, "shard": source.shard}
    with output.audio_progress(None) as bar, output.print_warnings(bar):
        try:
            found = mowa.transcribe_corpus(
                source.sources, path, model, on_progress=bar.update, **parts, **callbacks, **options
            )
        except KeyboardInterrupt:
            click.echo(f"{path}: {len(done)} recordings are in it; rerun the command to resume", err=True)
            raise
        finally:
            stop.set()
    click.echo(f"{path}: {found.recordings} recordings, {found.failed} failed", err=True)
    return 2 if found.failed else 0


def _sum_durations(source: CorpusSource, done_ids: frozenset[str], bar: Any, stop: Event) -> None:
    """Set the bar's total to the seconds that remain, if every file's header gives its duration."""
    from mowa.cli import output
    from mowa.data import audio

    total_s = 0.0
    try:
        for example in source.examples():
            if stop.is_set():
                return
            if example.id in done_ids:
                continue
            length_s = example.duration_s
            if not length_s and example.audio_bytes is None:
                try:
                    length_s = audio.probe_audio(example.audio).duration_s or 0.0
                except MowaError:
                    continue
            if not length_s:
                return
            total_s += length_s
    except MowaError:
        return  # the main thread lists the same examples and reports the error
    output.set_progress_total(bar, total_s)


def parse_shard(value: str | None) -> tuple[int, int] | None:
    """Parse `2/4` into (2, 4). Raises DataError for anything else."""
    if value is None:
        return None
    index, slash, count = value.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise DataError(f"--shard {value}: expected I/N with 1 ≤ I ≤ N, e.g. 1/4 for the first of four shards")
    return int(index), int(count)


def parse_workers(value: str, num_cpus: float, num_gpus: float) -> WorkerPool:
    """Parse `4` or `1-8` into a pool whose workers use `num_cpus` and `num_gpus` each. Raises DataError otherwise."""
    from mowa.engines.settings import WorkerPool

    low, dash, high = value.partition("-")
    if not (low.isdecimal() and (high.isdecimal() or not dash) and 1 <= int(low) <= int(high or low)):
        raise DataError(f"--workers {value}: expected a number, e.g. 4, or a range, e.g. 1-8")
    return WorkerPool(int(low), int(high or low), num_cpus, num_gpus)


def parse_columns(values: Sequence[str]) -> dict[str, str]:
    """Parse `audio=clip` … into role → column. Raises DataError for a value without `=`."""
    columns = dict(value.partition("=")[::2] for value in values)
    if invalid := next((value for value in values if "=" not in value), None):
        raise DataError(f"--column {invalid}: expected ROLE=NAME, e.g. audio=path or id=clip_id")
    return columns


def parse_channels(value: str) -> str:
    """Return `value` if it is mix, split, or channel numbers separated by commas. Raises DataError otherwise."""
    if value in ("mix", "split") or all(part.isdecimal() for part in value.split(",")):
        return value
    raise DataError(f"--channels {value}: expected mix, split, or channel numbers, e.g. 0 or 0,1")
