"""Evaluate a model on data with known answers: error rates for speech, loss and perplexity for text, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mowa.data.chat import conversations, tokenize
from mowa.data.chat.encode import TokenizedSample
from mowa.data.manifests.examples import list_examples
from mowa.engines import pipeline
from mowa.engines.protocol import Engine
from mowa.engines.settings import TranscriptionSettings
from mowa.errors import DataError
from mowa.models.diff import ModelDiff, compare_pairs
from mowa.tasks import causal, metrics
from mowa.tasks.causal import SampleLosses
from mowa.tasks.metrics import Estimate
from mowa.training.causal import batches
from mowa.types import CausalModel, Failure

ProgressCallback = Callable[[float], object]
MAX_LENGTH = 2048  # tokens of a sample of text, if the model's context has them; longer samples are cut
DEFAULT_SETTINGS = TranscriptionSettings()
BATCH_TOKENS = 1024  # tokens of a batch, unless one sample is longer


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Metrics of one model on one data set.

    task      ctc: wer, cer (1.0: all wrong); causal: loss (nats per token), perplexity, accuracy of the top token
    samples   recordings or texts that were evaluated
    units     reference words, or tokens
    failures  recordings that could not be read; they are not in the metrics
    """

    model: str
    task: str
    data: str
    metrics: dict[str, Estimate]
    samples: int
    units: int
    failures: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        unit, percent = ("words", 100.0) if self.task == "ctc" else ("tokens", 1.0)
        sign = " %" if self.task == "ctc" else ""
        plural = "" if self.samples == 1 else "s"
        lines = [f"{self.model} on {self.data}: {self.samples:,} sample{plural}, {self.units:,} {unit}"]
        for name, one in self.metrics.items():
            digits = 1 if self.task == "ctc" else 3
            spans = [f"{percent * edge:.{digits}f}" for edge in (one.value, one.low, one.high)]
            interval = f" (95 %: {spans[1]}–{spans[2]})" if self.samples > 1 else ""
            lines.append(f"{name:<10} {spans[0]}{sign}{interval}")
        lines += [f"not evaluated: {failure}" for failure in self.failures]
        return "\n".join(lines)


def evaluate_speech(
    engine: Engine,
    data: str | Path,
    *,
    split: str = "",
    max_samples: int = 0,
    settings: TranscriptionSettings = DEFAULT_SETTINGS,
    on_progress: ProgressCallback = lambda seconds: None,
) -> Evaluation:
    """Transcribe recordings and compare with their texts.

    Recordings that cannot be read are listed in `failures`. Raises DataError if no recording has a text or none can be
    read.
    """
    _validate_max_samples(max_samples)
    examples = list(list_examples([data], split, require_text=True))
    examples = examples[:max_samples] if max_samples else examples
    references, hypotheses, failures = [], [], []
    for example, outcome in pipeline.transcribe_examples(examples, engine, settings, on_progress=on_progress):
        if isinstance(outcome, Failure):
            failures.append(str(outcome.error))
        else:
            references.append(example.text)
            hypotheses.append(outcome.text)
    if not references:
        raise DataError(
            f"{data}: none of the {len(examples)} recordings could be read. {failures[0] if failures else ''}"
        )
    rates = metrics.bootstrap_error_rates(references, hypotheses)
    found = {"wer": Estimate(rates.wer, *rates.wer_interval), "cer": Estimate(rates.cer, *rates.cer_interval)}
    return Evaluation(engine.origin.name, "ctc", str(data), found, len(references), rates.num_words, tuple(failures))


