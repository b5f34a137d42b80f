"""Read JSON Lines, JSON, CSV and TSV row by row. A broken line becomes a `BadRow`, and the lines after it are read."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from mowa.data.audio import is_audio_file
from mowa.data.manifests.rows import BadRow, NumberedRow, TableRow
from mowa.errors import DataError

LIST_KEYS = ("data", "train", "rows")  # keys of a JSON object whose value is the list of rows
_MAX_FIELD = 2**31 - 1  # characters of a CSV field; the default of the csv module is 131,072
_MAC_LINE_END = "\r"


def decode_lines(lines: Iterable[bytes], name: object) -> Iterator[str]:
    """Decode UTF-8 lines, which keep their ends, without a byte order mark. Raises DataError for other encodings.

    Lines are split at line feeds only, since U+2028 may occur in texts.
    """
    for number, line in enumerate(lines, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name}:{number}: is not UTF-8 (byte 0x{error.object[error.start]:02x}). Save it as UTF-8, or "
                "convert it: iconv -f ITS-ENCODING -t UTF-8."
            ) from None


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file or .gz as `decode_lines` does. Raises DataError if it cannot be read."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield from decode_lines(file, path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: is damaged or cut off ({str(error).rstrip('.')}). Copy it again.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from None


# --- JSON -------------------------------------------------------------------------------------------------------------


def read_json(path: Path, extra_columns: Collection[str] = ()) -> Iterator[TableRow]:
    """Yield the rows of JSON Lines, of a list of objects, or of an object with such a list under one of `LIST_KEYS`.

    Memory: JSON Lines are read line by line, other JSON as a whole. Raises DataError if the list is broken.
    """
    numbered = ((number, line) for number, line in enumerate(read_lines(path), 1) if line.strip())
    first = next(numbered, None)
    if first is None:
        return
    ahead = [first]
    if _spans_lines(first[1]):
        ahead += numbered
        try:
            yield from _number_rows(path, json.loads("".join(line for _, line in ahead)))
            return
        except json.JSONDecodeError as error:
            if first[1].lstrip().startswith("["):
                line = ahead[min(error.lineno, len(ahead)) - 1][0]
                raise DataError(f"{path}:{line}: broken JSON ({error.msg}). Write one list of objects.") from None
    elif _find_rows(document := _parse_json(first[1])) is not None:
        ahead += islice(numbered, 1)
        if len(ahead) == 1:
            yield from _number_rows(path, document)
            return
    yield from _parse_json_lines(path, chain(ahead, numbered))


def _spans_lines(line: str) -> bool:
    """Return whether the first line begins JSON that continues after it: a list, or an object that is not closed."""
    if line.lstrip().startswith("["):
        return True
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line.rstrip())
    except RecursionError:
        pass
    return False


def _parse_json(line: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        return None


def _find_rows(document: Any) -> list[Any] | None:
    """Return the list under one of `LIST_KEYS`, if the document is an object that has one."""
    values = [document.get(key) for key in LIST_KEYS] if isinstance(document, dict) else []
    return next((value for value in values if isinstance(value, list)), None)


def _number_rows(path: Path, document: Any) -> Iterator[TableRow]:
    rows = document if isinstance(document, list) else _find_rows(document)
    rows = [document] if rows is None else rows
    for number, fields in enumerate(rows, 1):
        where = f"{path}: row {number}"
        bad = BadRow(f"{where} is not a JSON object. Write a list of objects.")
        yield where, path.parent, fields if isinstance(fields, dict) else bad


def _parse_json_lines(path: Path, numbered: Iterable[tuple[int, str]]) -> Iterator[TableRow]:
    advice = "Write one JSON object per line."
    for number, line in numbered:
        where = f"{path}:{number}"
        fields: Any
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            fields = BadRow(f"{where}: broken JSON ({error.msg}, column {error.colno}). {advice}")
        except RecursionError:
            fields = BadRow(f"{where}: broken JSON (nested too deeply). {advice}")
        if not isinstance(fields, dict | BadRow):
            fields = BadRow(f"{where}: is not a JSON object. {advice}")
        yield where, path.parent, fields


# --- CSV and TSV ------------------------------------------------------------------------------------------------------


def read_table(path: Path, extra_columns: Collection[str] = ()) -> Iterator[TableRow]:
    """Yield the rows of a CSV or TSV with a header; those of Common Voice with durations from clip_durations.tsv."""
    durations = _read_clip_durations(path.parent)
    for where, fields in parse_table(read_lines(path), path, tab_separated=_is_tsv(path)):
        if isinstance(fields, dict) and (duration_s := durations.get(fields.get("path", ""))) is not None:
            fields["duration_s"] = duration_s
        yield where, path.parent, fields


def _is_tsv(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith(".tsv")


def parse_table(lines: Iterator[str], name: object, *, tab_separated: bool) -> Iterator[NumberedRow]:
    """Yield the position and the columns of each row of a table with a header.

    TSV has no quoting: quotes are text, as in Common Voice. CSV has the usual quoting, and the delimiter (comma,
    semicolon, tab or bar) that its header has most of. A row with more values than the header has columns, or whose
    quotes are not closed, is a `BadRow`. Raises DataError for a broken header.
    """
    first = next(lines, "")
    if _MAC_LINE_END in first.rstrip("\r\n"):
        lines = _split_at(_MAC_LINE_END, chain([first], lines))
        first = next(lines, "")
    delimiter = "\t" if tab_separated else max(",;\t|", key=first.count)
    everything = chain([first], lines)
    records = _split_tabs(everything) if tab_separated else _read_csv(everything, delimiter)
    number, header, reason = next(records, (1, [], ""))
    if reason:
        raise DataError(f"{name}:{number}: {reason}")
    for number, values, reason in records:
        where = f"{name}:{number}"
        while len(values) > len(header) and not values[-1].strip():
            values.pop()
        if not reason and len(values) > len(header):
            advice = (
                "A text cannot contain a tab: replace it by a space."
                if tab_separated
                else "Quote texts that contain the delimiter."
            )
            reason = f"has {len(values)} columns, the header {len(header)}. {advice}"
        if reason:
            yield where, BadRow(f"{where}: {reason}")
        elif values:
            yield where, dict(zip(header, values, strict=False))


Record = tuple[int, list[str], str]  # its first line, values, and what is wrong with it


def _split_at(end: str, lines: Iterable[str]) -> Iterator[str]:
    return (part + "\n" for line in lines for part in line.rstrip("\r\n").split(end))


def _split_tabs(lines: Iterable[str]) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        if content := line.rstrip("\r\n"):
            yield number, content.split("\t"), ""


def _read_csv(lines: Iterator[str], delimiter: str) -> Iterator[Record]:
    """Yield the records of a CSV, and its broken lines; after one, reading continues with the next line.

    A quoted text may have several lines. It is taken for one whose quote was never closed if the file ends inside it,
    if text follows its closing quote, if too many columns follow, or if one of its lines is a row of its own: as many
    columns as the header, and the name of an audio file where the first line has one.
    """
    csv.field_size_limit(_MAX_FIELD)
    source = _PeekableLines(lines)
    number, width = 1, 0
    while True:
        taken, values, reason = _read_record(source, delimiter, width)
        if not taken:
            return
        if reason:
            source.put_back(taken[1:])
            del taken[1:]
        if values or reason:
            width = width or len(values)
            yield number, values, reason
        number += len(taken)


class _PeekableLines:
    """Lines of which some can be put back."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines, self._ahead = lines, deque[str]()

    def take(self) -> str:
        """Return the next line, "" at the end."""
        return self._ahead.popleft() if self._ahead else next(self._lines, "")

    def put_back(self, lines: Sequence[str]) -> None:
        self._ahead.extendleft(reversed(lines))


