"""Find the parts of messages that the chat template does not write, by marks inside each of their fields.

A mark is a number that no message contains. It is inserted into the middle of a field, or of each part between tags
such as `</think>`, at which templates cut. What the template leaves out is what has no mark in the rendered text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_TAG = re.compile(r"(<[^<>\s][^<>\n]{0,40}>|\[/?[A-Z_]{2,20}\]|◁[^◁▷\n]{1,20}▷)")
_REASONING, _TOOL_CALLS, _BESIDE_CALLS = "reasoning", "tool calls", "the text beside tool calls"
_REASONING_KEYS = ("reasoning_content", "thinking")  # `template` passes the same text under both names


@dataclass(frozen=True, slots=True)
class Mark:
    """A mark in one field of message `turn`. `is_last`: nothing of the same field follows it."""

    text: str
    turn: int
    field: str
    excerpt: str
    is_last: bool = True


def insert_marks(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[Mark]]:
    """Return the messages with marks in their contents, reasoning and tool calls, and the marks.

    Roles, names and the ids of tool calls have none: templates may leave them out.
    """
    contents = str(messages)
    salt = next(str(number) for number in range(90_417_309, 10**9, 104_729) if str(number) not in contents)
    marks: list[Mark] = []

    def mark(text: str, turn: int, field: str, is_last: bool = True) -> str:
        first, last = len(text) - len(text.lstrip()), len(text.rstrip())
        if last <= first:
            return text
        middle = first + (last - first + 1) // 2
        marks.append(Mark(f"{salt}{len(marks):06d}", turn, field, text[first:last][:40], is_last))
        return text[:middle] + marks[-1].text + text[middle:]

    def mark_content(text: str, turn: int, field: str) -> str:
        parts = _TAG.split(text)
        filled = [index for index in range(0, len(parts), 2) if parts[index].strip()]
        if not filled:
            return mark(text, turn, field)
        for index in filled:
            parts[index] = mark(parts[index], turn, field, index == filled[-1])
        return "".join(parts)

    def mark_arguments(value: Any, turn: int) -> Any:
        if isinstance(value, str):
            return mark(value, turn, _TOOL_CALLS)
        if isinstance(value, Mapping):
            return {mark(str(key), turn, _TOOL_CALLS): mark_arguments(inner, turn) for key, inner in value.items()}
        return [mark_arguments(inner, turn) for inner in value] if isinstance(value, list | tuple) else value

    marked = []
    for turn, message in enumerate(messages):
        fields = dict(message)
        if fields["content"]:
            field = _BESIDE_CALLS if fields.get("tool_calls") else fields["role"]
            fields["content"] = mark_content(fields["content"], turn, field)
        if reasoning := fields.get(_REASONING_KEYS[0]):
            fields |= dict.fromkeys(_REASONING_KEYS, mark(reasoning, turn, _REASONING))
        if calls := fields.get("tool_calls"):
            functions = [
                {
                    "name": mark(call["function"]["name"], turn, _TOOL_CALLS),
                    "arguments": mark_arguments(call["function"]["arguments"], turn),
                }
                for call in calls
            ]
            fields["tool_calls"] = [
                {**call, "function": function} for call, function in zip(calls, functions, strict=True)
            ]
        marked.append(fields)
    return marked, marks


def find_omitted(text: str, marks: Iterable[Mark]) -> list[Mark]:
    """Return the marks that a rendered text lacks."""
    return [mark for mark in marks if mark.text not in text]


def is_required(mark: Mark, trained: Iterable[int]) -> bool:
    """Return whether a template must write what `mark` is in, if the answers `trained` are trained on.

    Of answers that are not trained on, templates may cut reasoning: the field itself, the parts of a content before
    the last, and the text beside tool calls.
    """
    if mark.turn in trained or mark.field in ("system", "developer", "user", "tool"):
        return True
    return mark.field == _TOOL_CALLS or (mark.field == "assistant" and mark.is_last)


def describe(mark: Mark) -> tuple[str, str]:
    """Return what the template omits, a reason by which rows are counted, and where it is in this conversation."""
    if mark.field == "assistant":
        what = "the end of an answer" if mark.is_last else "a part of an answer, such as reasoning"
    elif mark.field in (_REASONING, _TOOL_CALLS, _BESIDE_CALLS):
        what = mark.field
    else:
        what = f"{mark.field} messages"
    return f"the chat template omits {what}", f"message {mark.turn + 1}: {mark.excerpt!r}"
