"""Rows of every usual shape → conversations and passages, and a count of what is neither.

This room knows how others write conversations down; it knows no tokenizer and no template (`chat`), and no file
(`texts`). Nothing is mended silently: what a row lacks is said, with where it stands.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from mowa.data.chat import files
from mowa.errors import DataError

ON_INVALID = ("drop", "stop")
MAX_INVALID_RATIO = 0.5  # a larger share of bad rows says that the data set is not what it was taken for
ID_COLUMNS = ("id", "uid", "uuid", "conversation_id", "prompt_id", "key")
ROLE_ALIASES = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter", "question"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot", "chatgpt", "ai", "answer"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response", "function_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),  # the assistant's, as ShareGPT has them
}
_ANSWERS = ("output", "response", "completion", "answer", "answers", "target")
# Shape → the columns that it needs, each under one of these names, then those it may have. The first that fits is it.
DATASET_FORMATS: dict[str, tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]] = {
    "messages": (
        {"turns": ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")},
        {"tools": ("tools", "functions"), "system": ("system", "system_prompt")},
    ),
    "alpaca": (
        {"prompt": ("instruction",), "answer": _ANSWERS},
        {"input": ("input", "context"), "system": ("system", "system_prompt"), "history": ("history",)},
    ),
    "prompt/completion": ({"prompt": ("prompt",), "answer": ("completion",)}, {"system": ("system", "system_prompt")}),
    "prompt/response": (
        {"prompt": ("prompt", "input", "query"), "answer": _ANSWERS},
        {"system": ("system", "system_prompt")},
    ),
    "question/answer": ({"prompt": ("question",), "answer": _ANSWERS}, {"system": ("system", "system_prompt")}),
    "text": ({"text": ("text", "content", "document", "markdown", "body")}, {}),
}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role`: system, developer, user, assistant or tool. `thinking` is what an assistant thought before."""

    role: str
    content: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    name: str = ""
    tool_call_id: str = ""
    reasoning_content: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    id: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Document:
    """A document of plain text."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class DatasetFormat:
    """How a data set writes its texts: a key of SHAPES, or sharegpt; `columns`: part → the column that plays it."""

    name: str
    columns: Mapping[str, str]

    def __str__(self) -> str:
        played = ", ".join(part if part == name else f"{part} in {name}" for part, name in self.columns.items())
        return f"{self.name} ({played})"


@dataclass(frozen=True, slots=True)
class ChatDataset:
    """What was read. `dropped` and `noted`: reason → (how many rows, the first one in a line)."""

    samples: tuple[Conversation | Document, ...]
    dataset_format: DatasetFormat
    num_rows: int
    dropped: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    warnings: Mapping[str, tuple[int, str]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Conversation | Document]:
        return iter(self.samples)

    def __len__(self) -> int:
        return len(self.samples)


class InvalidSample(Exception):
    """Why a row is no conversation: a reason to count, and this row's own detail."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason + (f" ({detail})" if detail else ""))
        self.reason = reason


def read_conversations(path: str | Path, split: str = "", *, on_invalid: str = "drop") -> ChatDataset:
    """The conversations or passages at `path`, in order; `texts.UNDERSTOOD` says what may be there.

    `bad` rows: drop (and count, by reason), or stop at the first. DataError for what cannot be read, for two shapes in
    one data set, for more than half of the rows bad, and where there is no row at all.
    """
    return parse_rows(
        ((where, fields) for where, _, fields in files.read_rows(path, split)), str(path), on_invalid=on_invalid
    )


def detect_format(rows: Iterable[Mapping[str, Any]]) -> DatasetFormat:
    """The one shape that all rows have. DataError where there is none, or two."""
    shape: DatasetFormat | None = None
    for number, fields in enumerate(rows, 1):
        shape = _same(shape, "row 1", _shape(fields), f"row {number}", fields)
    if shape is None:
        raise DataError("there is no row to tell the shape of")
    return shape


