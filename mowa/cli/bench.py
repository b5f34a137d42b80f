"""`mowa bench`: models side by side on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mowa.cli import output
from mowa.errors import ModelError

if TYPE_CHECKING:
    from mowa.evaluation.bench import BenchResult


# fmt: off
@click.command(short_help="Time models, engines and schemes on this machine.")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--engine", "engines", multiple=True, metavar="NAME",
              help="pytorch, onnx; several may be named. [default: native; an export's own]")
@click.option("--dtype", "dtypes", multiple=True, metavar="NAME",
              help="float32, bfloat16, int8, auto; several may be named. [default: auto]")
@click.option("--data", metavar="SOURCE", help="Recordings, with texts for error rates. [default: a bundled one]")
@click.option("--split", default="", help="Split of --data.")
@click.option("--clips", type=click.IntRange(min=1), default=20, show_default=True, help="At most so many of them.")
@click.option("--speeds", is_flag=True, help="Time with one thread and all, one recording and four.")
@click.option("--picture", type=click.Path(path_type=Path), metavar="FILE.png",
              help="Draw size, speed and error rates; what another is no worse than in all three is faint.")
@click.option("--json", "listed", type=click.Path(path_type=Path), metavar="FILE.json", help="Write what was measured.")
def bench(
    models: tuple[str, ...], engines: tuple[str, ...], dtypes: tuple[str, ...], data: str | None, split: str,
    clips: int, speeds: bool, picture: Path | None, listed: Path | None,
) -> int:
    # fmt: on
    """Latency, throughput, memory and size of MODELs (names, folders, exports), each in a process of its own."""
    from mowa.evaluation import bench as room
    from mowa.evaluation import plot, report
    from mowa.io.atomic import atomic_write

    if picture is not None:
        plot.require_matplotlib()
    wanted = room.expand_cases(models, engines, dtypes)
    timed = report.throughput_grid() if speeds else ()
    with output.stage_progress() as told:
        rows = room.run_bench(wanted, data, split, clips, timed, told)
    head = ["model", "engine", "computes in", "MB", "RAM MB", "load s", "median s", "× real time", "frames"]
    heard = any(row.error_rates for row in rows)
    output.print_table(head + (["WER %"] if heard else []), [_cells(row, heard) for row in rows])
    for row in rows:
        for speed in row.throughput:
            click.echo(f"{row.name}, {speed.threads} threads, batch {speed.batch_size}: {speed.rtf:.4f} s for a second")
    if listed is not None:
        atomic_write(listed, json.dumps([asdict(row) for row in rows], ensure_ascii=False, indent=1) + "\n")
    if picture is not None:
        plot.plot_bench(rows, picture)
        click.echo(f"\n{picture}")
    if not any(row.rtf for row in rows):
        raise ModelError("none of them could be run")
    return 2 if any(row.error for row in rows) else 0


def _cells(row: BenchResult, heard: bool) -> list[str]:
    if row.error:
        return [row.model, row.engine, *["–"] * 6, f"no: {row.error}"]
    cells = [
        row.model, row.engine, row.dtype, f"{row.size_bytes / 1e6:.1f}", f"{row.peak_memory_bytes / 1e6:.0f}", f"{row.load_s:.1f}",
        f"{row.latency_s:.3f}", f"{1 / row.rtf:.1f}", f"{row.agreement:.1%}",
    ]  # fmt: skip
    return cells + ([f"{row.error_rates.wer:.1%}" if row.error_rates else "–"] if heard else [])
