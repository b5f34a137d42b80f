"""What `mowa transcribe --journal` does: a whole corpus, into one file that can be gone on with."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import click

from mowa.errors import DataError, MowaError

if TYPE_CHECKING:
    from mowa.engines.batch import CorpusSource
    from mowa.engines.pipeline import Failure
    from mowa.engines.results import ResultsFile
    from mowa.engines.settings import EngineSpec, TranscriptionSettings, WorkerPool


def transcribe_batch(
    source: CorpusSource,
    wanted: EngineSpec,
    settings: TranscriptionSettings,
    journal: Path,
    *,
    retry_failed: bool,
    decoders: int | None,
    remote: bool,
    cluster: tuple[str, WorkerPool] | None,
) -> int:
    """→ 0, or 2 where anything in the journal failed. cluster: an address of Ray, and what is asked of it."""
    from mowa.engines import batch
    from mowa.engines.results import ResultsFile
    from mowa.engines.transcription import load_engine

    choice = load_engine(wanted)
    engine = choice.engine
    if wanted.engine == "auto":
        click.echo(choice.reason, err=True)
    shard = source.shard
    header = batch.build_header(
        engine, settings, adapter=wanted.adapter, shard=f"{shard[0]}/{shard[1]}" if shard else ""
    )
    with ResultsFile.open(journal, header, retry_failed=retry_failed) as book:
        before = len(book.done_ids)
        if before:
            click.echo(f"{journal}: {before} are in it already", err=True)
        try:
            with _progress(source, book.done_ids) as bar:

                def failed(failure: Failure) -> None:
                    bar.clear()
                    click.echo(f"mowa: {failure.error}", err=True)

                how: Any = {"remote": remote, "heard": bar.update, "failed": failed}
                if cluster is None:
                    batch.transcribe_corpus(source.examples(), engine, settings, book, decode_threads=decoders, **how)
                else:
                    _spread(
                        source, replace(wanted, engine=engine.name, dtype=engine.dtype), settings, book, cluster, how
                    )
        except KeyboardInterrupt:
            click.echo(f"{journal}: {len(book.done_ids)} are in it; the same command goes on", err=True)
            raise
        click.echo(f"{journal}: {len(book.done_ids)} in it, {book.num_failed} of them failed", err=True)
        return 2 if book.num_failed else 0


def _spread(
    source: CorpusSource,
    wanted: EngineSpec,
    settings: TranscriptionSettings,
    book: ResultsFile,
    cluster: tuple[str, WorkerPool],
    how: Any,
) -> None:
    from mowa.engines import ray_data as room

    address, workers = cluster
    room.transcribe_on_ray(source, wanted, settings, book, address=address, workers=workers, **how)


@contextmanager
def _progress(source: CorpusSource, done: set[str]) -> Iterator[Any]:
    """The bar. How much there is to hear is counted beside the work, where somebody looks."""
    from mowa.cli import output

    stop = Event()
    with output.audio_progress(None) as bar:
        if sys.stderr.isatty():
            Thread(target=_count, args=(source, frozenset(done), bar, stop), daemon=True).start()
        try:
            yield bar
        finally:
            stop.set()


def _count(source: CorpusSource, done: frozenset[str], bar: Any, stop: Event) -> None:
    """Set the bar's total to the seconds that are not done, unless that is not to be had from headers."""
    from mowa.cli import output
    from mowa.data import audio

    total = 0.0
    try:
        for example in source.examples():
            if stop.is_set():
                return
            if example.id in done:
                continue
            length_s = example.duration_s
            if not length_s and example.audio_bytes is None:
                try:
                    length_s = audio.probe_audio(example.audio).duration_s or 0.0
                except MowaError:
                    continue
            if not length_s:
                return
            total += length_s
    except MowaError:
        return  # the work will say so
    output.set_progress_total(bar, total)


def parse_shard(value: str | None) -> tuple[int, int] | None:
    """`2/4` → (2, 4). DataError for anything else."""
    if value is None:
        return None
    index, slash, count = value.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise DataError(f"--shard {value}: is no share of a whole. Say 1/4 for the first of four.")
    return int(index), int(count)


def parse_workers(value: str, cpus: float, gpus: float) -> WorkerPool:
    """`4` or `1-8` (as the cluster has room), with what each takes. DataError for anything else."""
    from mowa.engines.settings import WorkerPool

    least, dash, most = value.partition("-")
    if not (least.isdecimal() and (most.isdecimal() or not dash) and 1 <= int(least) <= int(most or least)):
        raise DataError(f"--workers {value}: say how many, such as 4, or at least and at most, such as 1-8.")
    return WorkerPool(int(least), int(most or least), cpus, gpus)


def parse_columns(values: Sequence[str]) -> dict[str, str]:
    """`audio=clip` … → role: column. DataError for what is none."""
    named = dict(value.partition("=")[::2] for value in values)
    if wrong := next((value for value in values if "=" not in value), None):
        raise DataError(f"--column {wrong}: names no column. Say audio=NAME, id=NAME, …")
    return named


def parse_channels(value: str) -> str:
    """mix, split, or numbers with commas. DataError for anything else."""
    if value in ("mix", "split") or all(part.isdecimal() for part in value.split(",")):
        return value
    raise DataError(f"--channels {value}: say mix, split, or numbers such as 0 or 0,1.")
