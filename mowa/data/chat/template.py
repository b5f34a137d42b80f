"""A conversation and a chat template → text, and which characters of it are the assistant's to say.

Templates with {% generation %} say so themselves. Of any other, a turn begins where the prompt for it ends
(`add_generation_prompt`) and ends where the conversation up to it ends, both by rendering, so that no marker has to be
known. Where later turns change how earlier ones are written (thoughts that are taken out, a system turn that moves to
the last question), each answer becomes a text of its own, which is what the model will be asked with.

What a text's tokens are is not known here (`chat`). Words of a person that spell a special token are replaced by single
characters that occur nowhere else before a template sees them, and stay so in `Rendered.text`: `Template.restored`
puts them back.
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
    "plain": (  # for a tokenizer without <|im_end|>: answers end with the token that ends every text
        "{% for message in messages %}{{ message['role'] | capitalize + ': ' }}"
        "{{ message['content'] }}{{ eos_token if message['role'] == 'assistant' else '' }}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
    ),
}
"""Templates of our own, by name, for tokenizers that have none."""

_PLANE = 0xF0000  # private use: a character for each special token
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "\ue010"


@dataclass(frozen=True, slots=True)
class RenderedConversation:
    """`text`, and the spans [begin, end) of its characters that are learnt. `guarded`: it holds stand-ins."""

    id: str
    text: str
    trained_spans: tuple[tuple[int, int], ...]
    escaped: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, or one given, and what was found out about it.

    marker: what it writes after an answer, without the space after that; marks: it has {% generation %};
    lists: it wants contents as lists of pieces, as those of models that see do.
    """

    tokenizer: Any
    source: str | None
    has_generation_blocks: bool
    turn_end: str
    special_tokens: tuple[str, ...]
    special_pattern: re.Pattern[str] = field(repr=False)
    placeholder_base: int = _PLANE
    content_as_parts: bool = False

    def apply(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), *, add_generation_prompt: bool = False
    ) -> str:
        """The text of these messages. Unusable where the template refuses them."""
        try:
            written: str = self.tokenizer.apply_chat_template(
                self.format_messages(messages),
                tools=list(tools) or None,
                chat_template=self.source,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except Exception as wrong:  # whatever a template raises is of its own making
            line = next((line for line in str(wrong).splitlines() if line.strip()), type(wrong).__name__)
            raise InvalidSample("the chat template refuses it", line[:120]) from None
        return written

    def format_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages with their contents as the template wants them."""
        if not self.content_as_parts:
            return [dict(one) for one in messages]
        return [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]

    def unescape(self, text: str) -> str:
        """`text` with the words in it that spell special tokens."""
        last = chr(self.placeholder_base + len(self.special_tokens) - 1)
        return re.sub(
            f"[{chr(self.placeholder_base)}-{last}]",
            lambda found: self.special_tokens[ord(found[0]) - self.placeholder_base],
            text,
        )

    def escape(self, value: Any) -> Any:
        """`value`, a text or anything with texts in it, with a character for each special token that it spells."""
        if isinstance(value, str):
            return self.special_pattern.sub(
                lambda found: chr(self.placeholder_base + self.special_tokens.index(found[0])), value
            )
        if isinstance(value, Mapping):
            return {key: self.escape(inner) for key, inner in value.items()}
        return [self.escape(inner) for inner in value] if isinstance(value, list | tuple) else value


def resolve_chat_template(tokenizer: Any, chat_template: str | None = None) -> ChatTemplate:
    """The template to use: `given` (Jinja text), else the tokenizer's. DataError where there is none."""
    if not chat_template and not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template, so nothing says how a conversation is written: give data.template "
            f"({', '.join(BUILTIN_TEMPLATES)}, or a .jinja file), or take the instruction-tuned checkpoint's tokenizer"
        )
    several = chat_template is None and isinstance(tokenizer.chat_template, Mapping)
    source = chat_template or (None if several else tokenizer.chat_template)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    words = {str(token) for token in added.values() if token.special}
    specials = tuple(sorted({*words, *map(str, tokenizer.all_special_tokens)}, key=len, reverse=True))
    pattern = re.compile("|".join(map(re.escape, specials)) or r"(?!)")
    found = ChatTemplate(tokenizer, source, bool(source and _GENERATION.search(source)), "", specials, pattern)
    try:
        asked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        if _PROBE not in found.apply(asked):
            found = replace(found, content_as_parts=True)
        written = found.apply(asked)
    except InvalidSample:
        return found
    if _PROBE not in written:
        raise DataError("the chat template leaves out what the assistant says: give another with data.template")
    return replace(found, turn_end=written.rpartition(_PROBE)[2].rstrip())


