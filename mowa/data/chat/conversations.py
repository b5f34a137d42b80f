"""Parse rows of any usual dataset format into conversations and documents, and count the invalid ones.

`files` reads the rows, `formats` detects their format, `rows` parses one of them; `template` and `tokenize` use the
result. Rows are not repaired: an invalid row is reported with its position and the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from mowa.data.chat import files
from mowa.data.chat.formats import ID_COLUMNS, KNOWN_COLUMNS, DatasetFormat, agree, row_format
from mowa.data.chat.renaming import Renaming
from mowa.data.chat.rows import list_unused, parse_row
from mowa.data.chat.samples import Conversation, Document, ExcludedSample, InvalidSample, Tally
from mowa.data.manifests.rows import BadRow
from mowa.errors import DataError

ON_INVALID = ("drop", "stop")
_BROKEN = "a line that cannot be read"
MAX_INVALID_RATIO = 0.5  # with more invalid rows the format was probably detected wrongly


@dataclass(frozen=True, slots=True)
class ChatDataset:
    """Samples of a data set, and what was found in its rows.

    num_rows       rows that were read
    dropped, excluded, warnings  reason → (number of rows, the first one), as in `Tally`
    unused         columns and keys of turns that hold something but are not used → (number of rows, the first one)
    source, on_invalid  name of the data set for messages, and whether invalid samples end the run
    """

    samples: tuple[Conversation | Document, ...]
    dataset_format: DatasetFormat
    num_rows: int
    dropped: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    excluded: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    warnings: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    unused: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    source: str = ""
    on_invalid: str = "drop"

    def __iter__(self) -> Iterator[Conversation | Document]:
        return iter(self.samples)

    def __len__(self) -> int:
        return len(self.samples)


def read_conversations(
    path: str | Path,
    split: str = "",
    *,
    on_invalid: str = "drop",
    columns: Mapping[str, str] | None = None,
    roles: Mapping[str, str] | None = None,
) -> ChatDataset:
    """Read the conversations and documents at `path`, in order; `files.SUPPORTED_FILES` lists what it may be.

    on_invalid  drop (and count by reason) or stop (raise at the first invalid row)
    columns     name of a column or of a key of turns that mowa reads → its name in the data set
    roles       role in the data set → system, user, assistant or tool

    Raises DataError if the data cannot be read, mixes two formats, has no rows, or if more than half of the rows are
    invalid.
    """
    rows = files.read_rows(path, split, (*KNOWN_COLUMNS, *(columns or {}).values()))
    named = ((where, fields) for where, _, fields in rows)
    return parse_rows(named, str(path), on_invalid=on_invalid, columns=columns, roles=roles)


def parse_rows(
    rows: Iterable[tuple[str, Mapping[str, Any] | BadRow]],
    source: str,
    *,
    on_invalid: str = "drop",
    columns: Mapping[str, str] | None = None,
    roles: Mapping[str, str] | None = None,
) -> ChatDataset:
    """Parse rows, given with their positions, into conversations and documents. As `read_conversations`."""
    if on_invalid not in ON_INVALID:
        raise DataError(f"on_invalid: {on_invalid!r} is none of {', '.join(ON_INVALID)}")
    renaming = Renaming(columns or {}, roles or {})
    detected: DatasetFormat | None = None
    first, number = "", 0
    first_row: Mapping[str, Any] = {}
    samples: list[Conversation | Document] = []
    tally, unused, ids = Tally(), Tally(), Counter[str]()
    for number, (where, given) in enumerate(rows, 1):
        if isinstance(given, BadRow):
            if on_invalid == "stop":
                raise DataError(given.reason)
            tally.drop(_BROKEN, given.reason)
            continue
        first_row, fields = first_row or given, renaming.rename(given)
        found = row_format(fields)
        detected, first = agree(detected, first, found, where, fields), first or where
        for name in dict.fromkeys(list_unused(found or detected, fields, renaming.roles)):
            unused.warn(name, where)
        try:
            sample = parse_row(_unique_id(fields, number, ids), found or detected, fields, renaming.roles)
        except ExcludedSample as error:
            tally.exclude(error.reason, where)
            continue
        except InvalidSample as error:
            if on_invalid == "stop":
                raise DataError(f"{where}: {error}. Correct the row, or drop such rows (on_invalid: drop).") from None
            tally.drop(error.reason, f"{where}: {error}")
            continue
        samples.append(sample)
        for warning in _warnings(sample):
            tally.warn(warning, where)
    if detected is None:
        broken = tally.dropped.get(_BROKEN)
        raise DataError(
            broken[1] if broken else f"{source}: is empty: it has no rows. Check that it was written completely."
        )
    renaming.raise_missing(source, first_row)
    _validate_counts(tally, detected, source, number, len(samples))
    counts = (tally.dropped, tally.excluded, tally.warnings, unused.warnings)
    return ChatDataset(tuple(samples), detected, number, *counts, source=source, on_invalid=on_invalid)


def _validate_counts(tally: Tally, detected: DatasetFormat, source: str, rows: int, samples: int) -> None:
    """Raise DataError if more than half of the rows are invalid, those aside that are not to be trained on."""
    considered = rows - tally.num_excluded
    if considered - samples > MAX_INVALID_RATIO * considered:
        reason, (times, example) = max(tally.dropped.items(), key=lambda entry: entry[1][0])
        raise DataError(
            f"{source}: {considered - samples} of {considered} rows are invalid as {detected}; {times} of them because "
            f"of: {reason} ({example}). Correct them, or rename the columns."
        )


def _unique_id(fields: Mapping[str, Any], number: int, ids: Counter[str]) -> str:
    name = next((str(fields[key]) for key in ID_COLUMNS if fields.get(key) not in (None, "")), str(number))
    ids[name] += 1
    unique = name
    while ids[name] > 1 and unique in ids:  # a row may be called as this numbers another
        unique = f"{name}-{ids[name]}"
        ids[name] += unique in ids
    ids[unique] = max(ids[unique], 1)
    return unique


def _warnings(sample: Conversation | Document) -> Iterator[str]:
    """Yield what is valid but rarely intended."""
    if isinstance(sample, Document):
        return
    roles = [message.role for message in sample.messages]
    pairs = list(pairwise(roles))
    if ("assistant", "assistant") in pairs:
        yield "two assistant messages in a row"
    if ("user", "user") in pairs:
        yield "two user messages in a row"
    if roles[-1] in ("user", "system"):
        yield "ends without an answer"
    if "system" in roles[1:]:
        yield "a system message that is not the first"
