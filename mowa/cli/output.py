"""Tables, sizes and progress bars for the terminal. Bars go to standard error and only if that is a terminal."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click
from tqdm import tqdm

if TYPE_CHECKING:
    from mowa.evaluation.worker import Throughput

_BAR = "{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s of audio [{elapsed}<{remaining}, {rate_noinv_fmt}]"


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns as wide as their widest cell; the last one is not padded."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())


def format_size(num_bytes: int) -> str:
    """Return a size with a decimal unit: 950 B, 12 kB, 340 MB, 1.26 GB."""
    number = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.2f} GB"


def throughput_lines(label: str, measured: Iterable[Throughput]) -> Iterator[str]:
    """Yield one line per thread count and batch size."""
    for one in measured:
        threads = f"{one.threads} thread{'s' * (one.threads > 1)}"
        yield f"{label}, {threads}, batch size {one.batch_size}: RTF {one.rtf:.4f}, RTFx {1 / one.rtf:.1f}"


def set_progress_total(bar: tqdm, total_s: float) -> None:
    """Set the total of a running `audio_progress` bar, in seconds of audio."""
    bar.bar_format, bar.total = _BAR, math.ceil(total_s)
    bar.refresh()


def audio_progress(total_s: float | None) -> tqdm:
    """Return a bar in seconds of audio; without a total it shows no percentage."""
    return tqdm(
        total=None if total_s is None else math.ceil(total_s),
        desc="transcribing",
        unit="s",
        disable=None,
        bar_format=_BAR if total_s else None,
    )


@contextmanager
def count_progress(label: str) -> Iterator[Callable[[float], None]]:
    """Yield a callback (amount) that counts up, with rate and elapsed time; the total is not known."""
    with tqdm(desc=label, disable=None, leave=False, bar_format="{desc} {n:.0f} [{elapsed}, {rate_noinv_fmt}]") as bar:

        def on_progress(amount: float) -> None:
            bar.update(amount)

        yield on_progress


@contextmanager
def print_warnings(bar: tqdm) -> Iterator[None]:
    """Print the warnings that mowa logs within the context to standard error, each on a line of its own above `bar`."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            bar.clear()
            click.echo(f"mowa: {record.getMessage()}", err=True)

    handler, log = Handler(logging.WARNING), logging.getLogger("mowa")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


@contextmanager
def hub_progress() -> Iterator[None]:
    """Show huggingface_hub's progress bars within the context only if standard error is a terminal."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hidden = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if hidden:
        disable_progress_bars()
    try:
        yield
    finally:
        if hidden:
            enable_progress_bars()


@contextmanager
def stage_progress() -> Iterator[Callable[[str, float], None]]:
    """Yield a callback (stage, fraction in [0, 1]) that updates a bar for work in several stages."""
    bar = tqdm(total=100, disable=None, bar_format="{desc} {percentage:3.0f}%|{bar}| [{elapsed}]", leave=False)

    def on_progress(stage: str, fraction: float) -> None:
        if not bar.disable:
            bar.set_description_str(stage, refresh=False)
            bar.n = round(fraction * 100)
            bar.refresh()

    try:
        yield on_progress
    finally:
        bar.close()
