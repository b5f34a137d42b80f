"""`mowa journal`: what a corpus run wrote down, looked at, put together, and written as captions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

import click

from mowa.decode.captions import FORMAT_SUFFIXES
from mowa.errors import DataError


@click.group(short_help="Look into, merge and export what a corpus run wrote.")
def results() -> None:
    """Look into, merge and export the journals that `mowa transcribe --journal` writes."""


@results.command()
@click.argument("file", type=click.Path(path_type=Path))
def show(file: Path) -> None:
    """Say what is in a journal: how much was heard, by what, and what went wrong."""
    from mowa.cli.output import print_table
    from mowa.engines import results as room

    header = room.read_header(file)
    done, seconds, reasons = 0, 0.0, Counter[str]()
    for row in room.read_records(file):
        if "error" in row:
            reasons[_reason(row)] += 1
        else:
            done, seconds = done + 1, seconds + row["duration_s"]
    model = header["model"]
    rows = [
        ["model", f"{model['source']}@{model['revision']}" if model.get("revision") else str(model["name"])],
        ["settings", ", ".join(f"{key} {value}" for key, value in header["settings"].items())],
        ["made by", ", ".join(f"{name} {version}" for name, version in header["versions"].items())],
        *([["shard", header["shard"]]] if header.get("shard") else []),
        ["transcribed", f"{done:,}, {seconds / 3600:.2f} h"],
        ["failed", f"{sum(reasons.values()):,}"],
        *(["", f"{count:,} × {reason}"] for reason, count in reasons.most_common(10)),
    ]
    print_table(["journal", str(file)], rows)


def _reason(row: dict[str, Any]) -> str:
    """The error without the file's name."""
    return str(row["error"]).removeprefix(f"{row['file']}: ")


@results.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The journal to write.")
def merge(files: tuple[Path, ...], out: Path) -> None:
    """Put the journals of shards together. An id that is in several is there once, and failed only if it always did."""
    from mowa.engines import results as room

    if out.exists():
        raise DataError(f"{out}: is there already. Choose another name, or delete it.")
    header, rows = room.merge_results(files)
    with room.rewrite_results(out, header) as write:
        for row in rows:
            write(row)
    click.echo(str(out))


@results.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-f", "--format", "form", type=click.Choice(list(FORMAT_SUFFIXES)), default="text", show_default=True)
@click.option("-o", "--out", type=click.Path(path_type=Path),
              help="Folder for one file per recording; else, text and json, standard output.")  # fmt: skip
def export(file: Path, form: str, out: Path | None) -> None:
    """Write what a journal holds as captions. Failures are left out; standard error says how many."""
    from mowa.decode import captions
    from mowa.engines import results as room
    from mowa.io.atomic import atomic_write

    if out is None and form not in ("text", "json"):
        raise DataError(f"{form} is a file for each recording: name a folder with --out")
    header = room.read_header(file)
    failed = 0
    for row in room.read_records(file):
        if "error" in row:
            failed += 1
            continue
        text = captions.render(room.parse_transcript(row, header), form)
        if out is None:
            click.echo(f"{row['id']}\t{row['text']}\n" if form == "text" else text, nl=False)
            continue
        name = out / _inside(row["id"])
        name.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(name.with_name(name.name + FORMAT_SUFFIXES[form]), text)
    if failed:
        click.echo(f"{file}: {failed} recordings failed and are left out", err=True)


def _inside(name: str) -> PurePosixPath:
    """An id as a path that stays in its folder."""
    parts = [part for part in PurePosixPath(name).parts if part not in ("/", "..")]
    return PurePosixPath(*(parts or ["unnamed"]))