def parse_rows(rows: Iterable[tuple[str, Mapping[str, Any]]], source: str, *, on_invalid: str = "drop") -> ChatDataset:
    """Rows, each with where it stands → conversations or passages. Rules and errors as in `read`."""
    if on_invalid not in ON_INVALID:
        raise DataError(f"bad rows: {on_invalid!r} is none of {', '.join(ON_INVALID)}")
    shape: DatasetFormat | None = None
    first, number = "", 0
    items: list[Conversation | Document] = []
    dropped: dict[str, tuple[int, str]] = {}
    noted: dict[str, tuple[int, str]] = {}
    taken: Counter[str] = Counter()
    for number, (where, fields) in enumerate(rows, 1):
        found = _shape(fields)
        shape, first = _same(shape, first, found, where, fields), first or where
        try:
            item = _item(_name(fields, number, taken), found or shape, fields)
        except InvalidSample as wrong:
            if on_invalid == "stop":
                raise DataError(f"{where}: {wrong}. Mend the row, or leave bad rows out (bad: drop).") from None
            _count(dropped, wrong.reason, f"{where}: {wrong}")
            continue
        items.append(item)
        for note in _notes(item):
            _count(noted, note, where)
    if shape is None:
        raise DataError(f"{source}: is empty, there is no row to read. Check that it was written to its end.")
    if number - len(items) > MAX_INVALID_RATIO * number:
        worst, (count, example) = max(dropped.items(), key=lambda entry: entry[1][0])
        raise DataError(
            f"{source}: {number - len(items)} of {number} rows cannot be used, read as {shape}; {count} because of: "
            f"{worst}, as {example}. Mend them, or name the columns otherwise."
        )
    return ChatDataset(tuple(items), shape, number, dropped, noted)


def _count(counts: dict[str, tuple[int, str]], reason: str, example: str) -> None:
    count, first = counts.get(reason, (0, example))
    counts[reason] = (count + 1, first)


def _name(fields: Mapping[str, Any], number: int, taken: Counter[str]) -> str:
    name = next((str(fields[key]) for key in ID_COLUMNS if fields.get(key) not in (None, "")), str(number))
    taken[name] += 1
    return name if taken[name] == 1 else f"{name}-{taken[name]}"


# --- which shape ------------------------------------------------------------------------------------------------------


def _shape(fields: Mapping[str, Any]) -> DatasetFormat | None:
    """The shape that a row's filled columns have; else the one its columns would have; else None."""
    filled = tuple(name for name, value in fields.items() if value is not None and name is not None)
    shape = _of_columns(filled) or _of_columns(tuple(name for name in fields if name is not None))
    if shape and shape.name == "messages":
        turns = _parsed(fields[shape.columns["turns"]])
        if isinstance(turns, list) and turns and isinstance(turns[0], Mapping) and {"from", "value"} <= set(turns[0]):
            return _sharegpt(shape)
    return shape


@lru_cache(maxsize=64)
def _sharegpt_of(columns: tuple[tuple[str, str], ...]) -> DatasetFormat:
    return DatasetFormat("sharegpt", dict(columns))


def _sharegpt(shape: DatasetFormat) -> DatasetFormat:
    return _sharegpt_of(tuple(shape.columns.items()))


@lru_cache(maxsize=256)
def _of_columns(names: tuple[str, ...]) -> DatasetFormat | None:
    there = {str(name).strip().lower(): name for name in reversed(names)}
    for shape, (needed, welcome) in DATASET_FORMATS.items():
        found = {part: there[name] for part, known in needed.items() for name in reversed(known) if name in there}
        if len(found) == len(needed):
            more = {part: there[name] for part, known in welcome.items() for name in reversed(known) if name in there}
            return DatasetFormat(
                shape, {**found, **{part: name for part, name in more.items() if name not in found.values()}}
            )
    return None


def _same(
    known: DatasetFormat | None, first: str, found: DatasetFormat | None, where: str, fields: Mapping[str, Any]
) -> DatasetFormat:
    """The data set's shape; that of the first row, which every other must have too."""
    if found is None and known is None:
        columns = ", ".join(repr(str(name)[:40]) for name in fields) or "none"
        pairs = " Pairs of better and worse answers are not for this task." if "chosen" in fields else ""
        raise DataError(
            f"{where}: no known shape has these columns: {columns}.{pairs} Call them messages; instruction and output; "
            "prompt and completion; question and answer; or text."
        )
    if known is None or found is None or found.name == known.name:
        return known or found  # type: ignore[return-value]
    raise DataError(
        f"two shapes in one data set: {known} as in {first}, and {found} as in {where}. Part them into two files and "
        "name both."
    )


# --- one row ----------------------------------------------------------------------------------------------------------


def _item(name: str, shape: DatasetFormat | None, fields: Mapping[str, Any]) -> Conversation | Document:
    if shape is None or not set(shape.columns.values()) & set(fields):
        raise InvalidSample("the columns are missing", ", ".join(map(str, fields)) or "none")
    part = {role: fields.get(column) for role, column in shape.columns.items()}
    if shape.name == "text":
        return Document(name, _text(part["text"], "text"))
    if shape.name in ("messages", "sharegpt"):
        turns = _turns(part["turns"])
    else:
        turns = [*_history(part.get("history")), *_asked(part["prompt"], part.get("input")), *_answered(part["answer"])]
    if part.get("system") and turns[0].role != "system":
        turns.insert(0, Message("system", _text(part["system"], "system")))
    if not any(turn.role == "assistant" for turn in turns):
        raise InvalidSample("no turn of the assistant", f"roles: {', '.join(turn.role for turn in turns)}")
    tools = _parsed(part.get("tools")) or []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InvalidSample("tools that are no list of objects")
    return Conversation(name, tuple(turns), tuple(tools))


