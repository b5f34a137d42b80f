"""Tokenize conversations and texts into token ids and a loss mask, and report likely mistakes.

`template` finds the spans that the assistant writes. The text is split at their ends and each piece is tokenized alone,
as at inference, where the prompt and the answer are separate. Special tokens that a message spells become ordinary
tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, pairwise
from typing import Any

import numpy as np

from mowa.data.chat.checks import TokenizationIssue, check_samples
from mowa.data.chat.conversations import ChatDataset, Conversation, Document, InvalidSample
from mowa.data.chat.template import BUILTIN_TEMPLATES as BUILTIN_TEMPLATES
from mowa.data.chat.template import ChatTemplate, RenderedConversation, render_conversation, resolve_chat_template
from mowa.errors import DataError

TRAIN_ON = ("auto", "responses", "last", "all")
ON_OVERFLOW = ("drop", "truncate", "split")

_NOT_TRAINED = "no trained tokens"
_SPECIALS_IN_DOCUMENT = "special tokens in a text"
_SPECIALS_IN_CONVERSATION = "special tokens in a message"
_SPECIALS_AS_TEXT = "special tokens in a message, tokenized as text"
_BATCH = 512
_PROGRESS_SAMPLES = 5_000  # from which a progress bar is shown


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedSample:
    """One sample: input_ids int32 [n], and loss_mask bool [n], true for the tokens to train on."""

    id: str
    input_ids: np.ndarray
    loss_mask: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class TokenizationReport:
    """What became of a data set. `dropped` and `warnings` map a reason to (count, the first one).

    trained_tokens      tokens whose loss is computed
    length_percentiles  tokens per sample: median, 90th percentile, maximum
    """

    dataset_format: str
    num_rows: int
    kept: int
    dropped: Mapping[str, tuple[int, str]]
    warnings: Mapping[str, tuple[int, str]]
    tokens: int
    trained_tokens: int
    length_percentiles: tuple[int, int, int]
    findings: tuple[TokenizationIssue, ...] = ()

    def summary(self) -> str:
        """Return a text table: the dataset format, a line per count, a line per finding."""
        ratio = f"{self.trained_tokens / self.tokens:.0%} of them" if self.tokens else "-"
        p50, p90, longest = self.length_percentiles
        rows = [("rows", self.num_rows, self.dataset_format), ("samples", self.kept, "")]
        rows += [(f"dropped: {reason}", count, first) for reason, (count, first) in self.dropped.items()]
        rows += [(f"warning: {reason}", count, f"first: {first}") for reason, (count, first) in self.warnings.items()]
        rows += [("tokens", self.tokens, ""), ("trained tokens", self.trained_tokens, ratio)]
        rows += [("tokens per sample", p50, f"(p50), {p90} (p90), {longest} (longest)")]
        name_width, count_width = max(len(name) for name, *_ in rows), max(len(f"{count:,}") for _, count, _ in rows)
        lines = [f"{name:<{name_width}}  {count:>{count_width},}  {note}".rstrip() for name, count, note in rows]
        return "\n".join([*lines, *map(str, self.findings)])


@dataclass
class _Tally:
    dropped: dict[str, tuple[int, str]] = field(default_factory=dict)
    warnings: dict[str, tuple[int, str]] = field(default_factory=dict)

    def drop(self, reason: str, name: str) -> None:
        self._count(self.dropped, reason, name)

    def warn(self, reason: str, name: str) -> None:
        self._count(self.warnings, reason, name)

    @staticmethod
    def _count(counts: dict[str, tuple[int, str]], reason: str, name: str) -> None:
        count, first = counts.get(reason, (0, name))
        counts[reason] = (count + 1, first)


def tokenize_conversations(
    samples: ChatDataset | Iterable[Conversation | Document],
    tokenizer: Any,
    *,
    train_on: str = "auto",
    on_overflow: str = "drop",
    max_length: int,
    chat_template: str | None = None,
    eos_token_ids: Iterable[int] = (),
    vocab_size: int | None = None,
) -> tuple[list[TokenizedSample], TokenizationReport]:
    """Tokenize into samples of at most `max_length` tokens, and report what was found.

    train_on       responses (every assistant message), last (the last one), all; auto: responses of conversations, all
                   of documents. A response includes the token that ends it, but not the line break after that
    on_overflow    longer samples: drop; truncate (keep the beginning, if any of it is trained on); split (documents
                   into windows; conversations are dropped)
    chat_template  Jinja text to use instead of the tokenizer's chat template
    eos_token_ids  tokens that end the model's answers (its generation config), in addition to the tokenizer's EOS
    vocab_size     rows of the model's embeddings

    Documents get the BOS that the tokenizer adds, and EOS at the end. Raises DataError if a conversation needs a
    template and there is none, if responses of documents are requested, and for fatal issues: a token outside the
    embeddings, BOS twice, no trained tokens in any sample.
    """
    for name, value, known in (("train_on", train_on, TRAIN_ON), ("on_overflow", on_overflow, ON_OVERFLOW)):
        if value not in known:
            raise DataError(f"{name}: {value!r} is none of {', '.join(known)}")
    everything = list(samples)
    tally, fitted = _Tally(), []
    if isinstance(samples, ChatDataset):
        tally = _Tally(dict(samples.dropped), dict(samples.warnings))
    encoder = _Encoder(tokenizer, tally)
    for sample in encoder.encode(_progress(everything), train_on, chat_template):
        fitted += _fit(sample, max_length, on_overflow, sample.id in encoder.document_ids, tally)
    kept = []
    for sample in fitted:
        if sample.loss_mask[1:].any():
            kept.append(sample)
        else:
            tally.drop(_NOT_TRAINED, sample.id)
    issues = check_samples(
        kept,
        tokenizer,
        eos_token_ids={*eos_token_ids, *_to_list(tokenizer.eos_token_id)},
        vocab_size=vocab_size,
        document_ids=encoder.document_ids,
        truncated_ids={sample.id for sample in kept if len(sample) == max_length},
        documents_with_specials=tally.warnings.get(_SPECIALS_IN_DOCUMENT, (0, ""))[0],
        conversations_with_specials=tally.warnings.get(_SPECIALS_IN_CONVERSATION, (0, ""))[0],
        num_dropped=len(everything) if not kept else 0,
    )
    report = _make_report(samples, everything, kept, tally, issues)
    if fatal := [one for one in issues if one.fatal]:
        reasons = "" if kept else "".join(f"; {count} dropped: {first}" for count, first in tally.dropped.values())
        raise DataError("; ".join(f"{one.name}: {one.detail}. {one.advice}" for one in fatal) + reasons)
    return kept, report


def _make_report(
    samples: Any,
    everything: Sequence[Any],
    kept: Sequence[TokenizedSample],
    tally: _Tally,
    issues: Sequence[TokenizationIssue],
) -> TokenizationReport:
    lengths = sorted(map(len, kept)) or [0]
    p50, p90, longest = (lengths[round(quantile * (len(lengths) - 1))] for quantile in (0.5, 0.9, 1.0))
    return TokenizationReport(
        dataset_format=str(samples.dataset_format) if isinstance(samples, ChatDataset) else "",
        num_rows=samples.num_rows if isinstance(samples, ChatDataset) else len(everything),
        kept=len(kept),
        dropped=tally.dropped,
        warnings=tally.warnings,
        tokens=sum(lengths),
        trained_tokens=sum(int(sample.loss_mask[1:].sum()) for sample in kept),
        length_percentiles=(p50, p90, longest),
        findings=tuple(issues),
    )


def _progress(samples: Sequence[Any]) -> Iterable[Any]:
    if len(samples) < _PROGRESS_SAMPLES or not sys.stderr.isatty():
        return samples
    from tqdm import tqdm

    return tqdm(samples, desc="tokenize", unit="", leave=False)


def _to_list(value: Any) -> list[int]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def encode_prompt(tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> list[int]:
    """Return the token ids of messages and the generation prompt, by the chat template, as in training.

    Special tokens that a message spells become text. Raises DataError without a template, or if it raises an error.
    """
    encoder, template = _Encoder(tokenizer, _Tally()), resolve_chat_template(tokenizer)
    plain = [[dict(message) for message in messages], list(tools)]
    escaped = template.escape(plain)
    try:
        text = template.apply(*escaped, add_generation_prompt=True)
    except InvalidSample as error:
        raise DataError(f"the messages cannot be rendered: {error}") from None
    if escaped == plain or encoder.adds_space:
        return encoder._tokenize([template.unescape(text)])[0]
    return encoder._tokenize_escaped(template, text)


class _Encoder:
    """Tokenizes conversations and documents in batches. `document_ids` are the ids of the documents."""

    def __init__(self, tokenizer: Any, tally: _Tally) -> None:
        self.tokenizer, self.tally = tokenizer, tally
        self.document_ids: set[str] = set()
        first = tokenizer.convert_ids_to_tokens(self._tokenize(["x"])[0][:1])
        # SentencePiece adds a space before every text, so tokens of pieces are not those of the whole text
        self.adds_space = bool(first) and str(first[0]).startswith("▁")

    def encode(
        self, samples: Iterable[Conversation | Document], train_on: str, chat_template: str | None
    ) -> Iterator[TokenizedSample]:
        template: ChatTemplate | None = None
        remaining = iter(samples)
        while batch := list(islice(remaining, _BATCH)):
            texts: list[RenderedConversation] = []
            documents: list[Document] = []
            for sample in batch:
                if isinstance(sample, Document):
                    documents.append(sample)
                    continue
                template = template or resolve_chat_template(self.tokenizer, chat_template)
                texts += self._render(template, sample, "responses" if train_on == "auto" else train_on)
            if documents and train_on in ("responses", "last"):
                raise DataError(f"train_on: {train_on}: texts have no responses; use all, or pass conversations")
            yield from self._encode_documents(documents)
            if template and texts:
                yield from (self._encode_whole if self.adds_space else self._encode_pieces)(template, texts)

    def _render(self, template: ChatTemplate, conversation: Conversation, train_on: str) -> list[RenderedConversation]:
        try:
            rendered = render_conversation(template, conversation, train_on)
        except InvalidSample as error:
            self.tally.drop(error.reason, f"{conversation.id}: {error}")
            return []
        if not rendered:
            self.tally.drop("no answer found in the rendered text", conversation.id)
        for warning in {warning for text in rendered for warning in text.warnings}:
            self.tally.warn(warning, conversation.id)
        if any(text.escaped for text in rendered):
            self.tally.warn(_SPECIALS_IN_CONVERSATION if self.adds_space else _SPECIALS_AS_TEXT, conversation.id)
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
            yield TokenizedSample(
                text.id, np.array([*chain.from_iterable(ids)], np.int32), np.concatenate([np.zeros(0, bool), *masks])
            )

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
        whole = [template.unescape(text.text) for text in texts]
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            starts = np.array(offsets, np.int64).reshape(-1, 2)[:, 0]
            mask = np.zeros(len(ids), bool)
            for span in text.trained_spans:
                first, last = (len(template.unescape(text.text[:edge])) for edge in span)
                mask |= (starts >= first) & (starts < last)
            yield TokenizedSample(text.id, np.array(ids, np.int32), mask)

    def _encode_documents(self, documents: Sequence[Document]) -> Iterator[TokenizedSample]:
        if not documents:
            return
        specials = set(map(str, self.tokenizer.all_special_tokens))
        encoded = self.tokenizer([one.text for one in documents], add_special_tokens=True, verbose=False)["input_ids"]
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        for document, ids in zip(documents, encoded, strict=True):
            self.document_ids.add(document.id)
            if any(special in document.text for special in specials):
                self.tally.warn(_SPECIALS_IN_DOCUMENT, document.id)
            if bos is not None and ids[:2] == [bos, bos]:
                ids = ids[1:]
                self.tally.warn("a text that begins with BOS; the tokenizer's BOS is removed", document.id)
            if eos is not None and ids[-1:] != [eos]:
                ids = [*ids, eos]
            yield TokenizedSample(document.id, np.array(ids, np.int32), np.ones(len(ids), bool))


def _split_spans(text: RenderedConversation) -> Iterator[tuple[str, bool]]:
    """Yield the pieces of a text and whether they are trained on."""
    position = 0
    for start, end in text.trained_spans:
        yield from ((text.text[position:start], False), (text.text[start:end], True))
        position = end
    if position < len(text.text):
        yield text.text[position:], False


def _fit(
    sample: TokenizedSample, max_length: int, on_overflow: str, is_document: bool, tally: _Tally
) -> list[TokenizedSample]:
    if len(sample) <= max_length:
        return [sample]
    if on_overflow == "truncate":
        tally.warn(f"longer than {max_length} tokens, truncated", sample.id)
        return [TokenizedSample(sample.id, sample.input_ids[:max_length], sample.loss_mask[:max_length])]
    if on_overflow == "split" and is_document:
        tally.warn(f"longer than {max_length} tokens, split", sample.id)
        starts = [start for start in range(0, len(sample), max_length) if len(sample) - start > 1]
        windows = [slice(start, start + max_length) for start in starts]
        return [
            TokenizedSample(f"{sample.id}#{number}", sample.input_ids[window], sample.loss_mask[window])
            for number, window in enumerate(windows, 1)
        ]
    tally.drop(f"longer than {max_length} tokens", sample.id)
    return []


def format_sample(sample: TokenizedSample, tokenizer: Any, *, color: bool = False, max_tokens: int = 1_000) -> str:
    """Decode a sample with special tokens, with trained tokens in green or ⟦in brackets⟧, up to `max_tokens` tokens."""
    before, after = ("\x1b[32m", "\x1b[0m") if color else ("⟦", "⟧")
    edges = [0, *(np.flatnonzero(np.diff(sample.loss_mask[:max_tokens])) + 1).tolist(), min(max_tokens, len(sample))]
    parts = [f"── {sample.id}: {len(sample)} tokens, {int(sample.loss_mask[1:].sum())} trained\n"]
    for start, end in pairwise(edges):
        text = tokenizer.decode(sample.input_ids[start:end].tolist(), skip_special_tokens=False)
        text = "".join(c if c >= " " or c in "\n\t" else "\ufffd" for c in text)
        parts.append(f"{before}{text}{after}" if end > start and sample.loss_mask[start] else text)
    if len(sample) > max_tokens:
        parts.append(f" … and {len(sample) - max_tokens} more tokens")
    return "".join(parts)
