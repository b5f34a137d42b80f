"""A chat template: render messages with it, and keep special tokens that they spell from becoming real ones.

Text in messages that spells a special token is replaced by two private-use characters before rendering and stays so in
the rendered text; `ChatTemplate.unescape` restores it. A private-use character in a message is escaped as well, so that
no message can spell a placeholder. `render` finds what is trained on, `encode` turns the text into tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mowa.data.chat.samples import InvalidSample
from mowa.errors import DataError

BUILTIN_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "plain": (  # for tokenizers without <|im_end|>: answers end with EOS
        "{% for message in messages %}{{ message['role'] | capitalize + ': ' }}"
        "{{ message['content'] }}{{ eos_token if message['role'] == 'assistant' else '' }}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
    ),
}
"""Templates for tokenizers that have none, by name."""

RESERVED_ARGUMENTS = ("messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize")
PROBE = "\ue010"
_ESCAPE = "\U000f0000"  # a private-use character; with the next one it stands for a special token, twice for itself
_FIRST = ord(_ESCAPE) + 1  # code point after it of the first special token
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and its properties.

    source                 Jinja text; None for the default of a tokenizer with several
    has_generation_blocks  whether it contains {% generation %}
    turn_end               what it writes after an answer, without trailing white space
    special_tokens         tokens that messages must not be able to write
    content_as_parts       whether message contents are lists of parts, as for vision-language models
    arguments_as_text      whether arguments of tool calls are JSON text, as in DeepSeek's templates
    arguments              further variables of the template, such as enable_thinking
    """

    tokenizer: Any
    source: str | None
    has_generation_blocks: bool
    turn_end: str
    special_tokens: tuple[str, ...]
    special_pattern: re.Pattern[str] = field(repr=False)
    content_as_parts: bool = False
    arguments_as_text: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def apply(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), *, add_generation_prompt: bool = False
    ) -> str:
        """Return the text of these messages. Raises InvalidSample if the template raises an error."""
        try:
            text: str = self.tokenizer.apply_chat_template(
                self.format_messages(messages),
                tools=list(tools) or None,
                chat_template=self.source,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self.arguments,
            )
        except Exception as error:  # templates raise errors of any kind
            line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise InvalidSample("the chat template raises an error", line[:120]) from None
        return text

    def format_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return messages with contents and arguments of tool calls as the template expects them."""
        formatted = [dict(one) for one in messages]
        for one in formatted:
            if self.content_as_parts:
                one["content"] = [{"type": "text", "text": one["content"]}]
            if self.arguments_as_text and one.get("tool_calls"):
                one["tool_calls"] = [_with_text_arguments(call) for call in one["tool_calls"]]
        return formatted

    def spells_special_tokens(self, value: Any) -> bool:
        """Return whether a string, or any string of a nested value, contains a special token."""
        if isinstance(value, str):
            return bool(self.special_pattern.search(value))
        if isinstance(value, Mapping):
            return any(self.spells_special_tokens(one) for pair in value.items() for one in pair)
        return isinstance(value, list | tuple) and any(map(self.spells_special_tokens, value))

    def escape(self, value: Any) -> Any:
        """Replace special tokens by placeholders in a string, or in all strings of a nested value.

        `unescape` restores every text, private-use characters that it holds itself included.
        """
        if isinstance(value, str):
            return self.special_pattern.sub(
                lambda found: _ESCAPE + chr(_FIRST + self.special_tokens.index(found[0])),
                value.replace(_ESCAPE, _ESCAPE * 2),
            )
        if isinstance(value, Mapping):
            return {self.escape(key): self.escape(inner) for key, inner in value.items()}
        return [self.escape(inner) for inner in value] if isinstance(value, list | tuple) else value

    def unescape(self, text: str) -> str:
        """Replace placeholders by the special tokens that the messages spelled."""

        def restore(found: re.Match[str]) -> str:
            index = ord(found[1]) - _FIRST
            return _ESCAPE if index < 0 else self.special_tokens[index]

        return re.sub(f"{_ESCAPE}([{_ESCAPE}-{chr(_FIRST + len(self.special_tokens) - 1)}])", restore, text)


def special_token_ids(tokenizer: Any) -> dict[str, int]:
    """Return the special tokens, which tokenizers leave out of text, and their ids."""
    decoder = getattr(tokenizer, "added_tokens_decoder", {})
    added = {str(token): index for index, token in decoder.items() if token.special}
    return added | dict(zip(map(str, tokenizer.all_special_tokens), tokenizer.all_special_ids, strict=True))


def resolve_chat_template(
    tokenizer: Any, chat_template: str | None = None, arguments: Mapping[str, Any] | None = None
) -> ChatTemplate:
    """Return `chat_template` (Jinja text) or the tokenizer's, which is rendered with further `arguments`.

    Raises DataError if there is none, or if it does not read one of the arguments.
    """
    if not chat_template and not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer has no chat template: set data.chat_template ({', '.join(BUILTIN_TEMPLATES)}, or a .jinja "
            "file), or use the tokenizer of the instruction-tuned checkpoint"
        )
    several = chat_template is None and isinstance(tokenizer.chat_template, Mapping)
    source = chat_template or (None if several else tokenizer.chat_template)
    specials = tuple(sorted(special_token_ids(tokenizer), key=len, reverse=True))
    pattern = re.compile("|".join(map(re.escape, specials)) or r"(?!)")
    given = dict(arguments or {})
    _validate_arguments(given, source or "".join(tokenizer.chat_template.values()))
    has_blocks = bool(source and _GENERATION.search(source))
    found = ChatTemplate(tokenizer, source, has_blocks, "", specials, pattern, arguments=given)
    messages: list[dict[str, Any]] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
    variants = (found, replace(found, content_as_parts=True))
    texts = [_try_apply(variant, messages) for variant in variants]
    if texts == [None, None]:
        return found
    used = next((index for index, text in enumerate(texts) if text and PROBE in text), None)
    if used is None:
        raise DataError("the chat template omits the assistant's messages: set another with data.chat_template")
    found = replace(variants[used], turn_end=str(texts[used]).rpartition(PROBE)[2].rstrip())
    call = {"type": "function", "function": {"name": PROBE, "arguments": {PROBE: PROBE}}}
    messages[1] |= {"content": "", "tool_calls": [call]}
    as_text = replace(found, arguments_as_text=True)
    return as_text if _try_apply(found, messages) is None and _try_apply(as_text, messages) else found


def _try_apply(template: ChatTemplate, messages: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the text of messages; None if the template raises an error."""
    try:
        return template.apply(messages)
    except InvalidSample:
        return None


def _with_text_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool call whose arguments are JSON text."""
    function = call["function"]
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def _validate_arguments(arguments: Mapping[str, Any], source: str) -> None:
    for name in arguments:
        if name in RESERVED_ARGUMENTS:
            raise DataError(f"chat_template_kwargs: {name} is set by mowa; remove it")
        if not re.search(rf"\b{re.escape(name)}\b", source):
            raise DataError(f"chat_template_kwargs: the chat template does not read {name}; correct or remove it")
