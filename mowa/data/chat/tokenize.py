"""Conversations and passages → token ids, which of them are learnt, and a report of what would be learnt wrongly.

Which characters are the assistant's `turns` knows. Here a text is cut at those places and each piece becomes tokens of
its own, as it does when a model is asked: the prompt first, and what is said after it. Words of a person that spell a
special token become ordinary tokens. No model is known here but by the size of its table of embeddings and the tokens
that end its answers.
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
_BATCH = 512
_MANY = 5_000  # items that are worth a progress bar


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedSample:
    """One example. ids int32 [n]; learnt bool [n]: whether the token is to be said after those before it."""

    id: str
    input_ids: np.ndarray
    loss_mask: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class TokenizationReport:
    """What became of a data set. `dropped` and `noted`: reason → (how many, the first one)."""

    dataset_format: str
    num_rows: int
    kept: int
    dropped: Mapping[str, tuple[int, str]]
    warnings: Mapping[str, tuple[int, str]]
    tokens: int
    trained_tokens: int
    length_percentiles: tuple[int, int, int]  # half are this long at most, nine of ten, all
    findings: tuple[TokenizationIssue, ...] = ()

    def summary(self) -> str:
        """A table for people: the shape, a line for each count, one for each finding."""
        share = f"{self.trained_tokens / self.tokens:.0%} of them" if self.tokens else "-"
        rows = [("rows", self.num_rows, self.dataset_format), ("examples", self.kept, "")]
        rows += [(f"left out: {reason}", count, first) for reason, (count, first) in self.dropped.items()]
        rows += [(f"noted: {reason}", count, f"first: {first}") for reason, (count, first) in self.warnings.items()]
        rows += [("tokens", self.tokens, ""), ("tokens learnt", self.trained_tokens, share)]
        rows += [
            (
                "tokens an example",
                self.length_percentiles[0],
                f"(p50), {self.length_percentiles[1]} (p90), {self.length_percentiles[2]} (longest)",
            )
        ]
        wide, high = max(len(name) for name, *_ in rows), max(len(f"{count:,}") for _, count, _ in rows)
        lines = [f"{name:<{wide}}  {count:>{high},}  {note}".rstrip() for name, count, note in rows]
        return "\n".join([*lines, *map(str, self.findings)])


@dataclass
class _Tally:
    dropped: dict[str, tuple[int, str]] = field(default_factory=dict)
    noted: dict[str, tuple[int, str]] = field(default_factory=dict)

    def drop(self, reason: str, name: str) -> None:
        self._count(self.dropped, reason, name)

    def note(self, reason: str, name: str) -> None:
        self._count(self.noted, reason, name)

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
    """Tokenised examples of at most `length` tokens, and a report with what was found out.

    learn     responses (every turn of the assistant), last (its last one), all; auto: responses of conversations, all
              of passages. A response is learnt with the token that ends it, and without the line break after that.
    long      what becomes of longer examples: drop; truncate (the beginning stays, if any of it is learnt); split
              (passages, into windows; conversations are dropped)
    template  Jinja text to use instead of the tokenizer's chat template
    eos_ids   tokens that end the model's answers (its generation settings); the tokenizer's EOS always does
    vocab_size  rows of the model's embeddings

    Passages get the BOS that the tokenizer adds, and EOS at their end. Raises DataError where a conversation needs a
    template and there is none, where a text's responses are asked for, and for fatal findings: a token beyond the
    embeddings, BOS twice, nothing learnt in any example.
    """
    for name, value, known in (("learn", train_on, TRAIN_ON), ("long", on_overflow, ON_OVERFLOW)):
        if value not in known:
            raise DataError(f"{name}: {value!r} is none of {', '.join(known)}")
    everything = list(samples)
    tally, rows = _Tally(), []
    if isinstance(samples, ChatDataset):
        tally = _Tally(dict(samples.dropped), dict(samples.warnings))
    cutter = _Cutter(tokenizer, tally)
    for row in cutter.tokens(_bar(everything), train_on, chat_template):
        rows += _fitted(row, max_length, on_overflow, row.id in cutter.passages, tally)
    kept = []
    for row in rows:
        if row.loss_mask[1:].any():
            kept.append(row)
        else:
            tally.drop("no token is learnt", row.id)
    found = check_samples(
        kept,
        tokenizer,
        eos_token_ids={*eos_token_ids, *_ids(tokenizer.eos_token_id)},
        vocab_size=vocab_size,
        document_ids=cutter.passages,
        truncated_ids={row.id for row in kept if len(row) == max_length},
        documents_with_specials=tally.noted.get("special tokens spelt in a text", (0, ""))[0],
        conversations_with_specials=tally.noted.get("special tokens spelt in a conversation", (0, ""))[0],
        num_dropped=len(everything) if not kept else 0,
    )
    report = _report(samples, everything, kept, tally, found)
    if fatal := [one for one in found if one.fatal]:
        why = "" if kept else "".join(f"; {count} left out: {first}" for count, first in tally.dropped.values())
        raise DataError("; ".join(f"{one.name}: {one.detail}. {one.advice}" for one in fatal) + why)
    return kept, report


def _report(
    items: Any, everything: Sequence[Any], kept: Sequence[TokenizedSample], tally: _Tally, found: Any
) -> TokenizationReport:
    lengths = sorted(map(len, kept)) or [0]
    places = (0.5, 0.9, 1.0)
    return TokenizationReport(
        dataset_format=str(items.dataset_format) if isinstance(items, ChatDataset) else "",
        num_rows=items.num_rows if isinstance(items, ChatDataset) else len(everything),
        kept=len(kept),
        dropped=tally.dropped,
        warnings=tally.noted,
        tokens=sum(lengths),
        trained_tokens=sum(int(row.loss_mask[1:].sum()) for row in kept),
        length_percentiles=tuple(lengths[round(place * (len(lengths) - 1))] for place in places),  # type: ignore[arg-type]
        findings=tuple(found),
    )


def _bar(items: Sequence[Any]) -> Iterable[Any]:
    if len(items) < _MANY or not sys.stderr.isatty():
        return items
    from tqdm import tqdm

    return tqdm(items, desc="tokens", unit="", leave=False)


def _ids(value: Any) -> list[int]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


class _Cutter:
    """Items → Tokens, a batch at a time. `passages`: ids of those that were passages."""

    def __init__(self, tokenizer: Any, tally: _Tally) -> None:
        self.tokenizer, self.tally = tokenizer, tally
        self.passages: set[str] = set()
        first = tokenizer.convert_ids_to_tokens(self._plain(["x"])[0][:1])
        # SentencePiece's way: a space before every text, so that pieces of a text are not its tokens
        self.spaced = bool(first) and str(first[0]).startswith("▁")

    def tokens(
        self, items: Iterable[Conversation | Document], learn: str, given: str | None
    ) -> Iterator[TokenizedSample]:
        how: ChatTemplate | None = None
        waiting = iter(items)
        while batch := list(islice(waiting, _BATCH)):
            texts: list[RenderedConversation] = []
            documents: list[Document] = []
            for item in batch:
                if isinstance(item, Document):
                    documents.append(item)
                    continue
                how = how or resolve_chat_template(self.tokenizer, given)
                texts += self._rendered(how, item, "responses" if learn == "auto" else learn)
            if documents and learn in ("responses", "last"):
                raise DataError(f"learn: {learn}: a text has no responses; learn all of it, or give conversations")
            yield from self._documents(documents)
            if how and texts:
                yield from (self._spaced if self.spaced else self._pieces)(how, texts)

    def _rendered(self, how: ChatTemplate, item: Conversation, learn: str) -> list[RenderedConversation]:
        try:
            found = render_conversation(how, item, learn)
        except InvalidSample as wrong:
            self.tally.drop(wrong.reason, f"{item.id}: {wrong}")
            return []
        if not found:
            self.tally.drop("no answer can be told from the rest", item.id)
        for note in {note for text in found for note in text.warnings}:
            self.tally.note(note, item.id)
        if any(text.escaped for text in found):
            self.tally.note(
                "special tokens spelt in a conversation" if self.spaced else "special tokens spelt, read as words",
                item.id,
            )
        return found

    def _plain(self, texts: list[str], **how: Any) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False, **how)["input_ids"]
        return found

    def _pieces(self, how: ChatTemplate, texts: Sequence[RenderedConversation]) -> Iterator[TokenizedSample]:
        """Each piece between two borders by itself."""
        cut = [list(_cut(text)) for text in texts]
        parsed = [piece for text, pieces in zip(texts, cut, strict=True) if not text.escaped for piece, _ in pieces]
        ids = iter(self._plain(parsed) if parsed else [])
        for text, pieces in zip(texts, cut, strict=True):
            row = [self._guarded(how, piece) if text.escaped else next(ids) for piece, _ in pieces]
            learnt = [np.full(len(some), said) for some, (_, said) in zip(row, pieces, strict=True)]
            yield TokenizedSample(
                text.id, np.array([*chain.from_iterable(row)], np.int32), np.concatenate([np.zeros(0, bool), *learnt])
            )

    def _guarded(self, how: ChatTemplate, piece: str) -> list[int]:
        """Only the template's own special tokens are such; those that a person spells are read as words."""
        found: list[int] = []
        place = 0
        for special in [*how.special_pattern.finditer(piece), None]:
            between = piece[place : special.start() if special else len(piece)]
            if between:
                found += self._plain([how.unescape(between)], split_special_tokens=True)[0]
            if special:
                found.append(self.tokenizer.convert_tokens_to_ids(special[0]))
                place = special.end()
        self._plain(["x"], split_special_tokens=False)  # the setting stays in the tokenizer otherwise
        return found

    def _spaced(self, how: ChatTemplate, texts: Sequence[RenderedConversation]) -> Iterator[TokenizedSample]:
        """Whole texts; what is learnt by where tokens begin."""
        if not self.tokenizer.is_fast:
            raise DataError("this tokenizer does not say where its tokens lie; load the fast one (tokenizer.json)")
        whole = [how.unescape(text.text) for text in texts]
        found = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for text, ids, offsets in zip(texts, found["input_ids"], found["offset_mapping"], strict=True):
            begins = np.array(offsets, np.int64).reshape(-1, 2)[:, 0]
            learnt = np.zeros(len(ids), bool)
            for span in text.trained_spans:
                first, last = (len(how.unescape(text.text[:place])) for place in span)
                learnt |= (begins >= first) & (begins < last)
            yield TokenizedSample(text.id, np.array(ids, np.int32), learnt)

    def _documents(self, documents: Sequence[Document]) -> Iterator[TokenizedSample]:
        if not documents:
            return
        specials = set(map(str, self.tokenizer.all_special_tokens))
        found = self.tokenizer([one.text for one in documents], add_special_tokens=True, verbose=False)["input_ids"]
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        for one, ids in zip(documents, found, strict=True):
            self.passages.add(one.id)
            if any(special in one.text for special in specials):
                self.tally.note("special tokens spelt in a text", one.id)
            if bos is not None and ids[:2] == [bos, bos]:
                ids = ids[1:]
                self.tally.note("a text that writes BOS itself; the tokenizer's is left out", one.id)
            if eos is not None and ids[-1:] != [eos]:
                ids = [*ids, eos]
            yield TokenizedSample(one.id, np.array(ids, np.int32), np.ones(len(ids), bool))


