"""Detect from losses, outputs and gradients that a fine-tuning run cannot succeed; one class for each failure.

Each sentinel is updated step by step and returns a Finding or None. `callbacks` feeds them, logs what they find, and
stops the run.

Losses are in nats per token. Guessing characters by their frequency costs about 3, and the initial plateau of CTC,
where every frame is blank, is near that. The plateau is normal: it ends by itself, mostly within some hundred steps,
and the loss decreases a little meanwhile. So nothing counts as stuck before the loss has stopped decreasing.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

UNTRAINED_LOSS = 1.5  # nats per token: half of the cost of guessing; above it, transcripts are unreadable
IMPROVEMENT_RATIO = 0.995  # a loss below this multiple of the lowest one so far counts as a decrease
MIN_LOSS = 0.1  # nats per token: floor of the loss that divergence is measured from
CONSTANT_TOKENS, CONSTANT_SHARE = 3, 0.95  # constant output: this many tokens make up this share of the output
TOKEN_CHECK_INTERVAL = 10  # batches between checks of the output tokens
# Consecutive checks: LoRA's A has no gradient until its B has changed, and layerdrop skips layers now and then.
ZERO_GRAD_CHECKS = 10
MAX_SKIPPED_STEPS = 20  # consecutive steps that fp16's loss scaling may skip while it searches for its scale
# Parameters with zero gradient by design: SpecAugment's embedding without masks, biases that softmax cancels.
EXPECTED_ZERO_GRAD = ("masked_spec_embed", "k_proj.bias", "linear_k.bias", "key.bias")
NON_FINITE_SUGGESTION = (
    "If it is always these, leave them out; else try a lower optimizer.learning_rate, or optimizer.precision: bf16 or "
    "float32"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """What a sentinel found at a step, with its numbers, and what to try. A fatal finding stops the run."""

    monitor: str
    step: int
    message: str
    suggestion: str
    fatal: bool = False

    def __str__(self) -> str:
        return f"{self.monitor} at step {self.step}: {self.message}\n  {self.suggestion}"


def format_names(names: Sequence[str], max_names: int = 4) -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - max_names} more" if len(names) > max_names else ""
    return ", ".join(names[:max_names]) + more


class RunningMean:
    """Exponential moving average over about `span` values, with bias correction."""

    def __init__(self, span: float) -> None:
        self.decay, self.total, self.weight = 1 - 1 / span, 0.0, 0.0

    def update(self, value: float) -> float:
        self.total = self.decay * self.total + (1 - self.decay) * value
        self.weight = self.decay * self.weight + (1 - self.decay)
        return self.total / self.weight


class PlateauTracker:
    """Count the steps for which a bad state has lasted without the loss decreasing by 0.5 %.

    0 in the first `patience` steps and during warmup; the count restarts when the state ends.
    """

    def __init__(self, patience: int) -> None:
        self.patience, self.first = patience, -1
        self.best, self.last_improvement = math.inf, 0

    def update(self, step: int, bad: bool, loss: float, warming: bool) -> int:
        self.first = step if self.first < 0 else self.first
        if not bad or warming or step - self.first < self.patience:
            self.best = math.inf
            return 0
        if loss < IMPROVEMENT_RATIO * self.best:
            self.best, self.last_improvement = loss, step
        return step - self.last_improvement


class BlankCollapse:
    """Detect an output of almost only blanks for `patience` steps after the loss stopped decreasing."""

    def __init__(self, blank_ratio: float, patience: int) -> None:
        self.blank_ratio, self.patience, self.plateau = blank_ratio, patience, PlateauTracker(patience)
        self.blanks, self.losses = RunningMean(max(5, patience / 4)), RunningMean(max(5, patience / 2))
        self.warned = False

    def update(self, step: int, blank_ratio: float, loss: float, *, warming: bool = False) -> Finding | None:
        """Update with the fraction of blank frames in a batch: warn after half of the patience, then stop the run."""
        blank_ratio, loss = self.blanks.update(blank_ratio), self.losses.update(loss)
        lasted = self.plateau.update(step, blank_ratio >= self.blank_ratio, loss, warming)
        message = f"{blank_ratio:.1%} of the frames are blank, and the loss has stayed at {loss:.3g} for {lasted} steps"
        if lasted >= self.patience:
            return Finding(
                "blank collapse",
                step,
                message,
                "Try optimizer.learning_rate 3 times higher (lower, if the loss had decreased before), method: full, a "
                "lower spec_augment.mask_time_prob; or wait longer: monitors.collapse_patience: "
                f"{2 * self.patience}",
                fatal=True,
            )
        if lasted >= self.patience / 2 and not self.warned:
            self.warned = True
            suggestion = f"This is normal at the start of CTC training; the run stops if it lasts {self.patience} steps"
            return Finding("blank plateau", step, message, suggestion)
        return None


class ConstantOutput:
    """Detect the same few output tokens for all inputs, for `patience` steps after the loss stopped decreasing."""

    def __init__(self, patience: int, tokens: Sequence[str] = ()) -> None:
        self.patience, self.plateau, self.tokens = patience, PlateauTracker(patience), tokens
        self.losses = RunningMean(max(3, patience / 4 / TOKEN_CHECK_INTERVAL))

    def update(
        self, step: int, frames: Sequence[int], blank: int, loss: float, *, warming: bool = False
    ) -> Finding | None:
        """Update with the predicted ids of all frames of a batch; call it for every TOKEN_CHECK_INTERVAL-th batch."""
        counts = Counter(now for before, now in pairwise([blank, *frames]) if now not in (before, blank))
        common = [token for token, _ in counts.most_common(CONSTANT_TOKENS)]
        few = bool(counts) and sum(counts[token] for token in common) >= CONSTANT_SHARE * counts.total()
        loss = self.losses.update(loss)
        lasted = self.plateau.update(step, few and loss > UNTRAINED_LOSS, loss, warming)
        if lasted < self.patience:
            return None
        names = ", ".join(repr(self.tokens[token]) if self.tokens else str(token) for token in common)
        return Finding(
            "constant output",
            step,
            f"the output is only {names} for all inputs, and the loss has stayed at {loss:.3g} for {lasted} steps",
            "Check that the texts belong to their recordings; then try optimizer.learning_rate 3 times lower, a higher "
            "optimizer.warmup_ratio, or method: full",
            fatal=True,
        )


class Divergence:
    """Detect a moving average of the loss above `factor` times its best for `patience` steps."""

    def __init__(self, factor: float, patience: int) -> None:
        self.factor, self.patience, self.losses = factor, patience, RunningMean(10)
        self.best = self.limit = math.inf
        self.count, self.since = 0, 0

    def update(self, step: int, loss: float) -> Finding | None:
        now, self.count = self.losses.update(loss), self.count + 1
        self.best = min(self.best, now)
        mark = max(now, MIN_LOSS) * (1 if self.count >= 5 else 2)  # the first batches may have been easy
        self.limit = min(self.limit, self.factor * mark)
        if now <= self.limit:
            self.since = step
        if step - self.since < self.patience:
            return None
        return Finding(
            "divergence",
            step,
            f"the loss has been above {self.limit:.3g} for {step - self.since} steps; it is {now:.3g}, its best was "
            f"{self.best:.3g}",
            "Try optimizer.learning_rate 3 to 10 times lower, a higher optimizer.warmup_ratio, or a lower "
            "optimizer.max_grad_norm",
            fatal=True,
        )


class NoLearning:
    """Detect a loss that does not decrease from the first step on; checked after each `patience` steps after warmup.

    Fatal only where the loss is that of guessing: the loss of a checkpoint that is already good may stay flat.
    """

    def __init__(self, patience: int) -> None:
        self.patience, self.window = patience, max(5, patience // 4)
        self.early: list[float] = []
        self.late: deque[float] = deque(maxlen=self.window)
        self.since, self.done = 0, False

    def update(self, step: int, loss: float, *, warming: bool = False) -> Finding | None:
        if not self.early:
            self.done = step > 0  # a resumed run was checked before
        if self.done:
            return None
        if len(self.early) < self.window:
            self.early.append(loss)
        self.late.append(loss)
        self.since = step if warming else self.since
        if step - self.since < self.patience:
            return None
        self.since = step
        first, last = (sum(part) / len(part) for part in (self.early, self.late))
        if last < 0.97 * first:
            self.done = last < 0.9 * first  # a smaller decrease may be noise
            return None
        self.done = True
        guessing = last > UNTRAINED_LOSS
        return Finding(
            "loss not decreasing",
            step,
            f"the loss was {first:.3g} at the start and is {last:.3g} after {step} steps",
            "Check that texts belong to their recordings, or responses to their prompts; then try "
            "optimizer.learning_rate 10 times higher, or a method that trains more (lora, top-6, full)"
            if guessing
            else "Ignore this if the checkpoint is already good on it; else try a higher optimizer.learning_rate",
            fatal=guessing,
        )


class GradientMonitor:
    """Detect non-finite gradients, and trainable parameters that get no gradient."""

    def __init__(self, *, scaled: bool = False) -> None:
        self.allowed = MAX_SKIPPED_STEPS if scaled else 0  # fp16 skips such steps while it searches for its loss scale
        self.non_finite_steps, self.zero_counts, self.warned = 0, Counter[str](), False

    def check_norm(self, step: int, norm: float) -> Finding | None:
        """Check the norm of the whole gradient; call it at every step."""
        self.non_finite_steps = 0 if math.isfinite(norm) else self.non_finite_steps + 1
        if self.non_finite_steps <= self.allowed:
            return None
        return Finding(
            "non-finite gradient",
            step,
            f"the loss is finite, but the gradient norm is {norm}"
            + (f" for {self.non_finite_steps} consecutive steps" if self.allowed else ""),
            "Try optimizer.precision: bf16 or float32, a lower optimizer.learning_rate, or a higher "
            "optimizer.warmup_ratio",
            fatal=True,
        )

    def check_parameters(self, step: int, norms: Mapping[str, float]) -> Finding | None:
        """Check the gradient norm of each trainable parameter by name; 0 where there is none."""
        if not all(map(math.isfinite, norms.values())):
            return None
        for name, norm in norms.items():
            self.zero_counts[name] = self.zero_counts[name] + 1 if norm == 0 else 0
        watched = [name for name in norms if not name.endswith(EXPECTED_ZERO_GRAD)]
        dead = [name for name in watched if self.zero_counts[name] >= ZERO_GRAD_CHECKS]
        if not dead or self.warned:
            return None
        self.warned = True
        everything = len(dead) == len(watched)
        return Finding(
            "no gradient",
            step,
            f"{len(dead)} of {len(norms)} trainable parameters got no gradient in {ZERO_GRAD_CHECKS} checks in a row: "
            f"{format_names(dead)}",
            "The loss does not depend on what is trained: look for a detach() or no_grad(), or use another method"
            if everything
            else "Freeze them if the net does not use them (method); else look for a detach() before the loss",
            fatal=everything,
        )


class Forgetting:
    """Detect that the error rate on a replay set exceeds `factor` times its initial value."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.baseline: dict[str, float] = {}

    def update(self, step: int, name: str, metrics: Mapping[str, float]) -> Finding | None:
        kind = "cer" if "cer" in metrics else "wer"
        if kind not in metrics:
            return None
        start, rate = self.baseline.setdefault(name, metrics[kind]), metrics[kind]
        if rate <= max(self.factor * start, start + 0.01):  # a single error is a large multiple of almost none
            return None
        return Finding(
            f"forgetting {name}",
            step,
            f"{kind.upper()} on this set was {start:.1%} at the start and is {rate:.1%}",
            "Add such recordings to data.train (with a share), or try method: lora or a lower optimizer.learning_rate",
        )


