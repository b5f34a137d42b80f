"""Write an Ollama Modelfile for a GGUF file, with a Go template that renders chats as the model's Jinja template does.

`ollama create` does not run Jinja. It compares `tokenizer.chat_template` with about twenty templates that it knows, by
edit distance, and takes the Go template of one that differs in less than 100 characters; otherwise prompts are passed
as they are, without any sign of whose turn it is. So the Modelfile brings the template with it.

The Go template is not translated from the Jinja template but found by rendering: chats of words that occur nowhere else
give the text before and after each role's messages. It is used only if it renders all probe chats alike; a template of
another form (dates, turns that depend on each other) is left out, and a comment says so. Tools are always left out, and
Ollama does not trim messages, as some templates do.

Source: server/model.go (`detectChatTemplate`), template/template.go and parser/parser.go of Ollama (MIT).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mowa.errors import DataError

MAX_NUM_CTX = 8192  # tokens that Ollama allocates by default from this file; models allow more
CONTROL = 3  # token_type of tokens that are never text
_SYSTEM, _USERS, _ANSWERS = "Zqsystemqz", ("Zqaskqz", "Zqbegqz", "Zqcryqz"), ("Zqeatqz", "Zqfarqz")
_CONTENTS = re.compile("|".join((_SYSTEM, *_USERS, *_ANSWERS)))
_SAMPLING = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
_PENALTY = ("repetition_penalty", "repeat_penalty")
Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class TurnTexts:
    """The text around messages, as a chat template writes it.

    first           before the first question of a chat without system prompt
    system          around the system prompt, before the first question; None if the template takes none
    user            before any other question, and after each
    assistant       before each answer, and after all but an unfinished last one
    generation      after the last question
    """

    first: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    generation: str

    def render(self, messages: Sequence[Message]) -> str:
        """Return what the Go template gives for a chat whose last message is a question."""
        system = "\n\n".join(one["content"] for one in messages if one["role"] == "system")
        opening = self.first
        if system and self.system is not None:
            opening = f"{self.system[0]}{system}{self.system[1]}"
        parts = []
        for message in messages:
            if message["role"] == "user":
                parts += [opening, message["content"], self.user[1]]
                opening = self.user[0]
            elif message["role"] == "assistant":
                parts += [self.assistant[0], message["content"], self.assistant[1]]
        return "".join(parts) + self.generation


def modelfile(
    gguf_name: str,
    metadata: Mapping[str, Any],
    chat_template: str | None,
    *,
    system: str = "",
    adapter: str | None = None,
    generation_config: Mapping[str, Any] | None = None,
) -> str:
    """Return the text of a Modelfile.

    Args:
        gguf_name: name of the file, in the folder of the Modelfile.
        metadata: of the file.
        chat_template: in Jinja; None: prompts are passed as they are.
        system: default system prompt.
        adapter: name of a LoRA adapter's GGUF file in the same folder.
        generation_config: of transformers; sampling settings, and tokens that end a turn.

    Raises DataError if a text cannot be stored, or if there is a system prompt and the template takes none.
    """
    settings = generation_config or {}
    turns, reason = find_turns(chat_template, metadata) if chat_template else (None, "the model has no chat template")
    if system and turns is not None and turns.system is None:
        raise DataError("the chat template takes no system prompt: leave it out, or put it into the first message")
    lines = [f"FROM {_file(gguf_name)}"]
    if adapter is not None:
        lines.append(f"ADAPTER {_file(adapter)}")
    if turns is not None:
        lines += [_template_comment(str(chat_template), turns), f'TEMPLATE """{go_template(turns)}"""']
    else:
        lines.append(f"# Without TEMPLATE: {reason}. Ollama uses a template of its own if it knows the model's.")
    if system:
        lines.append(f'SYSTEM """{_triple_quoted(system, "the system prompt")}"""')
    lines += [f"PARAMETER {name} {value}" for name, value in _parameters(metadata, settings)]
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in _stops(metadata, settings, turns)]
    if license_name := metadata.get("general.license"):
        lines.append(f'LICENSE """{_triple_quoted(str(license_name), "the license")}"""')
    return "\n".join(lines) + "\n"


def find_turns(chat_template: str, metadata: Mapping[str, Any]) -> tuple[TurnTexts | None, str]:
    """Return the texts around messages, and why a template has none that hold for all chats.

    A beginning-of-sequence token that the tokenizer adds by itself is not part of them.
    """
    if "strftime_now" in chat_template:
        return None, "the chat template writes the date"
    tokens = _special_tokens(metadata)
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", metadata.get("tokenizer.ggml.model") == "llama")
    bos = tokens.get("bos_token", "") if adds_bos else ""

    def render(messages: Sequence[Message], generation: bool = True) -> str | None:
        text = _render_jinja(chat_template, messages, tokens, generation)
        return None if text is None else text.removeprefix(bos)

    chat = _probe()
    with_system = [{"role": "system", "content": _SYSTEM}, *chat]
    plain, full = _split(render(chat), chat), _split(render(with_system), with_system)
    question, answer = (_split(render(chat[:count], False), chat[:count]) for count in (1, 2))
    if plain is None or question is None or answer is None:
        return None, "the chat template does not write message after message"
    if full is None and _SYSTEM in (render(with_system) or ""):
        return None, "the chat template writes the system prompt in a way of its own"
    eos = tokens.get("eos_token", "")
    user_end, answer_end = _end(question[-1], plain[1], eos), _end(answer[-1], plain[2], eos)
    turns = TurnTexts(
        first=plain[0],
        system=None if full is None else (full[0], full[1]),
        user=(plain[2].removeprefix(answer_end), user_end),
        assistant=(plain[1].removeprefix(user_end), answer_end),
        generation=plain[-1].removeprefix(user_end),
    )
    different = next((one for one in _chats(full is not None) if render(one) != turns.render(one)), None)
    if different is not None:
        roles = ", ".join(message["role"] for message in different)
        return None, f"the chat template writes messages of {roles} in a way of its own"
    return turns, ""


def _end(alone: str, between: str, eos: str) -> str:
    """Return what ends a message, given the text after a last one, and between one and the next."""
    if not between.startswith(alone):
        alone = alone.removesuffix(eos)  # some templates end texts to train on with it
    return next(alone[:end] for end in range(len(alone), -1, -1) if between.startswith(alone[:end]))


def _probe() -> list[Message]:
    roles = [("user", _USERS[0]), ("assistant", _ANSWERS[0]), ("user", _USERS[1]), ("assistant", _ANSWERS[1])]
    return [{"role": role, "content": content} for role, content in (*roles, ("user", _USERS[2]))]


def _chats(takes_system: bool) -> list[list[Message]]:
    """Return chats that the Go template must render as the Jinja template does."""
    texts = ("Why?", 'Say "{{ .X }}"\n\n{% raw %} <b>ś</b>', "1 + 1 = 2\nok", "And?", "Zoë & co.")
    chat = [{"role": one["role"], "content": text} for one, text in zip(_probe(), texts, strict=True)]
    chats = [chat[:count] for count in (1, 3, 5)] + [_probe()]
    if takes_system:
        chats += [[{"role": "system", "content": "Be brief.\nBe kind."}, *one] for one in chats]
    return chats


def _split(text: str | None, messages: Sequence[Message]) -> list[str] | None:
    """Return the text before, between and after the messages; None unless each is there once, in order."""
    if text is None or _CONTENTS.findall(text) != [one["content"] for one in messages]:
        return None
    return _CONTENTS.split(text)


def _render_jinja(
    chat_template: str, messages: Sequence[Message], tokens: Mapping[str, str], generation: bool
) -> str | None:
    """Render with transformers; None if the template rejects the chat."""
    from transformers.utils.chat_template_utils import render_jinja_template

    options: dict[str, Any] = {"add_generation_prompt": generation, **tokens}
    try:
        rendered: Any = render_jinja_template([list(messages)], chat_template=chat_template, **options)
    except Exception:  # templates raise errors of any kind
        return None
    return str(rendered[0][0])  # beside what was generated


def _special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of special tokens by the names that templates use."""
    texts, found = metadata.get("tokenizer.ggml.tokens", ()), {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and 0 <= int(index) < len(texts):
            found[f"{role}_token"] = str(texts[int(index)])
    return found


def go_template(turns: TurnTexts) -> str:
    """Return a template of Go's text/template over `.System` and `.Messages`, as Ollama fills them."""
    user, assistant = turns.user, turns.assistant
    nothing: tuple[str, str] = ("", "")
    before, after = turns.system or nothing
    declared, start = "", _literal(user[0])
    if turns.first.endswith(user[0]) and (turns.system is None or after.endswith(user[0])):
        opening = _literal(turns.first.removesuffix(user[0]))
        given = f"{_literal(before)}{{{{ .System }}}}{_literal(after.removesuffix(user[0]))}"
    else:  # the first question begins in another way, or has the system prompt in it
        declared, opening = "{{ $first := true }}", _literal(turns.first)
        given = f"{_literal(before)}{{{{ $.System }}}}{_literal(after)}"
    if turns.system is not None:
        otherwise = f"{{{{ else }}}}{opening}" if opening else ""
        opening = f"{{{{ if $.System }}}}{given}{otherwise}{{{{ end }}}}"
    if declared:
        start = f"{{{{ if $first }}}}{opening}{{{{ $first = false }}}}{{{{ else }}}}{start}{{{{ end }}}}"
        opening = declared
    is_last = "eq (len (slice $.Messages $index)) 1"
    return (
        f"{opening}{{{{ range $index, $_ := .Messages }}}}"
        f'{{{{ if eq .Role "user" }}}}{start}{{{{ .Content }}}}{_literal(user[1])}'
        f'{{{{ else if eq .Role "assistant" }}}}{_literal(assistant[0])}{{{{ .Content }}}}'
        f"{{{{ if not ({is_last}) }}}}{_literal(assistant[1])}{{{{ end }}}}{{{{ end }}}}"
        f'{{{{ if and ({is_last}) (ne .Role "assistant") }}}}{_literal(turns.generation)}{{{{ end }}}}{{{{ end }}}}'
    )


def _literal(text: str) -> str:
    """Return text of a Go template that gives `text`; what templates or Modelfiles cannot hold is a Go constant."""

    def constant(found: re.Match[str]) -> str:
        if found[0].isprintable() and found[0][0] not in '{"':
            return found[0]
        escaped = (f"\\{one}" if one == '"' else one if one.isprintable() else f"\\U{ord(one):08x}" for one in found[0])
        return f'{{{{ "{"".join(escaped)}" }}}}'

    return re.sub(r'\{+|"{3,}|[^\x20-\x7e\n]', constant, text)


def _template_comment(chat_template: str, turns: TurnTexts) -> str:
    notes = ["This TEMPLATE renders chats as the model's own chat template does"]
    if "tool" in chat_template:
        notes.append("tools are left out")
    if turns.system is None:
        notes.append("it takes no system prompt")
    return f"# {'; '.join(notes)}."


def _parameters(metadata: Mapping[str, Any], settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    context = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if context is not None:
        found.append(("num_ctx", str(min(int(context), MAX_NUM_CTX))))
    if settings.get("do_sample"):
        found += [(name, f"{settings[key]:g}") for key, name in _SAMPLING.items() if settings.get(key) is not None]
    elif settings.get("do_sample") is False:
        found.append(("temperature", "0"))
    if settings.get(_PENALTY[0]) not in (None, 1, 1.0):
        found.append((_PENALTY[1], f"{settings[_PENALTY[0]]:g}"))
    return found


def _stops(metadata: Mapping[str, Any], settings: Mapping[str, Any], turns: TurnTexts | None) -> list[str]:
    """Return the tokens that end a turn, without repetitions."""
    tokens, types = metadata.get("tokenizer.ggml.tokens", ()), metadata.get("tokenizer.ggml.token_type", ())
    ids = settings.get("eos_token_id") or []
    keys = ("eos", "eot", "eom")
    wanted = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in keys] + (
        list(ids) if isinstance(ids, Sequence) else [ids]
    )
    found = [str(tokens[int(index)]) for index in wanted if index is not None and 0 <= int(index) < len(tokens)]
    end = turns.assistant[1].strip() if turns is not None else ""
    if end in tokens and len(types) > (index := list(tokens).index(end)) and int(types[index]) == CONTROL:
        found.append(end)
    return list(dict.fromkeys(one for one in found if one))


def _file(name: str) -> str:
    if "\n" in name or "\r" in name or name != name.strip():
        raise DataError(f"a Modelfile cannot name the file {name!r}: rename it")
    return name if name.startswith(("/", "./", "../")) else f"./{name}"


def _quoted(text: str) -> str:
    """Return a value in double quotes: those inside are read as they are, as nothing is escaped."""
    if "\n" in text or not text.isprintable():
        raise DataError(f"a Modelfile cannot hold the stop token {text!r}")
    return f'"{text}"'


def _triple_quoted(text: str, what: str) -> str:
    if '"""' in text or text.endswith('"') or not re.sub(r"[\n\t]", "", text).isprintable():
        raise DataError(
            f"a Modelfile cannot hold {what}: it has three double quotes, one at its end, or control characters"
        )
    return text
