"""Render conversations with a chat template, and find the spans that the assistant writes.

Templates with {% generation %} mark these spans themselves. For others, an answer begins where the generation prompt
for it ends (`add_generation_prompt`) and ends where the conversation up to it ends; both are rendered, so that no
markers have to be known. If later messages change how earlier ones are rendered (reasoning that is removed, a system
message that moves to the last question), each answer becomes a sample of its own, as the model will be prompted.

A conversation is invalid if the template omits a part of a trained answer, or of a message before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mowa.data.chat.omissions import Mark, describe, find_omitted, insert_marks, is_required
from mowa.data.chat.samples import Conversation, ExcludedSample, InvalidSample, Message
from mowa.data.chat.template import PROBE, ChatTemplate

_REWRITES = "the template rewrites earlier messages"


@dataclass(frozen=True, slots=True)
class RenderedConversation:
    """Rendered text, and the spans [start, end) of its characters to train on. `escaped`: it holds placeholders."""

    id: str
    text: str
    trained_spans: tuple[tuple[int, int], ...]
    escaped: bool = False
    warnings: tuple[str, ...] = ()
    conversation_id: str = ""


@dataclass(frozen=True, slots=True)
class _Chat:
    """A conversation as the template reads it. `trained` are the indices of the messages to train on, in order."""

    template: ChatTemplate
    id: str
    messages: Sequence[Any]
    tools: Sequence[Any]
    escaped: bool
    trained: tuple[int, ...]

    def apply(self, through: int | None = None) -> str:
        """Return the text of all messages, or of those up to and with message `through`."""
        return self.template.apply(self.messages[: None if through is None else through + 1], self.tools)

    def rendered(
        self, text: str, spans: Sequence[tuple[int, int]], warnings: Sequence[str] = (), *, label: str = ""
    ) -> RenderedConversation:
        """Return a text of this conversation."""
        return RenderedConversation(label or self.id, text, tuple(spans), self.escaped, tuple(warnings), self.id)


def render_conversation(
    template: ChatTemplate, conversation: Conversation, train_on: str
) -> list[RenderedConversation]:
    """Return the text or texts to train on. `train_on` is responses, last or all.

    Raises InvalidSample if the template raises an error or omits a part of a message, and ExcludedSample if the answer
    that `train_on` selects is not to be trained on.
    """
    messages = [_to_dict(message) for message in conversation.messages]
    tools: Sequence[Any] = conversation.tools
    escaped = template.spells_special_tokens([messages, list(tools)])
    if escaped:
        messages, tools = template.escape([messages, list(tools)])
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on == "last":
        answers = answers[-1:]
    trained = tuple(index for index in answers if conversation.messages[index].trained)
    if answers and not trained:
        raise ExcludedSample("the last answer is not to be trained on (weight: 0 or train: false)")
    chat = _Chat(template, conversation.id, messages, tools, escaped, trained)
    if train_on == "all":
        untrained = [index for index, message in enumerate(conversation.messages) if not message.trained]
        return [_render_all(chat, untrained)]
    if template.has_generation_blocks:
        return _render_generation_blocks(chat)
    return _render_answers(chat)


def _render_answers(chat: _Chat) -> list[RenderedConversation]:
    """Render the conversation with a span per answer, or each answer as a text of its own."""
    whole = chat.apply()
    spans: list[tuple[int, int]] = []
    warnings: list[str] = []
    for index in chat.trained:
        span, warning = _find_span(chat, index, whole)
        warnings += [warning] if warning else []
        if span is None:
            return _render_separately(chat)
        spans.append(span)
    _raise_omitted(_omitted(chat, chat.trained))
    return [chat.rendered(whole, spans, [*warnings, *_check_tools(chat, whole)])]


def _render_separately(chat: _Chat) -> list[RenderedConversation]:
    """Render each answer as the end of a text of its own."""
    rendered: list[RenderedConversation] = []
    for index in chat.trained:
        _raise_omitted(_omitted(chat, [index], through=index))
        if chat.template.has_generation_blocks:
            text, marked = _generation_spans(chat.template, chat.messages[: index + 1], chat.tools)
            spans, warning = _select_spans(chat, marked, [index], through=index), ""
        else:
            text = chat.apply(index)
            prompt, warning = _prompt_before(chat, index, text)
            text = text[: _answer_end(chat.template, text)] if text.startswith(prompt) else ""
            spans = [(len(prompt), len(text))] if text else []
        if spans:
            label = chat.id if len(chat.trained) == 1 else f"{chat.id}#{len(rendered) + 1}"
            warnings = [_REWRITES, *([warning] if warning else []), *_check_tools(chat, text, through=index)]
            rendered.append(chat.rendered(text, spans, warnings, label=label))
    return rendered


def _render_all(chat: _Chat, untrained: Sequence[int]) -> RenderedConversation:
    """Render the conversation and train on all of it but the messages `untrained`.

    The template may omit of an earlier answer what it writes while that is the last one.
    """
    whole = chat.apply()
    omitted = _omitted(chat, chat.trained, through=len(chat.messages) - 1)
    rewritten = {turn for turn in {mark.turn for mark in omitted} if turn in chat.trained and turn != chat.trained[-1]}
    for turn in rewritten:
        _raise_omitted([mark for mark in _omitted(chat, [turn], through=turn) if mark.turn == turn])
    _raise_omitted([mark for mark in omitted if mark.turn not in rewritten])
    edges = [0]
    for index in untrained:
        span, _ = _find_span(chat, index, whole)
        if span is None:
            raise InvalidSample("a turn with weight 0 is not found in the rendered text", f"message {index + 1}")
        edges += span
    edges.append(len(whole))
    spans = [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]
    warnings = ["the template omits parts of earlier answers"] if rewritten else []
    return chat.rendered(whole, spans, [*warnings, *_check_tools(chat, whole)])


def _render_generation_blocks(chat: _Chat) -> list[RenderedConversation]:
    """Render with the spans that the template marks; if it omits parts of earlier answers, each answer alone."""
    text, spans = _generation_spans(chat.template, chat.messages, chat.tools)
    omitted = _omitted(chat, chat.trained)
    if any(mark.turn in chat.trained and mark.turn != chat.trained[-1] for mark in omitted):
        return _render_separately(chat)
    _raise_omitted(omitted)
    return [chat.rendered(text, _select_spans(chat, spans, chat.trained), _check_tools(chat, text))]


def _select_spans(
    chat: _Chat, spans: Sequence[tuple[int, int]], trained: Sequence[int], *, through: int | None = None
) -> list[tuple[int, int]]:
    """Return the spans of a template with {% generation %} that are of the answers `trained` alone.

    A template may mark several spans of an answer. One that holds nothing of what a message says, such as the token
    that ends the answer, is of the answer before it, or else of the one after it.
    """
    messages = chat.messages[: None if through is None else through + 1]
    answers = {index for index, message in enumerate(messages) if message["role"] == "assistant"}
    untrained = answers - set(trained)
    if not untrained:
        return list(spans)
    marked, marks = insert_marks(messages)
    text, marked_spans = _generation_spans(chat.template, marked, chat.tools)
    if len(marked_spans) != len(spans):
        raise InvalidSample("an answer is not found in the rendered text", f"message {min(untrained) + 1}")
    places = sorted((text.find(mark.text), mark.turn) for mark in marks if mark.text in text)
    selected = []
    for span, (start, end) in zip(spans, marked_spans, strict=True):
        turns = {turn for place, turn in places if start <= place < end}
        if not turns:
            before, after = ([turn for place, turn in places if (place < start) is side] for side in (True, False))
            turns = set(before[-1:]) if before[-1:] and before[-1] in answers else set(after[:1])
        if not turns & untrained:
            selected.append(span)
    return selected


def _omitted(chat: _Chat, trained: Sequence[int], *, through: int | None = None) -> list[Mark]:
    """Return what the text of the messages up to `through` lacks, if `trained` are trained on.

    Without `through`, all messages are rendered, and those after the last trained one may be omitted.
    """
    last = (trained[-1] if trained else -1) if through is None else through
    messages = chat.messages if through is None else chat.messages[: through + 1]
    marked, marks = insert_marks(messages)
    try:
        text = chat.template.apply(marked, chat.tools)
    except InvalidSample:  # the template checks a content
        return []
    return [mark for mark in find_omitted(text, marks) if mark.turn <= last and is_required(mark, trained)]


def _raise_omitted(marks: Sequence[Mark]) -> None:
    if marks:
        raise InvalidSample(*describe(marks[0]))


def _check_tools(chat: _Chat, text: str, *, through: int | None = None) -> list[str]:
    """Return a warning if the text is the same without the tools."""
    if not chat.tools:
        return []
    messages = chat.messages if through is None else chat.messages[: through + 1]
    try:
        same = chat.template.apply(messages).startswith(text)
    except InvalidSample:
        return []
    return ["the chat template omits the list of tools"] if same else []


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
            **{**tokenizer.special_tokens_map, **template.arguments},
        )
        texts, spans = rendered
    except Exception as error:  # as in ChatTemplate.apply
        raise InvalidSample("the chat template raises an error", str(error)[:120]) from None
    return str(texts[0]), [(start, end) for start, end in spans[0]]


def _find_span(chat: _Chat, index: int, whole: str) -> tuple[tuple[int, int] | None, str]:
    """Return the span of answer `index` in the whole text, and a warning.

    The span is None if the text before the answer is not the prompt with which the model would be asked for it.
    """
    through = whole if index == len(chat.messages) - 1 else chat.apply(index)
    prompt, warning = _prompt_before(chat, index, through)
    if not whole.startswith(prompt):
        return None, warning
    end = _answer_end(chat.template, through)
    if not whole.startswith(through[:end]):
        end = _common_end(chat.template, through, whole)
        content = str(chat.messages[index]["content"]).strip()
        if end <= len(prompt) or content not in through[len(prompt) : end]:
            return None, warning
    return (len(prompt), end), warning


def _prompt_before(chat: _Chat, index: int, through: str) -> tuple[str, str]:
    """Return the text before answer `index`, and a warning.

    It is the generation prompt if the answer begins with it, else what two different contents have in common.
    """
    template, before, tools = chat.template, chat.messages[:index], chat.tools
    try:
        prompt = template.apply(before, tools, add_generation_prompt=True) if index else ""
    except InvalidSample:
        prompt = ""
    if prompt and through.startswith(prompt):
        return prompt, ""
    answer = chat.messages[index]
    probed = [name for name in ("content", "reasoning_content", "thinking") if name == "content" or answer.get(name)]
    probes = [{**answer, **dict.fromkeys(probed, one)} for one in (PROBE, chr(ord(PROBE) + 1))]
    texts = [template.apply([*before, one], tools) for one in probes]
    if texts[0] == texts[1]:  # beside tool calls, it writes no content
        texts = [through, template.apply([*before, {"role": "assistant", "content": PROBE}], tools)]
    ends = [_first_difference(texts[0], other, default=len(texts[0])) for other in (texts[1], through)]
    return texts[0][: min(ends)], "answers do not begin with the generation prompt"


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
