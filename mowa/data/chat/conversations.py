"""Parse rows of any usual dataset format into conversations and documents, and count the invalid ones.

`files` reads the rows, `template` and `tokenize` use the result. Rows are not repaired: an invalid row is reported with
its position and the reason.
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
MAX_INVALID_RATIO = 0.5  # with more invalid rows the format was probably detected wrongly
ID_COLUMNS = ("id", "uid", "uuid", "conversation_id", "prompt_id", "key")
ROLE_ALIASES = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter", "question"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot", "chatgpt", "ai", "answer"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response", "function_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),  # the assistant's tool calls in ShareGPT
}
_ANSWERS = ("output", "response", "completion", "answer", "answers", "target")
# Format → names of its required and of its optional columns. The first format whose required columns exist is used.
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
    """One turn. `role` is system, developer, user, assistant or tool."""

    role: str
    content: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    name: str = ""
    tool_call_id: str = ""
    reasoning_content: str = ""


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


@dataclass(frozen=True, slots=True)
class DatasetFormat:
    """Format of a data set: a key of `DATASET_FORMATS` or sharegpt, and the column of each of its roles."""

    name: str
    columns: Mapping[str, str]

    def __str__(self) -> str:
        columns = ", ".join(role if role == name else f"{role} in {name}" for role, name in self.columns.items())
        return f"{self.name} ({columns})"


@dataclass(frozen=True, slots=True)
class ChatDataset:
    """Samples of a data set. `dropped` and `warnings` map a reason to (number of rows, the first one)."""

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
    """A row that is not a conversation: a reason to count by, and the detail of this row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason + (f" ({detail})" if detail else ""))
        self.reason = reason


def read_conversations(path: str | Path, split: str = "", *, on_invalid: str = "drop") -> ChatDataset:
    """Read the conversations and documents at `path`, in order; `files.SUPPORTED_FILES` lists what it may be.

    `on_invalid` is drop (and count by reason) or stop (raise at the first invalid row). Raises DataError if the data
    cannot be read, mixes two formats, has no rows, or if more than half of the rows are invalid.
    """
    return parse_rows(
        ((where, fields) for where, _, fields in files.read_rows(path, split)), str(path), on_invalid=on_invalid
    )


def detect_format(rows: Iterable[Mapping[str, Any]]) -> DatasetFormat:
    """Return the format that all rows have. Raises DataError if there is none or more than one."""
    detected: DatasetFormat | None = None
    for number, fields in enumerate(rows, 1):
        detected = _agree(detected, "row 1", _row_format(fields), f"row {number}", fields)
    if detected is None:
        raise DataError("no rows, so the dataset format cannot be detected")
    return detected


def parse_rows(rows: Iterable[tuple[str, Mapping[str, Any]]], source: str, *, on_invalid: str = "drop") -> ChatDataset:
    """Parse rows, given with their positions, into conversations and documents. Errors as `read_conversations`."""
    if on_invalid not in ON_INVALID:
        raise DataError(f"on_invalid: {on_invalid!r} is none of {', '.join(ON_INVALID)}")
    detected: DatasetFormat | None = None
    first, number = "", 0
    samples: list[Conversation | Document] = []
    dropped: dict[str, tuple[int, str]] = {}
    warnings: dict[str, tuple[int, str]] = {}
    ids: Counter[str] = Counter()
    for number, (where, fields) in enumerate(rows, 1):
        row_format = _row_format(fields)
        detected, first = _agree(detected, first, row_format, where, fields), first or where
        try:
            sample = _parse_row(_unique_id(fields, number, ids), row_format or detected, fields)
        except InvalidSample as error:
            if on_invalid == "stop":
                raise DataError(
                    f"{where}: {error}. Correct the row, or drop invalid rows (on_invalid: drop)."
                ) from None
            _count(dropped, error.reason, f"{where}: {error}")
            continue
        samples.append(sample)
        for warning in _warnings(sample):
            _count(warnings, warning, where)
    if detected is None:
        raise DataError(f"{source}: is empty: it has no rows. Check that it was written completely.")
    if number - len(samples) > MAX_INVALID_RATIO * number:
        reason, (count, example) = max(dropped.items(), key=lambda entry: entry[1][0])
        raise DataError(
            f"{source}: {number - len(samples)} of {number} rows are invalid as {detected}; {count} of them because "
            f"of: {reason} ({example}). Correct them, or rename the columns."
        )
    return ChatDataset(tuple(samples), detected, number, dropped, warnings)


