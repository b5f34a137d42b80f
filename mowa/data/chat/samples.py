"""The samples of a chat data set: conversations and plain texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mowa.errors import DataError


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is system, developer, user, assistant or tool; `trained`: whether it may be in the loss."""

    role: str
    content: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    name: str = ""
    tool_call_id: str = ""
    reasoning_content: str = ""
    trained: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, and the tools that the assistant may call, as JSON schemas."""

    id: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Document:
    """A plain text."""

    id: str
    text: str


class InvalidSample(Exception):
    """A row that is not a conversation: a reason to count by, and the detail of this row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason + (f" ({detail})" if detail else ""))
        self.reason = reason


class ExcludedSample(Exception):
    """A row that the data set marks as not to be trained on; `reason` names the mark."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass
class Tally:
    """Rows and samples that were left out, and warnings: reason → (count, the first one).

    dropped   invalid, or refused later: by the chat template, by the maximum length
    excluded  marked by the data set itself as not to be trained on
    stop_source  raise at the first dropped one, which is of this data set; None: count
    """

    dropped: dict[str, tuple[int, str]] = field(default_factory=dict)
    excluded: dict[str, tuple[int, str]] = field(default_factory=dict)
    warnings: dict[str, tuple[int, str]] = field(default_factory=dict)
    stop_source: str | None = None

    @property
    def num_excluded(self) -> int:
        """Number of excluded rows."""
        return sum(times for times, _ in self.excluded.values())

    def drop(self, reason: str, example: str) -> None:
        """Count a dropped row or sample. Raises DataError with `stop_source`."""
        if self.stop_source is not None:
            detail = example if reason in example else f"{example}: {reason}"
            raise DataError(f"{self.stop_source}: {detail}. Correct the row, or drop such rows (on_invalid: drop).")
        _count(self.dropped, reason, example)

    def exclude(self, reason: str, example: str) -> None:
        """Count an excluded row."""
        _count(self.excluded, reason, example)

    def warn(self, reason: str, example: str) -> None:
        """Count a warning."""
        _count(self.warnings, reason, example)


def _count(counts: dict[str, tuple[int, str]], reason: str, example: str) -> None:
    count, first = counts.get(reason, (0, example))
    counts[reason] = (count + 1, first)