class Overfitting:
    """Detect a dev loss that rises three times in a row while the training loss falls and the error rate does not."""

    def __init__(self) -> None:
        self.history: dict[str, list[tuple[float, float, float]]] = {}

    def update(self, step: int, name: str, metrics: Mapping[str, float], train_loss: float) -> Finding | None:
        """Update with the metrics of one evaluation and the recent training loss."""
        loss = metrics.get("loss", math.nan)
        if not (math.isfinite(loss) and math.isfinite(train_loss)):
            return None
        rows = self.history.setdefault(name, [])
        rows.append((loss, metrics.get("wer", 1 - metrics.get("accuracy", -math.inf)), train_loss))
        if len(rows) < 4:
            return None
        best = min(rows[:-3])  # the lowest dev loss before the last three
        rising = best[0] * 1.02 < rows[-3][0] < rows[-2][0] < rows[-1][0]
        better = rows[-1][1] < min(row[1] for row in rows[:-1])
        if not rising or better or train_loss >= best[2]:
            return None
        return Finding(
            f"overfitting {name}",
            step,
            f"loss on this set rose from {best[0]:.3g} to {loss:.3g}, while the training loss fell from {best[2]:.3g} "
            f"to {train_loss:.3g}",
            "The best checkpoint is kept. Next time try method: lora, fewer optimizer.epochs, more augmentation, or "
            "evaluation.early_stopping_patience: 3",
        )