def _count(counts: dict[str, tuple[int, str]], reason: str, example: str) -> None:
    count, first = counts.get(reason, (0, example))
    counts[reason] = (count + 1, first)


def _unique_id(fields: Mapping[str, Any], number: int, ids: Counter[str]) -> str:
    name = next((str(fields[key]) for key in ID_COLUMNS if fields.get(key) not in (None, "")), str(number))
    ids[name] += 1
    return name if ids[name] == 1 else f"{name}-{ids[name]}"


# --- dataset format ---------------------------------------------------------------------------------------------------


def _row_format(fields: Mapping[str, Any]) -> DatasetFormat | None:
    """Return the format of a row by its columns that are not None, else by all its columns, else None."""
    filled = tuple(name for name, value in fields.items() if value is not None and name is not None)
    row_format = _format_of(filled) or _format_of(tuple(name for name in fields if name is not None))
    if row_format and row_format.name == "messages":
        turns = _parse_json(fields[row_format.columns["turns"]])
        if isinstance(turns, list) and turns and isinstance(turns[0], Mapping) and {"from", "value"} <= set(turns[0]):
            return _sharegpt_format(tuple(row_format.columns.items()))
    return row_format


@lru_cache(maxsize=64)
def _sharegpt_format(columns: tuple[tuple[str, str], ...]) -> DatasetFormat:
    return DatasetFormat("sharegpt", dict(columns))


