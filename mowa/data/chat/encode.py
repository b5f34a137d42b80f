"""Turn rendered conversations and plain texts into token ids and a loss mask.

The text is split at the ends of what the assistant writes and each piece is tokenized alone, as at inference, where the
prompt and the answer are separate. Special tokens that a message spells become ordinary tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np

from mowa.data.chat.formats import parse_json
from mowa.data.chat.render import RenderedConversation, render_conversation
from mowa.data.chat.samples import Conversation, Document, ExcludedSample, InvalidSample, Tally
from mowa.data.chat.template import ChatTemplate, resolve_chat_template
from mowa.errors import DataError

SPECIALS_IN_DOCUMENT = "special tokens in a text"
SPECIALS_IN_CONVERSATION = "special tokens in a message"
_SPECIALS_AS_TEXT = "special tokens in a message, tokenized as text"
_BATCH = 512


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedSample:
    """One sample: input_ids int32 [n], and loss_mask bool [n], true for the tokens to train on.

    `conversation_id` is the id of the conversation or text that it is, or is a part of; ids of parts are others.
    """

    id: str
    input_ids: np.ndarray
    loss_mask: np.ndarray
    conversation_id: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)


def encode_prompt(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] = (),
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the token ids of messages and the generation prompt, by the chat template, as in training.

    Special tokens that a message spells become text. Raises DataError without a template, if it raises an error, or if
    it does not read one of `chat_template_kwargs`.
    """
    encoder, template = Encoder(tokenizer, Tally()), resolve_chat_template(tokenizer, None, chat_template_kwargs)
    given: Any = [[_parse_arguments(message) for message in messages], list(tools)]
    escaped = template.spells_special_tokens(given)
    try:
        text = template.apply(*(template.escape(given) if escaped else given), add_generation_prompt=True)
    except InvalidSample as error:
        raise DataError(f"the messages cannot be rendered: {error}") from None
    if escaped and not encoder.adds_space:
        return encoder._tokenize_escaped(template, text)
    return encoder._tokenize([template.unescape(text) if escaped else text])[0]


def _parse_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message whose tool calls have arguments as objects, as in training, where they are JSON text."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list | tuple):
        return dict(message)
    parsed = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
            call = {**call, "function": {**function, "arguments": parse_json(function["arguments"])}}
        parsed.append(call)
    return {**message, "tool_calls": parsed}


