"""Parse one row of a known format into a conversation or a document. Rows are not repaired."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from mowa.data.chat.formats import ID_COLUMNS, DatasetFormat, parse_json
from mowa.data.chat.samples import Conversation, Document, ExcludedSample, InvalidSample, Message

ROLE_ALIASES = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter", "question"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot", "chatgpt", "ai", "answer"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response", "function_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),  # the assistant's tool calls in ShareGPT
}
# Field of a message → its keys, in order of preference.
MESSAGE_KEYS: dict[str, tuple[str, ...]] = {
    "role": ("role", "from", "speaker"),
    "content": ("content", "value", "text"),
    "tool_calls": ("tool_calls", "function_call"),
    "reasoning_content": ("reasoning_content", "thinking", "reasoning"),
    "name": ("name",),
    "tool_call_id": ("tool_call_id",),
    "weight": ("weight",),
    "train": ("train", "training", "loss"),
}


def parse_row(
    name: str, row_format: DatasetFormat | None, fields: Mapping[str, Any], roles: Mapping[str, str] | None = None
) -> Conversation | Document:
    """Return the conversation or document of a row; `roles` maps roles of the data set to ours.

    Raises InvalidSample, or ExcludedSample for a row that is not to be trained on.
    """
    if row_format is None or not set(row_format.columns.values()) & set(fields):
        raise InvalidSample("missing columns", ", ".join(map(str, fields)) or "none")
    values = {role: fields.get(column) for role, column in row_format.columns.items()}
    if row_format.name == "text":
        return Document(name, _parse_text(values["text"], "text"))
    if _is_good(values.get("label"), row_format.name) is False:
        raise ExcludedSample(f"{row_format.columns['label']} is false: the answer is marked as bad")
    if row_format.name in ("messages", "sharegpt"):
        messages = _parse_messages(values["turns"], roles or {})
    else:
        messages = _parse_history(values.get("history"))
        messages += _parse_prompt(values["prompt"], values.get("input"), roles or {})
        messages += _parse_answer(values["answer"], roles or {})
    if values.get("system") and messages[0].role != "system":
        messages.insert(0, Message("system", _parse_text(values["system"], "system")))
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        raise InvalidSample("no assistant message", f"roles: {', '.join(message.role for message in messages)}")
    if not any(message.trained for message in answers):
        raise ExcludedSample("no answer is to be trained on (weight: 0 or train: false)")
    tools = parse_json(values.get("tools")) or []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InvalidSample("tools is not a list of objects")
    return Conversation(name, tuple(messages), tuple(tools))


def list_unused(
    row_format: DatasetFormat | None, fields: Mapping[str, Any], roles: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Yield the columns of a row, and the keys of its turns, that hold something and are not used."""
    if row_format is None:
        return
    columns, value = row_format.columns, fields.get
    used = {*columns.values(), *ID_COLUMNS, "split"}
    for name, content in fields.items():
        if name not in used and str(name).strip().lower() not in used and not _is_nothing(content):
            yield str(name)
    if "label" in columns and _is_good(value(columns["label"]), row_format.name) is None:
        yield columns["label"]
    prompt = _read_turns(value(columns["prompt"]), roles or {}) if "prompt" in columns else None
    if "input" in columns and prompt is not None and not _is_nothing(value(columns["input"])):
        yield columns["input"]
    turns = parse_json(value(columns["turns"])) if "turns" in columns else prompt
    has_system = isinstance(turns, list) and bool(turns) and _is_system(turns[0], roles or {})
    if has_system and "system" in columns and not _is_nothing(value(columns["system"])):
        yield columns["system"]
    for column in (columns[role] for role in ("turns", "prompt", "answer") if role in columns):
        given = parse_json(value(column))
        if isinstance(given, list) and len(given) > 1 and column == columns.get("answer") and not _is_turns(given):
            yield f"{column}[1:]"
        for turn in given if isinstance(given, list) else ():
            if isinstance(turn, Mapping) and "type" not in turn:
                yield from (f"{column}[].{key}" for key in _unused_keys(turn, roles or {}))


def _unused_keys(turn: Mapping[str, Any], roles: Mapping[str, str]) -> Iterator[str]:
    used = {_first_key(turn, keys) for keys in MESSAGE_KEYS.values()}
    if _first_key(turn, MESSAGE_KEYS["role"]) is None:
        used = set(_pair_keys(turn, roles).values())
    flags = (*MESSAGE_KEYS["weight"], *MESSAGE_KEYS["train"])
    for key, value in turn.items():
        if not _is_nothing(value) and (key not in used or (key in flags and _as_bool(value) is None)):
            yield str(key)


def _is_system(turn: Any, roles: Mapping[str, str]) -> bool:
    """Return whether a turn begins with a system message, beside which the column of system messages is not used."""
    if not isinstance(turn, Mapping):
        return False
    return _find_role(turn, roles) == "system" or "system" in _pair_keys(turn, roles)


def _find_role(turn: Mapping[str, Any], roles: Mapping[str, str]) -> str | None:
    """Return the role of a turn as `ROLE_ALIASES` names it, or None if it is missing or unknown."""
    key = _first_key(turn, MESSAGE_KEYS["role"])
    return None if key is None else ROLE_ALIASES.get(str(roles.get(str(turn[key]), turn[key])).strip().lower())


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def _as_bool(value: Any) -> bool | None:
    """Return the truth of a flag: false, 0 or "false", as tables have it; None if it is no flag."""
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


