"""Detect the format of a chat data set by the names of its columns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mowa.errors import DataError

ID_COLUMNS = ("id", "uid", "uuid", "conversation_id", "prompt_id", "key")
_ANSWERS = ("output", "response", "completion", "answer", "answers", "target")
_SYSTEM = ("system", "system_prompt")
_LABEL = ("label", "kto_tag")
_PAIR: dict[str, tuple[str, ...]] = {"input": ("input", "context"), "system": _SYSTEM, "label": _LABEL}
# Format → names of its required and of its optional columns. The first format whose required columns exist is used.
DATASET_FORMATS: dict[str, tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]] = {
    "messages": (
        {"turns": ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")},
        {"tools": ("tools", "functions"), "system": _SYSTEM, "label": _LABEL},
    ),
    "alpaca": ({"prompt": ("instruction",), "answer": _ANSWERS}, {**_PAIR, "history": ("history",)}),
    "prompt/completion": ({"prompt": ("prompt",), "answer": ("completion",)}, _PAIR | {"tools": ("tools",)}),
    "prompt/response": ({"prompt": ("prompt", "input", "query"), "answer": _ANSWERS}, _PAIR),
    "question/answer": ({"prompt": ("question",), "answer": _ANSWERS}, _PAIR),
    "text": ({"text": ("text", "content", "document", "markdown", "body")}, {}),
    "user/assistant": ({"prompt": ("user", "human"), "answer": ("assistant", "gpt", "bot")}, _PAIR),
}
KNOWN_COLUMNS = frozenset(
    (
        *ID_COLUMNS,
        *(name for formats in DATASET_FORMATS.values() for part in formats for one in part.values() for name in one),
    )
)


@dataclass(frozen=True, slots=True)
class DatasetFormat:
    """Format of a data set: a key of `DATASET_FORMATS` or sharegpt, and the column of each of its roles."""

    name: str
    columns: Mapping[str, str]

    def __str__(self) -> str:
        columns = ", ".join(role if role == name else f"{role} in {name}" for role, name in self.columns.items())
        return f"{self.name} ({columns})"


def detect_format(rows: Iterable[Mapping[str, Any]]) -> DatasetFormat:
    """Return the format that all rows have. Raises DataError if there is none or more than one."""
    detected: DatasetFormat | None = None
    for number, fields in enumerate(rows, 1):
        detected = agree(detected, "row 1", row_format(fields), f"row {number}", fields)
    if detected is None:
        raise DataError("no rows, so the dataset format cannot be detected")
    return detected


def row_format(fields: Mapping[str, Any]) -> DatasetFormat | None:
    """Return the format of a row by its columns that are not None, else by all its columns, else None."""
    filled = tuple(name for name, value in fields.items() if value is not None and name is not None)
    found = _format_of(filled) or _format_of(tuple(name for name in fields if name is not None))
    if found and found.name == "messages":
        turns = parse_json(fields[found.columns["turns"]])
        if isinstance(turns, list) and turns and isinstance(turns[0], Mapping) and {"from", "value"} <= set(turns[0]):
            return _sharegpt_format(tuple(found.columns.items()))
    return found


@lru_cache(maxsize=64)
def _sharegpt_format(columns: tuple[tuple[str, str], ...]) -> DatasetFormat:
    return DatasetFormat("sharegpt", dict(columns))


@lru_cache(maxsize=256)
def _format_of(names: tuple[str, ...]) -> DatasetFormat | None:
    by_lower = {str(name).strip().lower(): name for name in reversed(names)}

    def find(aliases: Mapping[str, tuple[str, ...]], taken: Iterable[str] = ()) -> dict[str, str]:
        free = {lower: name for lower, name in by_lower.items() if name not in taken}
        return {role: free[name] for role, known in aliases.items() for name in reversed(known) if name in free}

    for format_name, (required_aliases, optional_aliases) in DATASET_FORMATS.items():
        required = find(required_aliases)
        if len(required) == len(required_aliases):
            return DatasetFormat(format_name, {**required, **find(optional_aliases, required.values())})
    return None


def agree(
    detected: DatasetFormat | None, first: str, found: DatasetFormat | None, where: str, fields: Mapping[str, Any]
) -> DatasetFormat:
    """Return the format of the data set, which is that of its first row. Raises DataError if this row has another."""
    if found is None and detected is None:
        columns = ", ".join(repr(str(name)[:40]) for name in fields) or "none"
        preference = " Preference pairs (chosen, rejected) are not supported." if "chosen" in fields else ""
        raise DataError(
            f"{where}: no known dataset format has these columns: {columns}.{preference} Name them messages; "
            "instruction and output; prompt and completion; question and answer; or text; or map them (data.columns)."
        )
    if detected is None or found is None or found.name == detected.name:
        return detected or found  # type: ignore[return-value]
    raise DataError(
        f"two formats in one data set: {detected} in {first}, and {found} in {where}. Split it into two files."
    )


def parse_json(value: Any) -> Any:
    """Parse a column that holds a JSON list or object as a string; convert numpy arrays to lists."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value.tolist() if hasattr(value, "tolist") else value
