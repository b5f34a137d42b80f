"""Build the quantization report of a language model: loss, perplexity and size in several schemes, and a verdict.

| verdict      | when                                                                                         |
|--------------|----------------------------------------------------------------------------------------------|
| pass         | perplexity increases by at most `max_perplexity_increase` (relative)                         |
| inconclusive | it increases by more, but not significantly; or fewer than `MIN_TOKENS` tokens are predicted |
| fail         | it increases by more and significantly, or an output is NaN                                  |

The verdict is not about agreement: a language model has near ties at many positions, and rounding its weights to
bfloat16 alone changes the top token at a few percent of them. Each scheme is exported to safetensors and loaded from
there; exports of the same model and texts are reused, so that an interrupted report resumes.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from mowa import hardware
from mowa.data.chat.encode import TokenizedSample
from mowa.errors import DataError, ModelError
from mowa.evaluation import quant_report, scoring
from mowa.evaluation.quant_report import FAIL, INCONCLUSIVE, PASS
from mowa.evaluation.report import SOURCE_FILE
from mowa.evaluation.text_bench import weights_size
from mowa.exporters import export, manifest
from mowa.loading import causal as loading
from mowa.models.diff import ModelDiff
from mowa.models.tolerances import MAX_PERPLEXITY_INCREASE, MIN_TOKENS
from mowa.quantization import ptq, schemes
from mowa.tasks import causal, metrics
from mowa.tasks.metrics import Loss, LossChange
from mowa.types import CausalModel, Scheme

FORMAT, UNQUANTIZED = "safetensors", "checkpoint"
VERSIONED_PACKAGES = ("mowa", "torch", "transformers", "compressed-tensors", "bitsandbytes")
ProgressCallback = Callable[[str, float], object]  # stage, fraction of it that is done


@dataclass(frozen=True, slots=True)
class TextReportConfig:
    """What to report.

    schemes      schemes of language models
    data, split  conversations or texts, of which at most `max_samples` are evaluated (0: all)
    keep_failed  keep exports that fail
    baseline     model that is the reference; empty: the model itself
    """

    schemes: tuple[Scheme, ...]
    data: str
    split: str = ""
    max_samples: int = 0
    max_perplexity_increase: float = MAX_PERPLEXITY_INCREASE
    keep_failed: bool = False
    baseline: str = ""


@dataclass(frozen=True, slots=True)
class TextReportRow:
    """A language model in one scheme; `checkpoint` is the model as it is stored.

    size_ratio   size relative to the checkpoint
    loss_change  relative to the reference, paired by sample
    diff         difference of its next-token distributions from the reference's
    """

    scheme: str
    folder: str
    size_bytes: int
    size_ratio: float
    loss: Loss | None = None
    loss_change: LossChange | None = None
    diff: ModelDiff | None = None
    verdict: str = PASS
    reason: str = ""


@dataclass(frozen=True, slots=True)
class TextReport:
    """Rows of `model`, evaluated on `num_samples` of `data`. The reference is the model itself, or another one."""

    model: str
    data: str
    num_samples: int
    num_tokens: int
    max_perplexity_increase: float
    machine: str
    versions: Mapping[str, str | None]
    rows: tuple[TextReportRow, ...]


def build_text_report(
    model: CausalModel,
    config: TextReportConfig,
    out: Path | None = None,
    *,
    on_progress: ProgressCallback = lambda stage, fraction: None,
) -> TextReport:
    """Build the report of `model`; with `out`, keep the exports and quant_report.json in that folder.

    A scheme that does not fit a matrix is a failed row with the reason. Failed exports are deleted unless
    `keep_failed`. Raises ModelError for schemes that language models do not have, DataError without texts, and as
    `export` does.
    """
    for scheme in config.schemes:
        if reason := ptq.unsupported_reason(model, scheme):
            raise ModelError(f"{model.origin.name} cannot be quantized to {schemes.format_scheme(scheme)}: {reason}")
    samples = scoring.read_text_samples(model, config.data, split=config.split, max_samples=config.max_samples)
    reference = loading.load(config.baseline) if config.baseline else model
    with ExitStack() as open_:
        folder = Path(open_.enter_context(TemporaryDirectory())) if out is None else out
        work = _Work(model, config, folder, samples, reference, weights_size(model.origin.folder))
        on_progress(f"{UNQUANTIZED}: measuring", 0.0)
        row = _row(work, UNQUANTIZED, model.origin.folder, model)
        rows = [row if config.baseline else replace(row, verdict=PASS, reason="reference")]
        for index, scheme in enumerate(config.schemes):
            on_progress(f"{schemes.format_scheme(scheme)}: quantizing and measuring", index / len(config.schemes))
            rows.append(_quantized_row(work, scheme))
    report = TextReport(
        model=model.origin.name,
        data=config.data,
        num_samples=len(samples),
        num_tokens=causal.count_trained_tokens(samples),
        max_perplexity_increase=config.max_perplexity_increase,
        machine=hardware.describe_machine(),
        versions={name: hardware.installed_version(name) for name in VERSIONED_PACKAGES},
        rows=tuple(rows),
    )
    if out is not None:
        quant_report.write_json(report, out / quant_report.JSON_FILE)
    return report


@dataclass(frozen=True, slots=True)
class _Work:
    """What all rows of a report share. `size_bytes` is that of the checkpoint."""

    model: CausalModel
    config: TextReportConfig
    out: Path
    samples: Sequence[TokenizedSample]
    reference: CausalModel
    size_bytes: int

    @property
    def key(self) -> str:
        """Hash of the model and the texts."""
        digest = hashlib.sha256(manifest.model_sha256(self.model).encode())
        for sample in self.samples:
            digest.update(np.asarray(sample.input_ids, np.int64).tobytes())
        return digest.hexdigest()


def _quantized_row(work: _Work, scheme: Scheme) -> TextReportRow:
    label = schemes.format_scheme(scheme)
    folder = work.out / f"{FORMAT}-{label}"
    try:
        _export(work, scheme, folder)
    except ModelError as error:
        return TextReportRow(label, str(folder), 0, 0.0, verdict=FAIL, reason=str(error))
    row = _row(work, label, folder, loading.load(str(folder)))
    if row.verdict == FAIL and not work.config.keep_failed:
        shutil.rmtree(folder)
    return row


def _export(work: _Work, scheme: Scheme, folder: Path) -> None:
    """Quantize and export the model, unless the export in `folder` is of the same model and texts."""
    source = folder / SOURCE_FILE
    if source.is_file() and source.read_text() == work.key:
        return
    if folder.exists():
        raise DataError(f"{folder} is from another model or other texts: choose another --out, or delete it")
    export(ptq.quantize(work.model, scheme), FORMAT, folder)
    source.write_text(work.key)


def _row(work: _Work, label: str, folder: Path, candidate: CausalModel) -> TextReportRow:
    before, after, diff = scoring.compare_text(work.reference, candidate, work.samples)
    loss = metrics.bootstrap_loss(after.nll, after.tokens)
    change = metrics.paired_bootstrap_loss(before.nll, after.nll, after.tokens)
    verdict, reason = decide_verdict(loss, change, work.config.max_perplexity_increase)
    size_bytes = weights_size(folder)
    ratio = size_bytes / work.size_bytes
    return TextReportRow(label, str(folder), size_bytes, ratio, loss, change, diff, verdict, reason)


def decide_verdict(
    loss: Loss, change: LossChange, max_perplexity_increase: float = MAX_PERPLEXITY_INCREASE
) -> tuple[str, str]:
    """Return the verdict and its reason in one line."""
    if not math.isfinite(change.loss):
        return FAIL, "NaN in the output"
    increase, (low, high) = change.perplexity_ratio - 1, (edge - 1 for edge in change.perplexity_ratio_interval)
    summary = f"perplexity {increase:+.2%}, limit {max_perplexity_increase:+.2%}"
    if loss.num_tokens < MIN_TOKENS:
        return INCONCLUSIVE, f"only {loss.num_tokens} tokens, at least {MIN_TOKENS} are needed ({summary})"
    if low > max_perplexity_increase:
        return FAIL, f"{summary}, significant ({low:+.2%} to {high:+.2%})"
    if increase <= max_perplexity_increase:
        return PASS, summary
    return INCONCLUSIVE, f"{summary}, not significant ({low:+.2%} to {high:+.2%})"
