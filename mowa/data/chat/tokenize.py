"""Tokenize conversations and texts into token ids and a loss mask, and report likely mistakes.

`render` finds the spans that the assistant writes, `encode` tokenizes them; this module limits their length, counts
what was left out and checks the result.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from mowa.data.chat.checks import TokenizationIssue, check_samples
from mowa.data.chat.conversations import MAX_INVALID_RATIO, ChatDataset
from mowa.data.chat.encode import SPECIALS_IN_CONVERSATION, SPECIALS_IN_DOCUMENT, Encoder, TokenizedSample
from mowa.data.chat.samples import Conversation, Document, Tally
from mowa.errors import DataError

TRAIN_ON = ("auto", "responses", "last", "all")
ON_OVERFLOW = ("drop", "truncate", "split")

_NOT_TRAINED = "no trained tokens"
_PROGRESS_SAMPLES = 5_000  # from which a progress bar is shown
_MAX_LISTED = 8  # unused columns that the summary names


@dataclass(frozen=True, slots=True)
class TokenizationReport:
    """What became of a data set. `dropped`, `excluded` and `warnings` map a reason to (count, the first one).

    excluded            rows that the data set marks as not to be trained on
    unused              columns that are not used → (rows where they hold something, the first one)
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
    excluded: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    unused: Mapping[str, tuple[int, str]] = field(default_factory=dict)

    def summary(self) -> str:
        """Return a text table: the dataset format, a line per count, a line per finding."""
        ratio = f"{self.trained_tokens / self.tokens:.0%} of them" if self.tokens else "-"
        p50, p90, longest = self.length_percentiles
        rows = [("rows", self.num_rows, self.dataset_format), ("samples", self.kept, "")]
        rows += [(f"dropped: {reason}", count, first) for reason, (count, first) in self.dropped.items()]
        rows += [(f"excluded: {reason}", count, f"first: {first}") for reason, (count, first) in self.excluded.items()]
        if self.unused:
            names = list(self.unused)[:_MAX_LISTED] + ["…"] * (len(self.unused) > _MAX_LISTED)
            rows.append(("columns not used", len(self.unused), ", ".join(names)))
        rows += [(f"warning: {reason}", count, f"first: {first}") for reason, (count, first) in self.warnings.items()]
        rows += [("tokens", self.tokens, ""), ("trained tokens", self.trained_tokens, ratio)]
        rows += [("tokens per sample", p50, f"(p50), {p90} (p90), {longest} (longest)")]
        name_width, count_width = max(len(name) for name, *_ in rows), max(len(f"{count:,}") for _, count, _ in rows)
        lines = [f"{name:<{name_width}}  {count:>{count_width},}  {note}".rstrip() for name, count, note in rows]
        return "\n".join([*lines, *map(str, self.findings)])


def tokenize_conversations(
    samples: ChatDataset | Iterable[Conversation | Document],
    tokenizer: Any,
    *,
    train_on: str = "auto",
    on_overflow: str = "drop",
    max_length: int,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    eos_token_ids: Iterable[int] = (),
    vocab_size: int | None = None,
) -> tuple[list[TokenizedSample], TokenizationReport]:
    """Tokenize into samples of at most `max_length` tokens, and report what was found.

    train_on       responses (every assistant message), last (the last one), all; auto: responses of conversations, all
                   of documents. A response includes the token that ends it, but not the line break after that
    on_overflow    longer samples: drop; truncate (keep the beginning, if any of it is trained on); split (documents
                   into windows; conversations are dropped)
    chat_template  Jinja text to use instead of the tokenizer's chat template
    chat_template_kwargs  further variables of the chat template, such as enable_thinking
    eos_token_ids  tokens that end the model's answers (its generation config), in addition to the tokenizer's EOS
    vocab_size     rows of the model's embeddings

    Documents get the BOS that the tokenizer adds, and EOS at the end. Raises DataError if a conversation needs a
    template and there is none, if responses of documents are requested, and for fatal issues: a token outside the
    embeddings, BOS twice, no trained tokens in any sample. And for a `ChatDataset`, if more than half of its rows are
    invalid or lost, or with its `on_invalid: stop` at the first one that is.
    """
    for name, value, known in (("train_on", train_on, TRAIN_ON), ("on_overflow", on_overflow, ON_OVERFLOW)):
        if value not in known:
            raise DataError(f"{name}: {value!r} is none of {', '.join(known)}")
    everything, tally = list(samples), Tally()
    if isinstance(samples, ChatDataset):
        counts = (dict(samples.dropped), dict(samples.excluded), dict(samples.warnings))
        tally = Tally(*counts, stop_source=samples.source if samples.on_invalid == "stop" else None)
    encoder, fitted = Encoder(tokenizer, tally), []
    for sample in encoder.encode(_progress(everything), train_on, chat_template, chat_template_kwargs):
        fitted += _fit(sample, max_length, on_overflow, sample.id in encoder.document_ids, tally)
    kept = _drop_untrained(fitted, tally)
    if isinstance(samples, ChatDataset):
        _validate_counts(samples, kept, tally)
    issues = check_samples(
        kept,
        tokenizer,
        eos_token_ids={*eos_token_ids, *_to_list(tokenizer.eos_token_id)},
        vocab_size=vocab_size,
        document_ids=encoder.document_ids,
        truncated_ids={sample.id for sample in kept if len(sample) == max_length},
        documents_with_specials=tally.warnings.get(SPECIALS_IN_DOCUMENT, (0, ""))[0],
        conversations_with_specials=tally.warnings.get(SPECIALS_IN_CONVERSATION, (0, ""))[0],
        num_dropped=len(everything) if not kept else 0,
    )
    report = _make_report(samples, everything, kept, tally, issues)
    if fatal := [one for one in issues if one.fatal]:
        reasons = "" if kept else "".join(f"; {count} dropped: {first}" for count, first in tally.dropped.values())
        raise DataError("; ".join(f"{one.name}: {one.detail}. {one.advice}" for one in fatal) + reasons)
    return kept, report


