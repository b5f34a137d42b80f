"""`mowa transcribe`: recordings in, text with times out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mowa import hardware
from mowa.decode.captions import FORMAT_SUFFIXES
from mowa.engines.settings import ENGINES, EngineSpec, TranscriptionSettings
from mowa.errors import AudioError, DataError, MowaError

if TYPE_CHECKING:
    from mowa.engines.transcription import Failure

DEFAULTS = TranscriptionSettings()


# fmt: off
@click.command(short_help="Write down what is said in recordings.")
@click.argument("recordings", nargs=-1, required=True, metavar="SOURCE...")
@click.option("-m", "--model", help="Alias, folder, or hub id owner/name[@revision]. [default: pl-tiny, or what the"
              " adapter was made for]")
@click.option("--adapter", type=click.Path(path_type=Path), metavar="FOLDER",
              help="An adapter of the model, as `mowa train` writes it.")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--offline", is_flag=True, help="Never ask the hub; use what is cached.")
@click.option("-f", "--format", "form", type=click.Choice(list(FORMAT_SUFFIXES)), default="text", show_default=True)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Folder for one file per recording; else standard output."
)
@click.option("--journal", type=click.Path(path_type=Path), metavar="FILE.jsonl",
              help="Write a line for each recording into this file; the same command goes on where it ended.")
@click.option("--retry-failed", is_flag=True, help="With --journal: hear again what failed.")
@click.option("--shard", metavar="I/N", help="With --journal: only every N-th recording, from the I-th on.")
@click.option("--split", default="", help="With --journal: which split of a corpus. [default: train, or the only one]")
@click.option("--column", "columns", multiple=True, metavar="ROLE=NAME",
              help="With --journal: which column of a table is audio, id, duration, offset.")
@click.option("--channels", default=DEFAULTS.channels, show_default=True,
              help="mix: their average; split: each for itself, twins once; or numbers, such as 0,1.")
@click.option("--decoders", type=click.IntRange(min=1),
              help="With --journal: threads that decode ahead. [default: half the cores]")
@click.option("--remote", is_flag=True, help="With --journal: open addresses (s3://…) that a manifest names.")
@click.option("--ray", metavar="auto|ADDRESS",
              help="With --journal: on a Ray cluster; auto: the one that runs, else this machine.")
@click.option("--workers", default="1-1000", metavar="N|MIN-MAX",
              help="With --ray: processes that hear. [default: as many as fit]")
@click.option("--worker-cpus", type=click.FloatRange(min=0.1), default=1.0, show_default=True,
              help="With --ray: processors of each.")
@click.option("--worker-gpus", type=click.FloatRange(min=0), default=0.0, show_default=True,
              help="With --ray: GPUs of each; 0.5: two share one.")
@click.option("--engine", "kind", type=click.Choice(ENGINES), default="auto", show_default=True,
              help="What computes: PyTorch (native) or ONNX Runtime (onnx); auto: what measures fastest here.")
@click.option("--characters", is_flag=True, help="Times of single characters too (json, textgrid).")
@click.option("--resample", type=click.Choice(["best", "fast"]), default=DEFAULTS.resample, show_default=True)
@click.option("--batch-s", type=click.FloatRange(min=1), default=DEFAULTS.batch_s, show_default=True,
              help="Seconds of audio computed together.")
@click.option("--window-s", type=click.FloatRange(min=2), default=DEFAULTS.window_s, show_default=True,
              help="Longer recordings are cut at silences.")
@click.option("--context-s", type=click.FloatRange(min=0), default=DEFAULTS.context_s, show_default=True,
              help="Sound around a window, on both sides.")
@click.option("--speech", type=click.FloatRange(0, 1), default=DEFAULTS.vad_threshold, show_default=True,
              help="Surety of speech that a window needs to be read; 0 reads all.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, …")
@click.option(
    "--dtype", default="auto", show_default=True, help="float32, bfloat16, float16, int8, or what measures fastest."
)
@click.option("--threads", type=click.IntRange(min=1), help="Processor threads. [default: the cores there are]")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def transcribe(
    recordings: tuple[str, ...], model: str | None, adapter: Path | None, revision: str | None, offline: bool,
    form: str, out: Path | None, journal: Path | None, retry_failed: bool, shard: str | None, split: str,
    columns: tuple[str, ...], decoders: int | None, remote: bool, ray: str | None, workers: str,
    worker_cpus: float, worker_gpus: float, kind: str, characters: bool, device: str, dtype: str, threads: int | None,
    debug: bool, **chosen: Any,
) -> int:
    # fmt: on
    """Write down what is said in recordings, in any common format, at any rate.

    SOURCE is a file or a folder. With --journal it may also be a pattern (in quotes), a manifest, a corpus, an archive
    or hub:owner/name, of any size. Bad recordings get a line on standard error, the others go on, and the exit code
    is 2.
    """
    hardware.enable_huge_pages()
    from mowa.cli import batch, output
    from mowa.decode import captions
    from mowa.engines.transcription import Failure, iter_transcripts, load_engine, resolve_base_model

    chosen["channels"] = batch.parse_channels(chosen["channels"])
    wanted = EngineSpec(
        model or resolve_base_model(adapter), adapter, revision, offline, engine=kind, device=device, dtype=dtype, threads=threads
    )
    share, named = batch.parse_shard(shard), batch.parse_columns(columns)
    if journal is None and (retry_failed or share or split or named or decoders or remote or ray):
        raise DataError(
            "--retry-failed, --shard, --split, --column, --decoders, --remote, --ray are for corpora: name a --journal"
        )
    if journal is not None:
        if out is not None or form != "text" or characters:
            raise DataError("--journal writes a journal; `mowa journal export` makes other formats of it")
        from mowa.engines.batch import CorpusSource

        cluster = (ray, batch.parse_workers(workers, worker_cpus, worker_gpus)) if ray else None
        return batch.transcribe_batch(
            CorpusSource(recordings, split, named, share),
            wanted,
            TranscriptionSettings(**chosen),
            journal,
            retry_failed=retry_failed,
            decoders=decoders,
            remote=remote,
            cluster=cluster,
        )
    failures: list[Failure] = []
    debug = debug or click.get_current_context().find_root().params["debug"]
    files = list(_files(recordings, failures, debug))
    if out is not None:
        _writable(out)
    if files:
        engine = load_engine(wanted).engine
        settings = TranscriptionSettings(**chosen)
        names = _names(files, recordings) if out is not None else {}
        with output.audio_progress(_total_s(files)) as bar:
            for outcome in iter_transcripts(files, engine, settings, on_progress=bar.update):
                if isinstance(outcome, Failure):
                    failures.append(outcome)
                    bar.clear()
                    _complain(outcome, debug)
                    continue
                text = captions.render(outcome, form, char_times=characters)
                if out is None:
                    bar.clear()
                    click.echo(_headed(text, outcome.file, form, len(files)), nl=False)
                else:
                    _write(out / names[outcome.file], text, FORMAT_SUFFIXES[form])
    return 2 if failures else 0


def _files(recordings: tuple[str, ...], failures: list[Failure], debug: bool) -> Iterator[Path]:
    """Every recording once; a name that leads nowhere is a failure of its own."""
    from mowa.data import audio
    from mowa.engines.transcription import Failure

    seen: set[Path] = set()
    for name in recordings:
        try:
            found = audio.find_audio_files([name])
        except AudioError as wrong:
            failures.append(Failure(name, wrong))
            _complain(failures[-1], debug)
            continue
        yield from (file for file in found if file not in seen)
        seen.update(found)


def _total_s(files: list[Path]) -> float | None:
    """Length of everything, for the bar: where somebody looks, and every header says. Broken files count nothing."""
    from mowa.data import audio

    if not sys.stderr.isatty():
        return None
    total = 0.0
    for file in files:
        try:
            length = audio.probe_audio(file).duration_s
        except MowaError:
            continue
        if length is None:
            return None
        total += length
    return total


def _complain(failure: Failure, debug: bool) -> None:
    if debug:
        raise failure.error
    click.echo(f"mowa: {failure.error}", err=True)


def _headed(text: str, file: str, form: str, count: int) -> str:
    """Plain text of several recordings is told apart by their names; the other formats carry or need none."""
    return f"{file}: {text.rstrip()}\n" if form == "text" and count > 1 else text


def _writable(out: Path) -> None:
    from mowa.errors import DataError

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as wrong:
        raise DataError(f"{out}: cannot be used as the output folder ({wrong.strerror}); choose another") from None


def _names(files: list[Path], recordings: tuple[str, ...]) -> dict[str, Path]:
    """Where each transcript goes under --out: folders keep their shape, and no two recordings share a name."""
    folders = [Path(name) for name in recordings if Path(name).is_dir()]
    names: dict[str, Path] = {}
    taken: set[Path] = set()
    for file in files:
        inside = next((file.relative_to(folder) for folder in folders if file.is_relative_to(folder)), Path(file.name))
        stem = inside.with_suffix("")
        if stem in taken:
            stem = inside  # talk.mp3 beside talk.wav: keep the suffix
        number = 2
        while stem in taken:
            stem, number = inside.with_name(f"{inside.name}-{number}"), number + 1
        taken.add(stem)
        names[str(file)] = stem
    return names


def _write(stem: Path, text: str, suffix: str) -> None:
    from mowa.io.atomic import atomic_write

    stem.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(stem.with_name(stem.name + suffix), text)