def _is_good(label: Any, format_name: str) -> bool | None:
    """Return whether an answer is marked as good, as in KTO; None if the column is no such mark."""
    is_number = not isinstance(label, bool) and str(label).strip() in ("0", "1", "0.0", "1.0")
    return None if is_number and format_name != "prompt/completion" else _as_bool(label)


def _parse_messages(value: Any, roles: Mapping[str, str]) -> list[Message]:
    value = parse_json(value)
    if not isinstance(value, list | tuple):
        raise InvalidSample("messages is not a list", type(value).__name__)
    if not value:
        raise InvalidSample("no messages")
    messages: list[Message] = []
    for number, one in enumerate(value, 1):
        if not isinstance(one, Mapping):
            raise InvalidSample("a message is not an object", f"message {number} is {type(one).__name__}")
        if _first_key(one, MESSAGE_KEYS["role"]) is None and (pair := _pair_keys(one, roles)):
            messages += [Message(role, _parse_text(one[key], f"message {number}")) for role, key in pair.items()]
        else:
            messages.append(_parse_message(one, number, roles))
    return messages


def _first_key(value: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    """Return the first of `keys` whose value is not None, else the first that exists, else None."""
    found = [key for key in keys if key in value]
    return next((key for key in found if value[key] is not None), found[0] if found else None)


def _pair_keys(value: Mapping[str, Any], roles: Mapping[str, str]) -> dict[str, str]:
    """Return role → key of a turn such as {"user": …, "assistant": …}, or nothing."""
    pair = {}
    for role in ("system", "user", "assistant"):
        keys = tuple(key for key, known in (*roles.items(), *ROLE_ALIASES.items()) if known == role)
        if (key := _first_key(value, keys)) is not None and value[key] is not None:
            pair[role] = key
    return pair if "user" in pair and "assistant" in pair else {}


def _parse_message(value: Mapping[str, Any], number: int, roles: Mapping[str, str]) -> Message:
    def get(field: str) -> Any:
        key = _first_key(value, MESSAGE_KEYS[field])
        return None if key is None else value[key]

    where, there = f"message {number}", f"its keys: {', '.join(map(str, value)) or 'none'}"
    given = get("role")
    if given is None:
        raise InvalidSample("no role", f"{where}; {there}")
    role = _find_role(value, roles)
    if role is None:
        known = ", ".join(ROLE_ALIASES)
        raise InvalidSample("unknown role", f"{where} has {given!r}; known: {known}; data.roles maps others")
    content = get("content")
    tool_calls = _parse_tool_calls(content if role == "call" else get("tool_calls"), number)
    if content is None and not tool_calls and _first_key(value, MESSAGE_KEYS["content"]) is None:
        raise InvalidSample("no content", f"{where}; {there}")
    if role == "call" or (tool_calls and content is None):
        content = ""
    return Message(
        role="assistant" if role == "call" else role,
        content=_parse_text(content, where, allow_empty=bool(tool_calls) or role == "tool"),
        tool_calls=tool_calls,
        name=str(get("name") or ""),
        tool_call_id=str(get("tool_call_id") or ""),
        reasoning_content=_parse_text(get("reasoning_content"), where, allow_empty=True),
        trained=False not in (_as_bool(get("weight")), _as_bool(get("train"))),
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
    value = parse_json(value)
    tool_calls = []
    for call in value if isinstance(value, list) else [value] if value else []:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            keys = f"; its keys: {', '.join(map(str, function))}" if isinstance(function, Mapping) else ""
            raise InvalidSample("a tool call without a function name", f"message {number}{keys}")
        arguments = parse_json(function.get("arguments", function.get("parameters", {})))
        extra = {"id": call["id"]} if call.get("id") else {}
        tool_calls.append({**extra, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return tuple(tool_calls)


def _parse_prompt(prompt: Any, context: Any, roles: Mapping[str, str]) -> list[Message]:
    context_text = _parse_text(context, "input", allow_empty=True)
    if (turns := _read_turns(prompt, roles)) is not None:
        return _parse_messages(turns, roles)
    text = _parse_text(prompt, "prompt")
    return [Message("user", f"{text}\n\n{context_text}" if context_text.strip() else text)]


def _parse_answer(answer: Any, roles: Mapping[str, str]) -> list[Message]:
    """Parse an answer: a text, a number, messages, or a list of acceptable answers, of which the first is used."""
    if (turns := _read_turns(answer, roles)) is not None:
        return _parse_messages(turns, roles)
    if isinstance(answer, Mapping) and isinstance(answer.get("text"), list):  # SQuAD: with answer_start
        answer = answer["text"]
    if isinstance(answer, list) and answer and not any(isinstance(one, Mapping) for one in answer):
        answer = next((one for one in answer if not _is_nothing(one)), None)
    if isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer):
        answer = json.dumps(answer)
    return [Message("assistant", _parse_text(answer, "answer"))]


def _read_turns(value: Any, roles: Mapping[str, str]) -> Any:
    """Return messages, which tables may hold as JSON text, or None if `value` is something else, such as an answer."""
    if not isinstance(value, str):
        return value if _is_turns(value) else None
    parsed = parse_json(value)
    is_chat = _is_turns(parsed) and all(isinstance(one, Mapping) and _find_role(one, roles) for one in parsed)
    return parsed if is_chat else None


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and "type" not in value[0]


def _parse_history(value: Any) -> list[Message]:
    """Parse Alpaca's history: pairs of previous user and assistant messages."""
    pairs = parse_json(value) or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise InvalidSample("history is not a list of pairs")
    return [
        Message(role, _parse_text(text, "history"))
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
