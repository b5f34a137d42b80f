"""Read, tokenize and split the samples of a language-model run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from mowa.data.chat import conversations, tokenize
from mowa.data.chat.encode import TokenizedSample
from mowa.data.chat.template import BUILTIN_TEMPLATES
from mowa.data.text.normalize import normalize_text
from mowa.errors import DataError
from mowa.tasks import causal
from mowa.training.causal import batches
from mowa.training.config.causal import CausalData, CausalRecipe
from mowa.training.config.shared import DataSource
from mowa.training.monitor.sentinels import Finding
from mowa.training.sources import name_sources, subsample
from mowa.types import CausalModel

EVAL_BATCH_TOKENS = 1024  # tokens of a batch, unless one sample is longer, where the stock net evaluates a set


@dataclass(frozen=True, slots=True)
class CausalSplits:
    """Tokenized samples; `dev` and `test` by name.

    `notes` say what was left out and why, `preview` shows samples with the trained tokens highlighted, and `findings`
    are the problems that the tokenizer's checks and the overlap check found.
    """

    train: list[TokenizedSample]
    dev: dict[str, list[TokenizedSample]]
    test: dict[str, list[TokenizedSample]]
    notes: tuple[str, ...]
    preview: str
    findings: tuple[Finding, ...]


def load_splits(recipe: CausalRecipe, model: CausalModel) -> CausalSplits:
    """Read and tokenize what the recipe's `data` section names; sets the tokenizer's chat template where it names one.

    Raises:
        DataError: no sample is left to train or evaluate on, or a check of the tokens found a fatal problem.
    """
    data = recipe.data
    if data.chat_template:
        model.tokenizer.chat_template = load_chat_template(data.chat_template)
    notes: list[str] = []
    findings: list[Finding] = []

    def load(name: str, source: DataSource) -> list[TokenizedSample]:
        items = conversations.read_conversations(
            source.path, source.split, on_invalid=data.on_invalid, columns=data.columns, roles=data.roles
        )
        samples, report = _tokenize(items, data, model)
        notes.append(f"{name}: {report.summary()}")
        findings.extend(Finding(f"{name}: {one.name}", 0, one.detail, one.advice) for one in report.findings)
        if not samples:
            raise DataError(f"{name}: no usable sample\n{report.summary()}")
        return samples

    sources = [load(source.path, source) for source in data.train]
    train = [sample for samples in sources for sample in samples]
    dev = {name: load(name, source) for name, source in name_sources(data.dev, "dev").items()}
    test = {name: load(name, source) for name, source in name_sources(data.test, "test").items()}
    if not dev:
        train, held_out = _hold_out(sources, data.hold_out, recipe.optimizer.seed)
        dev = {"dev": held_out}
    dev = {name: subsample(samples, data.max_eval_samples) for name, samples in dev.items()}
    preview = "\n\n".join(
        tokenize.format_sample(sample, model.tokenizer, color=sys.stderr.isatty()) for sample in train[: data.preview]
    )
    if overlap := find_leakage(train, dev | test, model.tokenizer):
        findings.append(overlap)
    return CausalSplits(train, dev, test, tuple(notes), preview, tuple(findings))


def _tokenize(items: Any, data: CausalData, model: CausalModel) -> Any:
    context = causal.context_length(model.net.config) or data.max_length
    return tokenize.tokenize_conversations(
        items,
        model.tokenizer,
        train_on=data.train_on,
        on_overflow=data.on_overflow,
        max_length=min(data.max_length, context),
        chat_template_kwargs=data.chat_template_kwargs,
        eos_token_ids=causal.eos_token_ids(model),
        vocab_size=model.net.get_input_embeddings().num_embeddings,
    )


def load_chat_template(name: str) -> str:
    """Return the text of a built-in chat template or of a .jinja file. DataError where `name` is neither."""
    if name in BUILTIN_TEMPLATES:
        return BUILTIN_TEMPLATES[name]
    if Path(name).is_file():
        return Path(name).read_text(encoding="utf-8")
    known = ", ".join(BUILTIN_TEMPLATES)
    raise DataError(f"data: chat_template: {name} is neither a file nor one of {known}")


def _hold_out(
    sources: list[list[TokenizedSample]], fraction: float, seed: int
) -> tuple[list[TokenizedSample], list[TokenizedSample]]:
    """Split off a fraction of the conversations of all sources; samples of the same conversation stay together."""
    named = [((number, one.conversation_id), one) for number, samples in enumerate(sources) for one in samples]
    names = list(dict.fromkeys(name for name, _ in named))
    count = round(fraction * len(names))
    if not 0 < count < len(names):
        raise DataError(
            f"no texts to evaluate on: holding out {fraction:.0%} of {len(names)} leaves one side empty; set "
            "data.dev or another data.hold_out"
        )
    taken = {names[index] for index in np.random.default_rng(seed).permutation(len(names))[:count]}
    return [one for name, one in named if name not in taken], [one for name, one in named if name in taken]


def find_leakage(
    train: Sequence[TokenizedSample], unseen: dict[str, list[TokenizedSample]], tokenizer: Any
) -> Finding | None:
    """Return a finding where the texts of dev or test samples are those of samples in train, after `normalize_text`."""
    known = set(_text_hashes(train, tokenizer))
    evaluated = [sample for samples in unseen.values() for sample in samples]
    hashes = _text_hashes(evaluated, tokenizer)
    shared = [sample.id for sample, found in zip(evaluated, hashes, strict=True) if found in known]
    if not shared:
        return None
    names = ", ".join(shared[:3]) + (", …" if len(shared) > 3 else "")
    return Finding(
        "train/test overlap",
        0,
        f"{len(shared)} of {len(evaluated)} samples in dev and test are in train as well ({names})",
        "Losses will be too low: remove these from train, or evaluate on other samples",
    )


def _text_hashes(samples: Sequence[TokenizedSample], tokenizer: Any) -> Iterator[bytes]:
    """Yield a hash of the normalized text of each sample; of its tokens where nothing is left of the text."""
    for sample in samples:
        text = normalize_text(tokenizer.decode(sample.input_ids))
        yield blake2b(text.encode() or np.asarray(sample.input_ids).tobytes(), digest_size=16).digest()


def evaluate(net: Any, samples: Sequence[TokenizedSample]) -> dict[str, float]:
    """Return loss, accuracy and number of trained tokens of `samples`, by the stock forward pass."""
    training = net.training
    net.eval()
    metrics = causal.evaluate(net, batches.padded_batches(samples, EVAL_BATCH_TOKENS))
    net.train(training)
    return metrics