@lru_cache(maxsize=256)
def _format_of(names: tuple[str, ...]) -> DatasetFormat | None:
    by_lower = {str(name).strip().lower(): name for name in reversed(names)}

    def find(aliases: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
        return {role: by_lower[name] for role, known in aliases.items() for name in reversed(known) if name in by_lower}

    for format_name, (required_aliases, optional_aliases) in DATASET_FORMATS.items():
        required = find(required_aliases)
        if len(required) == len(required_aliases):
            optional = {role: name for role, name in find(optional_aliases).items() if name not in required.values()}
            return DatasetFormat(format_name, {**required, **optional})
    return None


def _agree(
    detected: DatasetFormat | None, first: str, row_format: DatasetFormat | None, where: str, fields: Mapping[str, Any]
) -> DatasetFormat:
    """Return the format of the data set, which is that of its first row. Raises DataError if this row has another."""
    if row_format is None and detected is None:
        columns = ", ".join(repr(str(name)[:40]) for name in fields) or "none"
        preference = " Preference pairs (chosen, rejected) are not supported." if "chosen" in fields else ""
        raise DataError(
            f"{where}: no known dataset format has these columns: {columns}.{preference} Name them messages; "
            "instruction and output; prompt and completion; question and answer; or text."
        )
    if detected is None or row_format is None or row_format.name == detected.name:
        return detected or row_format  # type: ignore[return-value]
    raise DataError(
        f"two formats in one data set: {detected} in {first}, and {row_format} in {where}. Split it into two files."
    )


# --- one row ----------------------------------------------------------------------------------------------------------


def _parse_row(name: str, row_format: DatasetFormat | None, fields: Mapping[str, Any]) -> Conversation | Document:
    if row_format is None or not set(row_format.columns.values()) & set(fields):
        raise InvalidSample("missing columns", ", ".join(map(str, fields)) or "none")
    values = {role: fields.get(column) for role, column in row_format.columns.items()}
    if row_format.name == "text":
        return Document(name, _parse_text(values["text"], "text"))
    if row_format.name in ("messages", "sharegpt"):
        messages = _parse_messages(values["turns"])
    else:
        messages = _parse_history(values.get("history"))
        messages += _parse_prompt(values["prompt"], values.get("input"))
        messages += _parse_answer(values["answer"])
    if values.get("system") and messages[0].role != "system":
        messages.insert(0, Message("system", _parse_text(values["system"], "system")))
    if not any(message.role == "assistant" for message in messages):
        raise InvalidSample("no assistant message", f"roles: {', '.join(message.role for message in messages)}")
    tools = _parse_json(values.get("tools")) or []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InvalidSample("tools is not a list of objects")
    return Conversation(name, tuple(messages), tuple(tools))


def _parse_messages(value: Any) -> list[Message]:
    value = _parse_json(value)
    if not isinstance(value, list | tuple):
        raise InvalidSample("messages is not a list", type(value).__name__)
    if not value:
        raise InvalidSample("no messages")
    return [_parse_message(one, number) for number, one in enumerate(value, 1)]


def _parse_message(value: Any, number: int) -> Message:
    if not isinstance(value, Mapping):
        raise InvalidSample("a message is not an object", f"message {number} is {type(value).__name__}")
    given = value.get("role", value.get("from"))
    role = ROLE_ALIASES.get(str(given).strip().lower())
    if role is None:
        raise InvalidSample("unknown role", f"message {number} has {given!r}; known: {', '.join(ROLE_ALIASES)}")
    content = value.get("content", value.get("value"))
    tool_calls = _parse_tool_calls(content if role == "call" else value.get("tool_calls"), number)
    reasoning = value.get("reasoning_content") or value.get("thinking") or ""
    if role == "call" or (tool_calls and content is None):
        content = ""
    return Message(
        role="assistant" if role == "call" else role,
        content=_parse_text(content, f"message {number}", allow_empty=bool(tool_calls) or role == "tool"),
        tool_calls=tool_calls,
        name=str(value.get("name") or ""),
        tool_call_id=str(value.get("tool_call_id") or ""),
        reasoning_content=_parse_text(reasoning, f"message {number}", allow_empty=True),
    )


def _parse_text(value: Any, source: str, *, allow_empty: bool = False) -> str:
    """Return a string, or the joined parts of a list of text parts. Raises InvalidSample for others and empty ones."""
    if isinstance(value, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in value):
        value = "".join(str(part.get("text") or "") for part in value)
    if value is None and allow_empty:
        return ""
    if value is not None and not isinstance(value, str):
        raise InvalidSample("content is not text", f"{source} is {type(value).__name__} {str(value)[:40]!r}")
    if not allow_empty and not (value and value.strip()):
        raise InvalidSample("empty text" if source == "text" else "empty message", source)
    if not str(value).isascii() and any("\ud800" <= c <= "\udfff" for c in str(value)):
        raise InvalidSample("invalid Unicode", f"{source} has half of a surrogate pair")
    return value or ""


def _parse_tool_calls(value: Any, number: int) -> tuple[Mapping[str, Any], ...]:
    """Return tool calls with arguments as objects: templates serialize them, which would escape strings twice."""
    value = _parse_json(value)
    tool_calls = []
    for call in value if isinstance(value, list) else [value] if value else []:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InvalidSample("a tool call without a function name", f"message {number}")
        arguments = _parse_json(function.get("arguments", function.get("parameters", {})))
        extra = {"id": call["id"]} if call.get("id") else {}
        tool_calls.append({**extra, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return tuple(tool_calls)


def _parse_prompt(prompt: Any, context: Any) -> list[Message]:
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], Mapping) and "type" not in prompt[0]:
        return _parse_messages(prompt)
    text = _parse_text(prompt, "prompt")
    context_text = _parse_text(context, "input", allow_empty=True)
    return [Message("user", f"{text}\n\n{context_text}" if context_text.strip() else text)]


def _parse_answer(answer: Any) -> list[Message]:
    if isinstance(answer, list) and answer and isinstance(answer[0], Mapping) and "type" not in answer[0]:
        return _parse_messages(answer)
    return [Message("assistant", _parse_text(answer, "answer"))]


def _parse_history(value: Any) -> list[Message]:
    """Parse Alpaca's history: pairs of previous user and assistant messages."""
    pairs = _parse_json(value) or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise InvalidSample("history is not a list of pairs")
    return [
        Message(role, _parse_text(text, "history"))
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _parse_json(value: Any) -> Any:
    """Parse a column that holds a JSON list or object as a string; convert numpy arrays to lists."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value.tolist() if hasattr(value, "tolist") else value


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
