"""Rows of corpora as the readers yield them: columns with their position in a file, or why a row cannot be used."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mowa.errors import DataError

# Role → names of columns that have it, in order of preference, in lower case.
COLUMN_ALIASES: dict[str, tuple[str, ...]] = {
    "audio": tuple("audio audio_filepath audio_path audio_file file_name filename file path wav flac mp3".split()),
    "text": tuple("text sentence transcription transcript normalized_text raw_transcription raw_text txt".split()),
    "id": ("id", "utt_id", "utterance_id", "uid", "key", "__key__"),
    "duration": ("duration_s", "duration", "duration_ms"),
    "offset": ("offset", "start", "start_s", "start_time"),
    "end": ("end", "end_s", "end_time"),
    "split": ("split",),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "gender": ("gender", "sex"),
    "age": ("age",),
    "accent": ("accent", "accents"),
    "voice": ("voice",),
    "language": ("language", "locale", "lang"),
}


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used while those around it can. `reason` begins with its position; `id` may be unknown."""

    reason: str
    id: str = ""


TableRow = tuple[str, Path, Mapping[str, Any] | BadRow]  # position for messages, folder of relative paths, columns
NumberedRow = tuple[str, dict[str, Any] | BadRow]  # position for messages, columns


def usable_fields(rows: Iterator[TableRow]) -> Iterator[Mapping[str, Any]]:
    """Yield the columns of the rows that are not bad."""
    return (fields for _, _, fields in rows if not isinstance(fields, BadRow))


@lru_cache(maxsize=256)
def guess_columns(names: tuple[str, ...]) -> dict[str, str]:
    """Return role → column for the roles that some of these columns have by `COLUMN_ALIASES`."""
    by_lower = {str(name).strip().lower(): name for name in reversed(names)}
    return {
        role: by_lower[name]
        for role, aliases in COLUMN_ALIASES.items()
        for name in reversed(aliases)
        if name in by_lower
    }


def parse_times(where: str, fields: Mapping[str, Any], column: Mapping[str, str]) -> tuple[float, float, bool]:
    """Return offset and duration in seconds, 0 if unknown, and whether the row is an excerpt.

    `column` maps roles to columns. A column `start` counts as an offset only if there are ends or durations. Raises
    DataError for an offset without length, and for one that is not a number.
    """
    duration_name, offset_name, end_name = (column.get(role, "") for role in ("duration", "offset", "end"))
    duration_s = _to_number(fields.get(duration_name)) / (1000 if duration_name.lower().endswith("_ms") else 1)
    offset, end = (fields.get(name) if offset_name else None for name in (offset_name, end_name))
    if offset in (None, "") or not (offset_name.strip().lower() == "offset" or {"end", "duration"} & column.keys()):
        return 0.0, max(0.0, duration_s), False
    for name, value in ((offset_name, offset), (end_name, end)):
        if value not in (None, "") and not _is_number(value):
            raise DataError(f"{where}: {name} is {str(value)[:40]!r}, not a number of seconds. Write seconds: 12.5.")
    offset_s = _to_number(offset)
    if end not in (None, ""):
        if not 0 <= offset_s < _to_number(end):
            raise DataError(f"{where}: {offset} to {end} s is no part of a recording. Write both in seconds.")
        return offset_s, round(_to_number(end) - offset_s, 6), True
    if offset_s < 0 or (offset_s and duration_s <= 0):
        raise DataError(f"{where}: has an offset ({offset}) without a duration. Write both, in seconds.")
    return offset_s, max(0.0, duration_s), duration_s > 0


def _to_number(value: Any) -> float:
    """Convert to a finite float, or 0."""
    return float(value) if _is_number(value) else 0.0


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False
