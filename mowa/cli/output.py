"""How things look on a terminal: tables and progress. Progress goes to standard error and only where one looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import click
from tqdm import tqdm

_BAR = "{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s of audio [{elapsed}<{remaining}, {rate_noinv_fmt}]"


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell; the last one is never padded."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())


def format_size(count: int) -> str:
    """Bytes, as people say them."""
    number = float(count)
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.2f} GB"


def set_progress_total(bar: tqdm, total_s: float) -> None:
    """How much there is in all is known now: the bar says how much is left."""
    bar.bar_format, bar.total = _BAR, round(total_s)
    bar.refresh()


def audio_progress(total_s: float | None) -> tqdm:
    """A bar in seconds of audio, with audio-seconds per second and the time left. Silent when not a terminal."""
    return tqdm(
        total=None if total_s is None else round(total_s),
        desc="listening",
        unit="s",
        disable=None,
        bar_format=_BAR if total_s else None,
    )


@contextmanager
def stage_progress() -> Iterator[Callable[[str, float], None]]:
    """A bar for work of several kinds, told by what is being done and the share of it that is. Silent elsewhere."""
    bar = tqdm(total=100, disable=None, bar_format="{desc} {percentage:3.0f}%|{bar}| [{elapsed}]", leave=False)

    def told(what: str, share: float) -> None:
        if not bar.disable:
            bar.set_description_str(what, refresh=False)
            bar.n = round(share * 100)
            bar.refresh()

    try:
        yield told
    finally:
        bar.close()
