"""`mowa transcribe`: transcribe audio files to text, JSON or subtitles."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mowa import hardware
from mowa.decode.captions import FORMAT_SUFFIXES
from mowa.engines.registry import engine_choices
from mowa.engines.settings import TranscriptionSettings
from mowa.errors import AudioError, DataError, MowaError

if TYPE_CHECKING:
    from mowa.types import Failure

DEFAULTS = TranscriptionSettings()
MANIFEST_SUFFIXES = {".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow"}
DEFAULT_MODEL_NOTE = "pl-tiny: draft quality, Polish; use --model polish for transcripts to keep"


# fmt: off
@click.command(short_help="Transcribe audio files.")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("-m", "--model", help="Model alias, local folder, or Hub id owner/name[@revision]. [default: the"
              " adapter's base model, else pl-tiny]")
@click.option("--adapter", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Adapter folder written by `mowa train`.")
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
@click.option("--target-lang", metavar="LANG", help="Language of an MMS checkpoint, such as pol.")
@click.option("--offline", is_flag=True, help="Do not contact the Hugging Face Hub; use cached files only.")
@click.option("-f", "--format", "format_name", type=click.Choice(list(FORMAT_SUFFIXES)), default="text",
              show_default=True, help="Output format.")
@click.option("-o", "--out", type=click.Path(path_type=Path),
              help="Write one file per recording into this folder; a file that is there is replaced."
              " [default: standard output]")
@click.option("--results", type=click.Path(path_type=Path), metavar="FILE.jsonl",
              help="Append one JSON line per recording to this file; rerun the same command to resume.")
@click.option("--retry-failed", is_flag=True, help="With --results: transcribe again the recordings that failed.")
@click.option("--shard", metavar="I/N",
              help="With --results: process only every N-th recording, starting at the I-th.")
@click.option("--split", default="",
              help="With --results: split of the corpus. [default: train, or the only split]")
@click.option("--column", "columns", multiple=True, metavar="ROLE=NAME",
              help="With --results: table column to use for audio, id, duration or offset.")
@click.option("--channels", default=DEFAULTS.channels, show_default=True,
              help="mix: average all channels; split: transcribe each channel separately (identical channels once);"
              " or channel numbers, e.g. 0,1.")
@click.option("--decode-threads", type=click.IntRange(min=1),
              help="With --results: number of threads that decode audio ahead. [default: half the cores]")
@click.option("--allow-remote", is_flag=True,
              help="With --results: open remote URLs (s3://…) listed in a manifest.")
@click.option("--ray", metavar="auto|ADDRESS",
              help="With --results: run on the Ray cluster at this address. auto: the running one, else this machine.")
@click.option("--workers", default="1-1000", metavar="N|MIN-MAX",
              help="With --ray: number of worker processes. [default: as many as fit]")
@click.option("--worker-cpus", type=click.FloatRange(min=0.1), default=1.0, show_default=True,
              help="With --ray: CPUs per worker.")
@click.option("--worker-gpus", type=click.FloatRange(min=0), default=0.0, show_default=True,
              help="With --ray: GPUs per worker; 0.5 lets two workers share one.")
@click.option("--engine", type=click.Choice(engine_choices()), default="auto", show_default=True,
              help="Inference engine. auto: the fastest on this machine.")
@click.option("--char-times", is_flag=True, help="Include character timestamps (json, textgrid).")
@click.option("--resample", type=click.Choice(["best", "fast"]), default=DEFAULTS.resample, show_default=True,
              help="Resampling quality.")
@click.option("--batch-s", type=click.FloatRange(min=1), default=DEFAULTS.batch_s, show_default=True,
              help="Seconds of audio per batch, padding included.")
@click.option("--window-s", type=click.FloatRange(min=2), default=DEFAULTS.window_s, show_default=True,
              help="Split recordings longer than this at silences, in seconds.")
@click.option("--context-s", type=click.FloatRange(min=0), default=DEFAULTS.context_s, show_default=True,
              help="Extra audio on both sides of each window, in seconds.")
@click.option("--vad-threshold", type=click.FloatRange(0, 1), default=DEFAULTS.vad_threshold, show_default=True,
              help="Skip windows whose peak speech probability is below this (0 = never skip).")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, …")
@click.option("--dtype", default="auto", show_default=True,
              help="Compute dtype: float32, bfloat16, float16, int8, or auto (the fastest on this machine).")
@click.option("--threads", type=click.IntRange(min=1), help="Number of CPU threads. [default: all available cores]")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def transcribe(
    sources: tuple[str, ...], model: str | None, adapter: Path | None, revision: str | None,
    target_lang: str | None, offline: bool,
    format_name: str, out: Path | None, results: Path | None, retry_failed: bool, shard: str | None, split: str,
    columns: tuple[str, ...], decode_threads: int | None, allow_remote: bool, ray: str | None, workers: str,
    worker_cpus: float, worker_gpus: float, engine: str, char_times: bool, device: str, dtype: str,
    threads: int | None, debug: bool, **settings: Any,
) -> int:
    # fmt: on
    """Transcribe audio files of any common format and sample rate.

    SOURCE is a file or a folder. With --results it may also be a quoted glob pattern, a manifest, a corpus, an archive
    or hub:owner/name, of any size. A file that fails is reported on standard error and the rest are still processed;
    the exit code is then 2.
    """
    hardware.enable_huge_pages()
    from mowa.cli import batch

    if model is None and adapter is None and sys.stderr.isatty():
        click.secho(DEFAULT_MODEL_NOTE, dim=True, err=True)
    settings["channels"] = batch.parse_channels(settings["channels"])
    options: dict[str, Any] = settings | {
        "adapter": adapter, "revision": revision, "target_lang": target_lang, "offline": offline, "engine": engine,
        "device": device, "dtype": dtype, "threads": threads,
    }  # fmt: skip
    shard_index, column_names = batch.parse_shard(shard), batch.parse_columns(columns)
    corpus_options = (retry_failed, shard_index, split, column_names, decode_threads, allow_remote, ray)
    if results is None and any(corpus_options):
        raise DataError(
            "--retry-failed, --shard, --split, --column, --decode-threads, --allow-remote and --ray need --results FILE"
        )
    if results is None:
        debug = debug or click.get_current_context().find_root().params["debug"]
        return _transcribe_files(sources, model, options, out, format_name, char_times, debug)
    if out is not None or format_name != "text" or char_times:
        raise DataError(
            "--results cannot be combined with --out, --format or --char-times: convert the log afterwards with"
            " `mowa results export`"
        )
    from mowa.engines.batch import CorpusSource

    source = CorpusSource(sources, split, column_names, shard_index)
    pool = batch.parse_workers(workers, worker_cpus, worker_gpus)
    return batch.transcribe_batch(
        source, results, model, retry_failed=retry_failed, decode_threads=decode_threads, allow_remote=allow_remote,
        ray=ray or "", workers=pool, **options,
    )  # fmt: skip


def _transcribe_files(
    sources: tuple[str, ...],
    model: str | None,
    options: dict[str, Any],
    out: Path | None,
    format_name: str,
    char_times: bool,
    debug: bool,
) -> int:
    """Transcribe files to standard output or into `out`; return the exit code."""
    import mowa
    from mowa.cli import output
    from mowa.decode import captions
    from mowa.types import Failure

    failures: list[Failure] = []
    files = list(_find_files(sources, failures, debug))
    if out is not None:
        _create_folder(out)
    if not files:
        return 2 if failures else 0
    names = _output_names(files, sources) if out is not None else {}
    with output.audio_progress(_total_duration_s(files)) as bar, output.print_warnings(bar):
        for outcome in mowa.transcribe(files, model, on_progress=bar.update, **options):
            if isinstance(outcome, Failure):
                failures.append(outcome)
                bar.clear()
                _report_failure(outcome, debug)
                continue
            text = captions.render(outcome, format_name, char_times=char_times)
            if out is None:
                bar.clear()
                click.echo(_with_file_name(text, outcome.file, format_name, len(files)), nl=False)
            else:
                _write(out / names[outcome.file], text, FORMAT_SUFFIXES[format_name])
    return 2 if failures else 0


def _find_files(sources: tuple[str, ...], failures: list[Failure], debug: bool) -> Iterator[Path]:
    """Yield every audio file once; a source that does not exist is reported and added to `failures`."""
    from mowa.data import audio
    from mowa.types import Failure

    seen: set[Path] = set()
    for name in sources:
        try:
            if Path(name).suffix.lower() in MANIFEST_SUFFIXES and Path(name).is_file():
                raise AudioError(f"{name}: a manifest or table is transcribed with --results FILE.jsonl")
            found = audio.find_audio_files([name])
        except AudioError as error:
            failures.append(Failure(name, error))
            _report_failure(failures[-1], debug)
            continue
        yield from (file for file in found if file not in seen)
        seen.update(found)


def _total_duration_s(files: list[Path]) -> float | None:
    """Return the total duration for the progress bar; None off a terminal, or where a header does not give it."""
    from mowa.data import audio

    if not sys.stderr.isatty():
        return None
    total_s = 0.0
    for file in files:
        try:
            length_s = audio.probe_audio(file).duration_s
        except MowaError:
            continue
        if length_s is None:
            return None
        total_s += length_s
    return total_s


def _report_failure(failure: Failure, debug: bool) -> None:
    if debug:
        raise failure.error
    click.echo(f"mowa: {failure.error}", err=True)


def _with_file_name(text: str, file: str, format_name: str, count: int) -> str:
    """Prefix plain text with the file name where there are several files."""
    return f"{file}: {text.rstrip()}\n" if format_name == "text" and count > 1 else text


def _create_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: cannot create the output folder ({error.strerror}); choose another --out") from None


def _output_names(files: list[Path], sources: tuple[str, ...]) -> dict[str, Path]:
    """Return file → path below --out without suffix. Folders keep their structure; names are unique."""
    folders = [Path(name) for name in sources if Path(name).is_dir()]
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

    file = stem.with_name(stem.name + suffix)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, text)
    except OSError as error:
        raise DataError(
            f"{file}: cannot be written ({error.strerror}). The files before it are complete: free some space or choose"
            " another --out, and transcribe the rest"
        ) from None