def check_losses(step: int, losses: Sequence[float], ids: Sequence[str]) -> Finding | None:
    """Check the CTC losses [U] of a batch, in nats, before the backward pass; `ids` names the recordings.

    A CTC loss is NaN where the net's output is, and infinite where a recording has fewer frames than its text needs.
    """
    nan = [name for name, loss in zip(ids, losses, strict=True) if math.isnan(loss)]
    if nan:
        return Finding(
            "non-finite loss",
            step,
            f"the loss of {len(nan)} of {len(losses)} recordings in the batch is NaN: {format_names(nan)}",
            NON_FINITE_SUGGESTION,
            fatal=True,
        )
    short = [name for name, loss in zip(ids, losses, strict=True) if math.isinf(loss)]
    if not short:
        return None
    return Finding(
        "too few frames",
        step,
        f"the loss of {len(short)} of {len(losses)} recordings in the batch is infinite, since they have fewer frames "
        f"than their texts need: {format_names(short)}",
        "Check that these texts belong to these recordings, or leave them out",
        fatal=True,
    )


def check_loss(step: int, loss: float, ids: Sequence[str]) -> Finding | None:
    """Check the loss of a batch of texts, in nats per token, before the backward pass; `ids` names the samples."""
    if math.isfinite(loss):
        return None
    return Finding(
        "non-finite loss",
        step,
        f"the loss of a batch is {loss}: {format_names(ids)}",
        NON_FINITE_SUGGESTION,
        fatal=True,
    )