def _drop_untrained(samples: Sequence[TokenizedSample], tally: Tally) -> list[TokenizedSample]:
    """Return the samples that have a token with a loss; the first token has none, since nothing predicts it."""
    kept = []
    for sample in samples:
        if sample.loss_mask[1:].any():
            kept.append(sample)
        else:
            tally.drop(_NOT_TRAINED, sample.id)
    return kept


def _validate_counts(samples: ChatDataset, kept: Sequence[TokenizedSample], tally: Tally) -> None:
    """Raise DataError if more than half of the rows were lost, whether they were invalid or refused later."""
    considered = samples.num_rows - tally.num_excluded
    lost = considered - len({sample.conversation_id for sample in kept})
    if not considered:
        reason, (count, first) = max(tally.excluded.items(), key=lambda entry: entry[1][0])
        raise DataError(f"{samples.source}: none of {samples.num_rows} rows is trained on; {count}: {reason} ({first})")
    if lost > MAX_INVALID_RATIO * considered:
        reason, (count, first) = max(tally.dropped.items(), key=lambda entry: entry[1][0])
        raise DataError(
            f"{samples.source}: {lost} of {considered} rows are left out, most of them because of: {reason} ({count}, "
            f"first: {first}). {_advice(reason)}"
        )


def _advice(reason: str) -> str:
    if reason.startswith("longer than"):
        return "Raise data.max_length, or cut them (data.on_overflow: truncate)."
    if "the chat template" in reason:
        return "Set another one (data.chat_template), or remove from the rows what it omits."
    if reason == _NOT_TRAINED:
        return "See data.train_on and data.max_length."
    return "Correct them."


def _make_report(
    samples: Any,
    everything: Sequence[Any],
    kept: Sequence[TokenizedSample],
    tally: Tally,
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
        excluded=tally.excluded,
        unused=samples.unused if isinstance(samples, ChatDataset) else {},
    )


def _progress(samples: Sequence[Any]) -> Iterable[Any]:
    if len(samples) < _PROGRESS_SAMPLES or not sys.stderr.isatty():
        return samples
    from tqdm import tqdm

    return tqdm(samples, desc="tokenize", unit="", leave=False)


def _to_list(value: Any) -> list[int]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _fit(
    sample: TokenizedSample, max_length: int, on_overflow: str, is_document: bool, tally: Tally
) -> list[TokenizedSample]:
    if len(sample) <= max_length:
        return [sample]
    if on_overflow == "truncate":
        tally.warn(f"longer than {max_length} tokens, truncated", sample.id)
        ids, mask = sample.input_ids[:max_length], sample.loss_mask[:max_length]
        return [TokenizedSample(sample.id, ids, mask, sample.conversation_id)]
    if on_overflow == "split" and is_document:
        tally.warn(f"longer than {max_length} tokens, split", sample.id)
        starts = [start for start in range(0, len(sample), max_length) if len(sample) - start > 1]
        windows = [slice(start, start + max_length) for start in starts]
        return [
            TokenizedSample(f"{sample.id}#{number}", sample.input_ids[window], sample.loss_mask[window], sample.id)
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