def evaluate_text(
    model: CausalModel,
    data: str | Path,
    *,
    split: str = "",
    max_samples: int = 0,
    train_on: str = "auto",
    max_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    on_progress: ProgressCallback = lambda samples: None,
) -> Evaluation:
    """Compute the loss of conversations (on the assistant's answers) or texts (on every token).

    Samples longer than `max_length` tokens (None: MAX_LENGTH, or the context if it is shorter) are cut. `train_on` is
    responses, last or all, as in recipes; auto: responses of conversations, all of texts. Raises DataError if no sample
    is left, or `max_length` is above the context.
    """
    samples = read_text_samples(
        model,
        data,
        split=split,
        max_samples=max_samples,
        train_on=train_on,
        max_length=max_length,
        chat_template_kwargs=chat_template_kwargs,
    )

    def padded() -> Iterator[dict[str, Tensor]]:
        for batch in batches.padded_batches(samples, BATCH_TOKENS):
            yield batch
            on_progress(len(batch["labels"]))

    found_losses = causal.sample_losses(model.net, padded())
    tokens = found_losses.tokens
    loss = metrics.bootstrap_loss(found_losses.nll, tokens)
    found = {
        "loss": Estimate(loss.loss, *loss.loss_interval),
        "perplexity": Estimate(loss.perplexity, *loss.perplexity_interval),
        "accuracy": metrics.bootstrap_ratio(found_losses.correct, tokens),
    }
    return Evaluation(model.origin.name, "causal", str(data), found, len(samples), int(tokens.sum()))


def read_text_samples(
    model: CausalModel,
    data: str | Path,
    *,
    split: str = "",
    max_samples: int = 0,
    train_on: str = "auto",
    max_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[TokenizedSample]:
    """Read and tokenize what `evaluate_text` evaluates. Raises DataError if no sample is left."""
    _validate_max_samples(max_samples)
    length = _resolve_max_length(model, max_length)
    items = conversations.read_conversations(str(data), split)
    options: Any = {"train_on": train_on, "on_overflow": "truncate", "max_length": length}
    options["chat_template_kwargs"] = chat_template_kwargs
    samples = tokenize.tokenize_conversations(items, model.tokenizer, **options)[0]
    samples = samples[:max_samples] if max_samples else samples
    if not causal.count_trained_tokens(samples):
        raise DataError(f"{data}: no sample with tokens to evaluate")
    return samples


def _resolve_max_length(model: CausalModel, max_length: int | None) -> int:
    context = causal.context_length(model.net.config)
    if max_length is None:
        return min(MAX_LENGTH, context or MAX_LENGTH)
    if not isinstance(max_length, int) or max_length < 2:
        raise DataError(f"max_length is {max_length!r}: it must be a whole number of tokens, at least 2")
    if context is not None and max_length > context:
        raise DataError(f"max_length is {max_length:,} tokens, and {model.origin.name} reads at most {context:,}")
    return max_length


def _validate_max_samples(max_samples: int) -> None:
    if not isinstance(max_samples, int) or max_samples < 0:
        raise DataError(f"max_samples is {max_samples!r}: it must be a whole number, at least 0 (all)")


def compare_text(
    reference: CausalModel,
    candidate: CausalModel,
    samples: Sequence[TokenizedSample],
    on_progress: ProgressCallback = lambda samples: None,
) -> tuple[SampleLosses, SampleLosses, ModelDiff]:
    """Evaluate two models on the same N samples, in batches of similar length, padded on the right.

    Returns:
        The reference's and the candidate's `SampleLosses`, [N] each, both in the order of the batches, which is not
        that of `samples`; and the `ModelDiff` of their logits at the trained tokens, candidate against reference. The
        logits of a few tokens are in memory at a time.
    """
    ours: list[SampleLosses] = []
    theirs: list[SampleLosses] = []

    def outputs() -> Iterator[tuple[Tensor, Tensor]]:
        for padded in batches.padded_batches(samples, BATCH_TOKENS):
            before: list[Tensor] = []
            after: list[Tensor] = []
            for one, other in _score_both(reference.net, candidate.net, padded):
                before.append(one.losses())
                after.append(before[-1] if other is one else other.losses())
                yield one.logits, other.logits
            ours.append(causal.sum_losses(before, len(padded["labels"])))
            theirs.append(causal.sum_losses(after, len(padded["labels"])))
            on_progress(len(padded["labels"]))

    diff = compare_pairs(outputs())
    return causal.concat_losses(ours), causal.concat_losses(theirs), diff


def _score_both(
    reference: Any, candidate: Any, batch: dict[str, Tensor]
) -> Iterator[tuple[causal.ScoredTokens, causal.ScoredTokens]]:
    """Yield the same trained tokens of a batch by both nets; a net is not run twice."""
    before = causal.score_tokens(reference, batch)
    if candidate is reference:
        return ((one, one) for one in before)
    return zip(before, causal.score_tokens(candidate, batch), strict=True)