def _turns(value: Any) -> list[Message]:
    value = _parsed(value)
    if not isinstance(value, list | tuple):
        raise InvalidSample("turns that are no list", type(value).__name__)
    if not value:
        raise InvalidSample("no turns")
    return [_turn(turn, number) for number, turn in enumerate(value, 1)]


def _turn(turn: Any, number: int) -> Message:
    if not isinstance(turn, Mapping):
        raise InvalidSample("a turn that is no object", f"turn {number} is {type(turn).__name__}")
    said = turn.get("role", turn.get("from"))
    role = ROLE_ALIASES.get(str(said).strip().lower())
    if role is None:
        raise InvalidSample("unknown role", f"turn {number} is by {said!r}; known: {', '.join(ROLE_ALIASES)}")
    content = turn.get("content", turn.get("value"))
    calls = _calls(content if role == "call" else turn.get("tool_calls"), number)
    thinking = turn.get("reasoning_content") or turn.get("thinking") or ""
    if role == "call" or (calls and content is None):
        content = ""
    return Message(
        role="assistant" if role == "call" else role,
        content=_text(content, f"turn {number}", empty=bool(calls) or role == "tool"),
        tool_calls=calls,
        name=str(turn.get("name") or ""),
        tool_call_id=str(turn.get("tool_call_id") or ""),
        reasoning_content=_text(thinking, f"turn {number}", empty=True),
    )


def _text(value: Any, what: str, *, empty: bool = False) -> str:
    """A string, or a list of pieces of text, as one string. Unusable where it is another thing, or says nothing."""
    if isinstance(value, list) and all(isinstance(piece, Mapping) and piece.get("type") == "text" for piece in value):
        value = "".join(str(piece.get("text") or "") for piece in value)
    if value is None and empty:
        return ""
    if value is not None and not isinstance(value, str):
        raise InvalidSample("content that is no text", f"{what} is {type(value).__name__} {str(value)[:40]!r}")
    if not empty and not (value and value.strip()):
        raise InvalidSample("empty text" if what == "text" else "empty turn", what)
    if not str(value).isascii() and any("\ud800" <= letter <= "\udfff" for letter in str(value)):
        raise InvalidSample("broken Unicode", f"{what} has half of a surrogate pair")
    return value or ""


def _calls(value: Any, number: int) -> tuple[Mapping[str, Any], ...]:
    """Calls of tools, their arguments as objects: templates write those, and a string of JSON would be quoted twice."""
    value = _parsed(value)
    found = []
    for call in value if isinstance(value, list) else [value] if value else []:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InvalidSample("a tool call without a function's name", f"turn {number}")
        arguments = _parsed(function.get("arguments", function.get("parameters", {})))
        extra = {"id": call["id"]} if call.get("id") else {}
        found.append({**extra, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return tuple(found)


def _asked(prompt: Any, context: Any) -> list[Message]:
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], Mapping) and "type" not in prompt[0]:
        return _turns(prompt)
    asked = _text(prompt, "prompt")
    more = _text(context, "input", empty=True)
    return [Message("user", f"{asked}\n\n{more}" if more.strip() else asked)]


def _answered(answer: Any) -> list[Message]:
    if isinstance(answer, list) and answer and isinstance(answer[0], Mapping) and "type" not in answer[0]:
        return _turns(answer)
    return [Message("assistant", _text(answer, "answer"))]


def _history(value: Any) -> list[Message]:
    """Alpaca's: pairs of what was said before by the user and by the assistant."""
    pairs = _parsed(value) or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise InvalidSample("a history that is no list of pairs")
    return [
        Message(role, _text(said, "history"))
        for pair in pairs
        for role, said in zip(("user", "assistant"), pair, strict=True)
    ]


def _parsed(value: Any) -> Any:
    """A list or object that stands in a column as JSON, as tables have them."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value.tolist() if hasattr(value, "tolist") else value


def _notes(item: Conversation | Document) -> Iterator[str]:
    """What is allowed, and rarely meant."""
    if isinstance(item, Document):
        return
    roles = [turn.role for turn in item.messages]
    pairs = list(pairwise(roles))
    if ("assistant", "assistant") in pairs:
        yield "two turns of the assistant in a row"
    if ("user", "user") in pairs:
        yield "two turns of the user in a row"
    if roles[-1] in ("user", "system"):
        yield "ends without an answer"
    if "system" in roles[1:]:
        yield "a system turn that is not the first"
