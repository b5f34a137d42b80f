"""A live transcript on a terminal: final words, partial words dimmed after them, and a status line below.

Only the last row of final words, one row of partial words and the status line are redrawn. No row is wider than the
terminal, since a row that wraps could not be erased.
"""

from __future__ import annotations

import shutil
import time
import unicodedata
from collections.abc import Sequence

import click

from mowa.decode.ctc import join_words
from mowa.types import Segment, Word

REFRESH_INTERVAL_S = 0.1  # of the status line; words are shown at once
_CLEAR, _ABOVE = "\r\x1b[2K", "\x1b[1A\x1b[2K"  # erase this row; move up and erase


class LiveDisplay:
    """Draws from construction until `close`; nothing else may write to the terminal meanwhile."""

    def __init__(self, status: str = "") -> None:
        self._row, self._open, self._gap, self._status = "", "", " ", status
        self._drawn_s, self._rows = 0.0, 0
        click.echo(self._drawing(), nl=False)

    def update(self, segments: Sequence[Segment], status: str) -> None:
        """Show the segments of one feed, in order, and the new status line."""
        done: list[str] = []
        for segment in segments:
            if not segment.is_final:
                self._open = join_words(segment.words)
                self._gap = " " if all(word.space_before for word in segment.words[:1]) else ""
                continue
            self._open = ""
            for word in segment.words:
                done += self._add(word)
            if segment.is_endpoint and self._row:
                done.append(self._row)
                self._row = ""
        self._status = status
        if segments or time.monotonic() - self._drawn_s >= REFRESH_INTERVAL_S:
            click.echo(self._back() + "".join(f"{row}\n" for row in done) + self._drawing(), nl=False)

    def close(self) -> None:
        """Erase the partial words and the status line."""
        click.echo(self._back() + (f"{self._row}\n" if self._row else ""), nl=False)

    def _add(self, word: Word) -> list[str]:
        """Append a final word to the row; return the rows that are full."""
        gap = " " if self._row and word.space_before else ""
        longer = f"{self._row}{gap}{word.text}"
        if display_width(longer) <= _width():
            self._row = longer
            return []
        full, self._row = [self._row] if self._row else [], word.text
        while display_width(self._row) > _width():
            head = _head(self._row, _width())
            full.append(head)
            self._row = self._row[len(head) :]
        return full

    def _back(self) -> str:
        return _CLEAR + _ABOVE * self._rows

    def _drawing(self) -> str:
        self._drawn_s, width = time.monotonic(), _width()
        first, rest = self._row, self._open.split()
        beside: list[str] = []
        while rest and display_width(" ".join([first, *beside, rest[0]]).lstrip()) <= width:
            beside.append(rest.pop(0))
        rows = [f"{first}{self._gap if first and beside else ''}{_dim(' '.join(beside))}"]
        if rest:
            rows.append(_dim(_tail(" ".join(rest), width)))
        self._rows = len(rows)
        return "".join(f"{row}\n" for row in rows) + _dim(_head(self._status, width))


def display_width(text: str) -> int:
    """Return the columns that `text` takes: two for East Asian wide characters, none for combining marks."""
    return sum(0 if unicodedata.combining(one) else 1 + (unicodedata.east_asian_width(one) in "WF") for one in text)


def _width() -> int:
    return max(2, shutil.get_terminal_size().columns - 1)  # some terminals wrap as soon as the last column is written


def _head(text: str, width: int) -> str:
    """Return the longest prefix that fits in `width` columns."""
    size = len(text)
    while display_width(text[:size]) > width:
        size -= 1
    return text[:size]


def _tail(text: str, width: int) -> str:
    """Return the text, or … and its end where it is wider than `width` columns."""
    if display_width(text) <= width:
        return text
    start = 0
    while display_width(text[start:]) > width - 1:
        start += 1
    return f"…{text[start:]}"


def _dim(text: str) -> str:
    return click.style(text, dim=True) if text else ""