def render_conversation(
    template: ChatTemplate, conversation: Conversation, train_on: str
) -> list[RenderedConversation]:
    """The text or texts to learn from. `learn`: responses, last, or all. Unusable where the template refuses."""
    messages = [_plain(message) for message in conversation.messages]
    tools: Sequence[Any] = conversation.tools
    guarded = template.escape([messages, list(tools)])
    changed = guarded != [messages, list(tools)]
    if changed:
        messages, tools = guarded
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on == "last":
        answers = answers[-1:]
    if template.has_generation_blocks and train_on != "all":
        text, marked = _marked(template, messages, tools)
        return [
            RenderedConversation(conversation.id, text, tuple(marked[-1:] if train_on == "last" else marked), changed)
        ]
    whole = template.apply(messages, tools)
    if train_on == "all":
        return [RenderedConversation(conversation.id, whole, ((0, len(whole)),), changed)]
    spans: list[tuple[int, int]] = []
    notes: list[str] = []
    for index in answers:
        found, note = _span(template, messages, tools, index, whole)
        notes += [note] if note else []
        if found is None:
            return _unrolled(template, conversation.id, messages, tools, answers, changed)
        spans.append(found)
    return [RenderedConversation(conversation.id, whole, tuple(spans), changed, tuple(notes))]


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates read it."""
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        plain["tool_calls"] = [dict(call) for call in message.tool_calls]
    for name in ("name", "tool_call_id"):
        if getattr(message, name):
            plain[name] = getattr(message, name)
    if message.reasoning_content:
        plain |= {"reasoning_content": message.reasoning_content, "thinking": message.reasoning_content}
    return plain


def _marked(template: ChatTemplate, messages: Sequence[Any], tools: Sequence[Any]) -> tuple[str, list[tuple[int, int]]]:
    """What {% generation %} marks, by transformers' own rendering."""
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
        texts, marked = rendered
    except Exception as wrong:  # as in `write`
        raise InvalidSample("the chat template refuses it", str(wrong)[:120]) from None
    return str(texts[0]), [(begin, end) for begin, end in marked[0]]


def _span(
    template: ChatTemplate, messages: Sequence[Any], tools: Sequence[Any], index: int, whole: str
) -> tuple[tuple[int, int] | None, str]:
    """Where answer `index` lies in the whole text, None where that is not how it would be asked for; and a note."""
    through = whole if index == len(messages) - 1 else template.apply(messages[: index + 1], tools)
    begin, note = _begin(template, messages, tools, index, through)
    if not whole.startswith(begin):
        return None, note
    end = _end(template, through)
    if not whole.startswith(through[:end]):
        end = _agreed(template, through, whole)
        content = str(messages[index]["content"]).strip()
        if end <= len(begin) or content not in through[len(begin) : end]:
            return None, note
    return (len(begin), end), note


def _begin(
    template: ChatTemplate, messages: Sequence[Any], tools: Sequence[Any], index: int, through: str
) -> tuple[str, str]:
    """What is written before answer `index`: the prompt for it; where the template writes no such, what stands before
    its content however that begins."""
    try:
        prompt = template.apply(messages[:index], tools, add_generation_prompt=True) if index else ""
    except InvalidSample:
        prompt = ""
    if prompt and through.startswith(prompt):
        return prompt, ""
    probes = (_PROBE, chr(ord(_PROBE) + 1))
    turns = [template.apply([*messages[:index], {**messages[index], "content": one}], tools) for one in probes]
    same = next((place for place, (a, b) in enumerate(zip(turns[0], turns[1], strict=False)) if a != b), 0)
    return turns[0][:same], "the generation prompt is not how the answer begins"


def _end(template: ChatTemplate, through: str) -> int:
    """The length of a text that ends with an answer, without the space after the marker that ends it."""
    short = through.rstrip()
    if template.turn_end and short.endswith(template.turn_end):
        return len(short)
    if any(short.endswith(special) for special in template.special_tokens):
        return len(short)
    return len(through)


def _agreed(template: ChatTemplate, through: str, whole: str) -> int:
    """As far as both texts are the same and what follows in the first is special tokens and space only, or 0."""
    same = next(
        (place for place, (a, b) in enumerate(zip(through, whole, strict=False)) if a != b),
        min(len(through), len(whole)),
    )
    for found in template.special_pattern.finditer(through):
        if found.start() < same < found.end():
            same = found.start()
    rest = template.special_pattern.sub("", through[same:])
    return len(through[:same].rstrip()) if not rest.strip() else 0


def _unrolled(
    template: ChatTemplate,
    name: str,
    messages: Sequence[Any],
    tools: Sequence[Any],
    answers: Sequence[int],
    changed: bool,
) -> list[RenderedConversation]:
    """Each answer as the end of a text of its own."""
    found: list[RenderedConversation] = []
    for index in answers:
        text = template.apply(messages[: index + 1], tools)
        begin, note = _begin(template, messages, tools, index, text)
        notes = ("the template rewrites earlier turns", *([note] if note else []))
        label = name if len(answers) == 1 else f"{name}#{len(found) + 1}"
        if text.startswith(begin):
            text = text[: _end(template, text)]
            found.append(RenderedConversation(label, text, ((len(begin), len(text)),), changed, notes))
    return found
