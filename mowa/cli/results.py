"""`mowa results`: inspect, merge and convert the results logs that `mowa transcribe --results` writes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

import click

from mowa.decode.captions import FORMAT_SUFFIXES
from mowa.errors import DataError


@click.group(short_help="Inspect, merge and convert results logs.")
def results() -> None:
    """Inspect, merge and convert the results logs that `mowa transcribe --results` writes."""


@results.command()
@click.argument("file", type=click.Path(path_type=Path))
def show(file: Path) -> None:
    """Summarise a results log: model, settings, hours transcribed, and errors by type."""
    from mowa.cli.output import print_table
    from mowa.engines.results import read_header, read_records

    header = read_header(file)
    num_transcribed, seconds, reasons = 0, 0.0, Counter[str]()
    for record in read_records(file):
        if "error" in record:
            reasons[_reason(record)] += 1
        else:
            num_transcribed, seconds = num_transcribed + 1, seconds + record["duration_s"]
    model = header["model"]
    rows = [
        ["model", f"{model['source']}@{model['revision']}" if model.get("revision") else str(model["name"])],
        ["settings", ", ".join(f"{key} {value}" for key, value in header["settings"].items())],
        ["versions", ", ".join(f"{name} {version}" for name, version in header["versions"].items())],
        *([["shard", header["shard"]]] if header.get("shard") else []),
        ["transcribed", f"{num_transcribed:,}, {seconds / 3600:.2f} h"],
        ["failed", f"{sum(reasons.values()):,}"],
        *(["", f"{count:,} × {reason}"] for reason, count in reasons.most_common(10)),
    ]
    print_table(["results", str(file)], rows)


def _reason(record: dict[str, Any]) -> str:
    """Return the error without the file name, so that equal errors are counted together."""
    name = record["file"]
    return str(record["error"]).removeprefix(f"{name}: ").removeprefix(f"{name!r}: ")


@results.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Results log to write.")
def merge(files: tuple[Path, ...], out: Path) -> None:
    """Merge the results logs of several shards.

    Each id is kept once; it counts as failed only if it failed in every log.
    """
    from mowa.engines.results import merge_results, rewrite_results

    if out.exists():
        raise DataError(f"{out}: already exists. Choose another name, or delete it.")
    header, records = merge_results(files)
    with rewrite_results(out, header) as write:
        for record in records:
            write(record)
    click.echo(str(out))


# fmt: off
@results.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-f", "--format", "format_name", type=click.Choice(list(FORMAT_SUFFIXES)), default="text",
              show_default=True, help="Output format.")
@click.option("-o", "--out", type=click.Path(path_type=Path),
              help="Write one file per recording into this folder. [default for text and json: standard output]")
def export(file: Path, format_name: str, out: Path | None) -> None:
    # fmt: on
    """Convert a results log to transcript files.

    Failed recordings are skipped and counted on standard error.
    """
    from mowa.decode import captions
    from mowa.engines.results import parse_transcript, read_header, read_records
    from mowa.io.atomic import atomic_write

    if out is None and format_name not in ("text", "json"):
        raise DataError(f"--format {format_name} writes one file per recording: name a folder with --out")
    header = read_header(file)
    num_failed = 0
    for record in read_records(file):
        if "error" in record:
            num_failed += 1
            continue
        text = captions.render(parse_transcript(record, header), format_name)
        if out is None:
            click.echo(f"{record['id']}\t{record['text']}\n" if format_name == "text" else text, nl=False)
            continue
        name = out / _relative_path(record["id"])
        name.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(name.with_name(name.name + FORMAT_SUFFIXES[format_name]), text)
    if num_failed:
        click.echo(f"{file}: skipped {num_failed} failed recordings", err=True)


def _relative_path(name: str) -> PurePosixPath:
    """Return an id as a relative path without `..`."""
    parts = [part for part in PurePosixPath(name).parts if part not in ("/", "..")]
    return PurePosixPath(*(parts or ["unnamed"]))