class Encoder:
    """Tokenizes conversations and documents in batches. `document_ids` are the ids of the documents."""

    def __init__(self, tokenizer: Any, tally: Tally) -> None:
        self.tokenizer, self.tally = tokenizer, tally
        self.document_ids: set[str] = set()
        first = tokenizer.convert_ids_to_tokens(self._tokenize(["x"])[0][:1])
        # SentencePiece adds a space before every text, so tokens of pieces are not those of the whole text
        self.adds_space = bool(first) and str(first[0]).startswith("▁")

    def encode(
        self,
        samples: Iterable[Conversation | Document],
        train_on: str,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Iterator[TokenizedSample]:
        """Yield the samples of conversations and documents. Raises as `tokenize_conversations`."""
        template: ChatTemplate | None = None
        remaining = iter(samples)
        while batch := list(islice(remaining, _BATCH)):
            texts: list[RenderedConversation] = []
            documents: list[Document] = []
            for sample in batch:
                if isinstance(sample, Document):
                    documents.append(sample)
                    continue
                template = template or resolve_chat_template(self.tokenizer, chat_template, chat_template_kwargs)
                texts += self._render(template, sample, "responses" if train_on == "auto" else train_on)
            if documents and train_on in ("responses", "last"):
                raise DataError(f"train_on: {train_on}: texts have no responses; use all, or pass conversations")
            yield from self._encode_documents(documents)
            if template and texts:
                yield from (self._encode_whole if self.adds_space else self._encode_pieces)(template, texts)

    def _render(self, template: ChatTemplate, conversation: Conversation, train_on: str) -> list[RenderedConversation]:
        try:
            rendered = render_conversation(template, conversation, train_on)
        except ExcludedSample as error:
            self.tally.exclude(error.reason, conversation.id)
            return []
        except InvalidSample as error:
            self.tally.drop(error.reason, f"{conversation.id}: {error}")
            return []
        if not rendered:
            self.tally.drop("no answer found in the rendered text", conversation.id)
        for warning in {warning for text in rendered for warning in text.warnings}:
            self.tally.warn(warning, conversation.id)
        if any(text.escaped for text in rendered):
            self.tally.warn(SPECIALS_IN_CONVERSATION if self.adds_space else _SPECIALS_AS_TEXT, conversation.id)
        return rendered

    def _tokenize(self, texts: list[str], **kwargs: Any) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False, **kwargs)["input_ids"]
        return ids

    def _encode_pieces(
        self, template: ChatTemplate, texts: Sequence[RenderedConversation]
    ) -> Iterator[TokenizedSample]:
        """Tokenize each piece between two ends of spans alone."""
        split = [list(_split_spans(text)) for text in texts]
        unescaped = [
            piece for text, pieces in zip(texts, split, strict=True) if not text.escaped for piece, _ in pieces
        ]
        tokenized = iter(self._tokenize(unescaped) if unescaped else [])
        for text, pieces in zip(texts, split, strict=True):
            ids = [self._tokenize_escaped(template, piece) if text.escaped else next(tokenized) for piece, _ in pieces]
            masks = [np.full(len(part), trained) for part, (_, trained) in zip(ids, pieces, strict=True)]
            joined = np.array([*chain.from_iterable(ids)], np.int32)
            yield TokenizedSample(text.id, joined, np.concatenate([np.zeros(0, bool), *masks]), text.conversation_id)

    def _tokenize_escaped(self, template: ChatTemplate, piece: str) -> list[int]:
        """Tokenize the template's special tokens as such, and those that a message spells as text."""
        ids: list[int] = []
        start = 0
        for special in [*template.special_pattern.finditer(piece), None]:
            between = piece[start : special.start() if special else len(piece)]
            if between:
                ids += self._tokenize([template.unescape(between)], split_special_tokens=True)[0]
            if special:
                ids.append(self.tokenizer.convert_tokens_to_ids(special[0]))
                start = special.end()
        self._tokenize(["x"], split_special_tokens=False)  # resets the setting, which the tokenizer keeps
        return ids

    def _encode_whole(self, template: ChatTemplate, texts: Sequence[RenderedConversation]) -> Iterator[TokenizedSample]:
        """Tokenize whole texts, and mask tokens by where they begin."""
        if not self.tokenizer.is_fast:
            raise DataError("this tokenizer has no token offsets; load the fast tokenizer (tokenizer.json)")
        whole = [template.unescape(text.text) if text.escaped else text.text for text in texts]
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            starts = np.array(offsets, np.int64).reshape(-1, 2)[:, 0]
            mask = np.zeros(len(ids), bool)
            for span in text.trained_spans:
                befores = [text.text[:edge] for edge in span]
                first, last = (len(template.unescape(one) if text.escaped else one) for one in befores)
                mask |= (starts >= first) & (starts < last)
            yield TokenizedSample(text.id, np.array(ids, np.int32), mask, text.conversation_id)

    def _encode_documents(self, documents: Sequence[Document]) -> Iterator[TokenizedSample]:
        if not documents:
            return
        specials = set(map(str, self.tokenizer.all_special_tokens))
        encoded = self.tokenizer([one.text for one in documents], add_special_tokens=True, verbose=False)["input_ids"]
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        for document, ids in zip(documents, encoded, strict=True):
            self.document_ids.add(document.id)
            if any(special in document.text for special in specials):
                self.tally.warn(SPECIALS_IN_DOCUMENT, document.id)
            if bos is not None and ids[:2] == [bos, bos]:
                ids = ids[1:]
                self.tally.warn("a text that begins with BOS; the tokenizer's BOS is removed", document.id)
            if eos is not None and ids[-1:] != [eos]:
                ids = [*ids, eos]
            yield TokenizedSample(document.id, np.array(ids, np.int32), np.ones(len(ids), bool), document.id)


def _split_spans(text: RenderedConversation) -> Iterator[tuple[str, bool]]:
    """Yield the pieces of a text and whether they are trained on."""
    position = 0
    for start, end in text.trained_spans:
        yield from ((text.text[position:start], False), (text.text[start:end], True))
        position = end
    if position < len(text.text):
        yield text.text[position:], False