def _read_record(source: _PeekableLines, delimiter: str, width: int) -> tuple[list[str], list[str], str]:
    """Return the lines of the next record, its values, and what is wrong with it; no lines at the end."""
    taken: list[str] = []
    ended_by: str | None = None  # the line before which a quote is not closed, "" for the end of the file

    def take() -> Iterator[str]:
        nonlocal ended_by
        while line := source.take():
            if taken and _is_row(line, taken[0], delimiter, width):
                source.put_back([line])
                break
            taken.append(line)
            yield line
        ended_by = line

    try:
        values = next(csv.reader(take(), delimiter=delimiter), [])
    except csv.Error as error:
        return taken, [], f"broken table ({error}). Quote texts that contain line ends."
    advice = "Close it, or double the quotes inside texts."
    if taken and ended_by is not None:
        place = "the next row" if ended_by else "the end of the file"
        return taken, values, f"has a quote that is not closed before {place}. {advice}"
    if len(taken) > 1 and not _is_valid(taken, delimiter, width):
        return taken, values, f"has a quote that is closed {len(taken) - 1} lines later, inside a text. {advice}"
    return taken, values, ""


def _is_row(line: str, first: str, delimiter: str, width: int) -> bool:
    """Return whether a line that would continue the record that begins with `first` is a row of its own."""
    if width < 2 or line.count(delimiter) < width - 1:
        return False
    rows = (line, first.replace('"', ""))
    values, begun = (next(csv.reader([row], delimiter=delimiter), []) for row in rows)
    return len(values) == width and any(
        is_audio_file(value) and is_audio_file(other) for value, other in zip(values, begun, strict=False)
    )


def _is_valid(taken: list[str], delimiter: str, width: int) -> bool:
    try:
        (values,) = csv.reader(taken, delimiter=delimiter, strict=True)
    except (csv.Error, ValueError):
        return False
    return not width or len(values) <= width


def _read_clip_durations(folder: Path) -> dict[str, float]:
    """Return clip → seconds from Common Voice's clip_durations.tsv, which saves reading a header per clip."""
    file = folder / "clip_durations.tsv"
    if not file.is_file():
        return {}
    rows = (line.rstrip("\r\n").split("\t") for line in read_lines(file))
    return {row[0]: float(row[1]) / 1000 for row in rows if len(row) == 2 and row[1].isdecimal()}
