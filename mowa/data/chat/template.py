"""Render conversations with a chat template, and find the spans that the assistant writes.

Templates with {% generation %} mark these spans themselves. For others, an answer begins where the generation prompt
for it ends (`add_generation_prompt`) and ends where the conversation up to it ends; both are rendered, so that no
markers have to be known. If later messages change how earlier ones are rendered (reasoning that is removed, a system
message that moves to the last question), each answer becomes a sample of its own, as the model will be prompted.

Text in messages that spells a special token is replaced by private-use characters before rendering and stays so in
`RenderedConversation.text`; `ChatTemplate.unescape` restores it. `tokenize` turns the text into tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mowa.data.chat.conversations import Conversation, InvalidSample, Message
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

_PRIVATE_USE = 0xF0000  # Unicode plane whose characters stand for special tokens
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "\ue010"


@dataclass(frozen=True, slots=True)
class RenderedConversation:
    """Rendered text, and the spans [start, end) of its characters to train on. `escaped`: it holds placeholders."""

    id: str
    text: str
    trained_spans: tuple[tuple[int, int], ...]
    escaped: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and its properties.

    source                 Jinja text; None for the default of a tokenizer with several
    has_generation_blocks  whether it contains {% generation %}
    turn_end               what it writes after an answer, without trailing white space
    special_tokens         tokens that messages must not be able to write
    placeholder_base       code point of the placeholder of the first special token
    content_as_parts       whether message contents are lists of parts, as for vision-language models
    """

    tokenizer: Any
    source: str | None
    has_generation_blocks: bool
    turn_end: str
    special_tokens: tuple[str, ...]
    special_pattern: re.Pattern[str] = field(repr=False)
    placeholder_base: int = _PRIVATE_USE
    content_as_parts: bool = False

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
            )
        except Exception as error:  # templates raise errors of any kind
            line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise InvalidSample("the chat template raises an error", line[:120]) from None
        return text

    def format_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return messages whose contents are strings or lists of parts, as the template expects."""
        if not self.content_as_parts:
            return [dict(one) for one in messages]
        return [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]

    def unescape(self, text: str) -> str:
        """Replace placeholders by the special tokens that the messages spelled."""
        last = chr(self.placeholder_base + len(self.special_tokens) - 1)
        return re.sub(
            f"[{chr(self.placeholder_base)}-{last}]",
            lambda found: self.special_tokens[ord(found[0]) - self.placeholder_base],
            text,
        )

    def escape(self, value: Any) -> Any:
        """Replace special tokens by placeholders in a string, or in all strings of a nested value."""
        if isinstance(value, str):
            return self.special_pattern.sub(
                lambda found: chr(self.placeholder_base + self.special_tokens.index(found[0])), value
            )
        if isinstance(value, Mapping):
            return {key: self.escape(inner) for key, inner in value.items()}
        return [self.escape(inner) for inner in value] if isinstance(value, list | tuple) else value


def special_token_ids(tokenizer: Any) -> dict[str, int]:
    """Return the special tokens, which tokenizers leave out of text, and their ids."""
    decoder = getattr(tokenizer, "added_tokens_decoder", {})
    added = {str(token): index for index, token in decoder.items() if token.special}
    return added | dict(zip(map(str, tokenizer.all_special_tokens), tokenizer.all_special_ids, strict=True))


def resolve_chat_template(tokenizer: Any, chat_template: str | None = None) -> ChatTemplate:
    """Return `chat_template` (Jinja text) or the tokenizer's. Raises DataError if there is none."""
    if not chat_template and not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer has no chat template: set data.chat_template ({', '.join(BUILTIN_TEMPLATES)}, or a .jinja "
            "file), or use the tokenizer of the instruction-tuned checkpoint"
        )
    several = chat_template is None and isinstance(tokenizer.chat_template, Mapping)
    source = chat_template or (None if several else tokenizer.chat_template)
    specials = tuple(sorted(special_token_ids(tokenizer), key=len, reverse=True))
    pattern = re.compile("|".join(map(re.escape, specials)) or r"(?!)")
    found = ChatTemplate(tokenizer, source, bool(source and _GENERATION.search(source)), "", specials, pattern)
    try:
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        if _PROBE not in found.apply(messages):
            found = replace(found, content_as_parts=True)
        text = found.apply(messages)
    except InvalidSample:
        return found
    if _PROBE not in text:
        raise DataError("the chat template omits the assistant's messages: set another with data.chat_template")
    return replace(found, turn_end=text.rpartition(_PROBE)[2].rstrip())