def _cut(text: RenderedConversation) -> Iterator[tuple[str, bool]]:
    """Pieces of a text and whether they are learnt."""
    place = 0
    for begin, end in text.trained_spans:
        yield from ((text.text[place:begin], False), (text.text[begin:end], True))
        place = end
    if place < len(text.text):
        yield text.text[place:], False


def _fitted(row: TokenizedSample, length: int, long: str, passage: bool, tally: _Tally) -> list[TokenizedSample]:
    if len(row) <= length:
        return [row]
    if long == "truncate":
        tally.note(f"longer than {length} tokens, truncated", row.id)
        return [TokenizedSample(row.id, row.input_ids[:length], row.loss_mask[:length])]
    if long == "split" and passage:
        tally.note(f"longer than {length} tokens, split", row.id)
        starts = [start for start in range(0, len(row), length) if len(row) - start > 1]
        return [
            TokenizedSample(
                f"{row.id}#{number}", row.input_ids[start : start + length], row.loss_mask[start : start + length]
            )
            for number, start in enumerate(starts, 1)
        ]
    tally.drop(f"longer than {length} tokens", row.id)
    return []


def format_sample(sample: TokenizedSample, tokenizer: Any, *, color: bool = False, max_tokens: int = 1_000) -> str:
    """One example as text, special tokens and all; what is learnt in green, or ⟦in brackets⟧. At most `most` tokens."""
    before, after = ("\x1b[32m", "\x1b[0m") if color else ("⟦", "⟧")
    borders = [0, *(np.flatnonzero(np.diff(sample.loss_mask[:max_tokens])) + 1).tolist(), min(max_tokens, len(sample))]
    parts = [f"── {sample.id}: {len(sample)} tokens, {int(sample.loss_mask[1:].sum())} learnt\n"]
    for begin, end in pairwise(borders):
        text = tokenizer.decode(sample.input_ids[begin:end].tolist(), skip_special_tokens=False)
        text = "".join(letter if letter >= " " or letter in "\n\t" else "\ufffd" for letter in text)
        parts.append(f"{before}{text}{after}" if end > begin and sample.loss_mask[begin] else text)
    if len(sample) > max_tokens:
        parts.append(f" … and {len(sample) - max_tokens} more tokens")
    return "".join(parts)