def render_conversation(
    template: ChatTemplate, conversation: Conversation, train_on: str
) -> list[RenderedConversation]:
    """Return the text or texts to train on. `train_on` is responses, last or all.

    Raises InvalidSample if the template raises an error.
    """
    messages = [_to_dict(message) for message in conversation.messages]
    tools: Sequence[Any] = conversation.tools
    with_placeholders = template.escape([messages, list(tools)])
    escaped = with_placeholders != [messages, list(tools)]
    if escaped:
        messages, tools = with_placeholders
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on == "last":
        answers = answers[-1:]
    if template.has_generation_blocks and train_on != "all":
        text, marked = _generation_spans(template, messages, tools)
        return [
            RenderedConversation(conversation.id, text, tuple(marked[-1:] if train_on == "last" else marked), escaped)
        ]
    whole = template.apply(messages, tools)
    if train_on == "all":
        return [RenderedConversation(conversation.id, whole, ((0, len(whole)),), escaped)]
    spans: list[tuple[int, int]] = []
    warnings: list[str] = []
    for index in answers:
        span, warning = _find_span(template, messages, tools, index, whole)
        warnings += [warning] if warning else []
        if span is None:
            return _render_separately(template, conversation.id, messages, tools, answers, escaped)
        spans.append(span)
    return [RenderedConversation(conversation.id, whole, tuple(spans), escaped, tuple(warnings))]


def _to_dict(message: Message) -> dict[str, Any]:
    """Return a message as templates read it; they use either name of the reasoning."""
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        fields["tool_calls"] = [dict(call) for call in message.tool_calls]
    for name in ("name", "tool_call_id"):
        if getattr(message, name):
            fields[name] = getattr(message, name)
    if message.reasoning_content:
        fields |= {"reasoning_content": message.reasoning_content, "thinking": message.reasoning_content}
    return fields


def _generation_spans(
    template: ChatTemplate, messages: Sequence[Any], tools: Sequence[Any]
) -> tuple[str, list[tuple[int, int]]]:
    """Return the text and the spans of its {% generation %} blocks, rendered by transformers."""
    from transformers.utils.chat_template_utils import render_jinja_template

    tokenizer = template.tokenizer
    try:
        rendered: Any = render_jinja_template(
            conversations=[template.format_messages(messages)],
            tools=list(tools) or None,
            chat_template=template.source,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        texts, spans = rendered
    except Exception as error:  # as in ChatTemplate.apply
        raise InvalidSample("the chat template raises an error", str(error)[:120]) from None
    return str(texts[0]), [(start, end) for start, end in spans[0]]


def _find_span(
    template: ChatTemplate, messages: Sequence[Any], tools: Sequence[Any], index: int, whole: str
) -> tuple[tuple[int, int] | None, str]:
    """Return the span of answer `index` in the whole text, and a warning.

    The span is None if the text before the answer is not the prompt with which the model would be asked for it.
    """
    through = whole if index == len(messages) - 1 else template.apply(messages[: index + 1], tools)
    prompt, warning = _prompt_before(template, messages, tools, index, through)
    if not whole.startswith(prompt):
        return None, warning
    end = _answer_end(template, through)
    if not whole.startswith(through[:end]):
        end = _common_end(template, through, whole)
        content = str(messages[index]["content"]).strip()
        if end <= len(prompt) or content not in through[len(prompt) : end]:
            return None, warning
    return (len(prompt), end), warning


def _prompt_before(
    template: ChatTemplate, messages: Sequence[Any], tools: Sequence[Any], index: int, through: str
) -> tuple[str, str]:
    """Return the text before answer `index`, and a warning.

    It is the generation prompt if the answer begins with it, else what two different contents have in common.
    """
    try:
        prompt = template.apply(messages[:index], tools, add_generation_prompt=True) if index else ""
    except InvalidSample:
        prompt = ""
    if prompt and through.startswith(prompt):
        return prompt, ""
    probes = (_PROBE, chr(ord(_PROBE) + 1))
    texts = [template.apply([*messages[:index], {**messages[index], "content": one}], tools) for one in probes]
    return texts[0][: _first_difference(*texts, default=0)], "answers do not begin with the generation prompt"


def _answer_end(template: ChatTemplate, through: str) -> int:
    """Return the length of a text that ends with an answer, without white space after the token that ends it."""
    stripped = through.rstrip()
    if template.turn_end and stripped.endswith(template.turn_end):
        return len(stripped)
    if any(stripped.endswith(special) for special in template.special_tokens):
        return len(stripped)
    return len(through)


def _common_end(template: ChatTemplate, through: str, whole: str) -> int:
    """Return the length of the common prefix if only special tokens and white space follow it in `through`, else 0."""
    same = _first_difference(through, whole, default=min(len(through), len(whole)))
    for match in template.special_pattern.finditer(through):
        if match.start() < same < match.end():
            same = match.start()
    rest = template.special_pattern.sub("", through[same:])
    return len(through[:same].rstrip()) if not rest.strip() else 0


def _first_difference(one: str, other: str, *, default: int) -> int:
    return next((index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), default)


def _render_separately(
    template: ChatTemplate,
    name: str,
    messages: Sequence[Any],
    tools: Sequence[Any],
    answers: Sequence[int],
    escaped: bool,
) -> list[RenderedConversation]:
    """Render each answer as the end of a text of its own."""
    rendered: list[RenderedConversation] = []
    for index in answers:
        text = template.apply(messages[: index + 1], tools)
        prompt, warning = _prompt_before(template, messages, tools, index, text)
        warnings = ("the template rewrites earlier messages", *([warning] if warning else []))
        label = name if len(answers) == 1 else f"{name}#{len(rendered) + 1}"
        if text.startswith(prompt):
            text = text[: _answer_end(template, text)]
            rendered.append(RenderedConversation(label, text, ((len(prompt), len(text)),), escaped, warnings))
    return rendered
