"""What tells, from numbers alone, that a fine-tuning run would waste a night. One sentinel for each way to waste it.

A sentinel is fed step by step (`see`) and answers with a Finding or None. It knows no Trainer, no files, no terminal:
`watch` feeds them, keeps what they find, and speaks or ends the run.

Losses are in nats a letter: guessing letters by their frequency comes to about three, and CTC's first plateau, on which
every frame is blank, is near that. The plateau is no fault: it ends by itself, mostly within some hundred steps, and
all the while the loss falls a little. So nothing counts as stuck before the loss has stopped falling.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

UNTRAINED_LOSS = 1.5  # nats a letter: half of what guessing costs; above it a text can hardly be read
IMPROVEMENT_RATIO = 0.995  # of the lowest loss so far: at or above it, the loss has not fallen
MIN_LOSS = 0.1  # nats a letter: divergence is measured from here where the loss is lower still
CONSTANT_TOKENS, CONSTANT_SHARE = 3, 0.95  # constant output: so many tokens are this share of all that is heard
TOKEN_CHECK_INTERVAL = 10  # batches between two looks at the tokens themselves
ZERO_GRAD_CHECKS = (
    10  # looks in a row. LoRA's A gets no gradient until its B has moved, and dropped layers get none now and then
)
MAX_SKIPPED_STEPS = 20  # steps in a row that fp16's loss scaling may skip while it looks for its scale
# Of these nothing is learnt by design: SpecAugment's filler where nothing is masked, biases that softmax cancels.
EXPECTED_ZERO_GRAD = ("masked_spec_embed", "k_proj.bias", "linear_k.bias", "key.bias")


@dataclass(frozen=True, slots=True)
class Finding:
    """What a sentinel saw at a step, with its numbers, and what to try. A fatal one ends the run."""

    name: str
    step: int
    message: str
    advice: str
    fatal: bool = False

    def __str__(self) -> str:
        return f"{self.name} at step {self.step}: {self.message}\n  {self.advice}"


def format_names(names: Sequence[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class RunningMean:
    """An exponential running mean over about `span` values, unbiased from the first one on."""

    def __init__(self, span: float) -> None:
        self.decay, self.total, self.weight = 1 - 1 / span, 0.0, 0.0

    def update(self, value: float) -> float:
        self.total = self.decay * self.total + (1 - self.decay) * value
        self.weight = self.decay * self.weight + (1 - self.decay)
        return self.total / self.weight


class PlateauTracker:
    """For how many steps a bad state has lasted in which the loss did not fall by half a per cent.

    0 in the first `patience` steps, 0 while the learning rate still rises; counted anew whenever the state ends.
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
    """Nothing but blanks, a share of at least `share` of the frames, for `patience` steps after the loss stopped."""

    def __init__(self, blank_ratio: float, patience: int) -> None:
        self.blank_ratio, self.patience, self.plateau = blank_ratio, patience, PlateauTracker(patience)
        self.blanks, self.losses, self.warned = (
            RunningMean(max(5, patience / 4)),
            RunningMean(max(5, patience / 2)),
            False,
        )

    def update(self, step: int, blank_ratio: float, loss: float, *, warming: bool = False) -> Finding | None:
        """`blank`: share of blank frames in a batch. A warning at half of the patience, the end at all of it."""
        blank_ratio, loss = self.blanks.update(blank_ratio), self.losses.update(loss)
        lasted = self.plateau.update(step, blank_ratio >= self.blank_ratio, loss, warming)
        seen = (
            f"{blank_ratio:.1%} of the frames are blank, and in {lasted} steps the loss has not fallen below {loss:.3g}"
        )
        if lasted >= self.patience:
            return Finding(
                "blank collapse",
                step,
                seen,
                "CTC begins so, but goes on. Try optimise.learning_rate three times higher (or lower, if it had once "
                f"learnt), more that learns (train: all), weaker masks; or wait longer: watch.patience: "
                f"{2 * self.patience}",
                fatal=True,
            )
        if lasted >= self.patience / 2 and not self.warned:
            self.warned = True
            advice = f"CTC's first plateau looks like this; the run ends if it stays so for {self.patience} steps"
            return Finding("plateau", step, seen, advice)
        return None


class ConstantOutput:
    """Whatever is said, the same few tokens are heard, for `patience` steps after the loss stopped falling."""

    def __init__(self, patience: int, tokens: Sequence[str] = ()) -> None:
        self.patience, self.plateau, self.tokens = patience, PlateauTracker(patience), tokens
        self.losses = RunningMean(max(3, patience / 4 / TOKEN_CHECK_INTERVAL))

    def update(
        self, step: int, frames: Sequence[int], blank: int, loss: float, *, warming: bool = False
    ) -> Finding | None:
        """`frames`: the likeliest token of every frame of a batch of several utterances. For every SELDOMth batch."""
        heard = Counter(now for before, now in pairwise([blank, *frames]) if now not in (before, blank))
        common = [token for token, _ in heard.most_common(CONSTANT_TOKENS)]
        few = bool(heard) and sum(heard[token] for token in common) >= CONSTANT_SHARE * heard.total()
        loss = self.losses.update(loss)
        lasted = self.plateau.update(step, few and loss > UNTRAINED_LOSS, loss, warming)
        if lasted < self.patience:
            return None
        spelt = ", ".join(repr(self.tokens[token]) if self.tokens else str(token) for token in common)
        return Finding(
            "constant output",
            step,
            f"whatever was said, only {spelt} was heard; in {lasted} steps the loss has not fallen below {loss:.3g}",
            "Check that the texts belong to their recordings; then try a learning rate three times lower, a longer "
            "optimise.warmup, or more that learns (train: all)",
            fatal=True,
        )


class Divergence:
    """The running loss stays above `times` its best for `lasting` steps. A few bad batches are no divergence."""

    def __init__(self, factor: float, patience: int) -> None:
        self.factor, self.patience, self.losses = factor, patience, RunningMean(10)
        self.best = self.limit = math.inf
        self.count, self.since = 0, 0

    def update(self, step: int, loss: float) -> Finding | None:
        now, self.count = self.losses.update(loss), self.count + 1
        self.best = min(self.best, now)
        mark = max(now, MIN_LOSS) * (1 if self.count >= 5 else 2)  # the first batches may have been easy ones
        self.limit = min(self.limit, self.factor * mark)
        if now <= self.limit:
            self.since = step
        if step - self.since < self.patience:
            return None
        return Finding(
            "divergence",
            step,
            f"for {step - self.since} steps the loss has been over {self.limit:.3g}; its best was {self.best:.3g}, and "
            f"now it is {now:.3g}",
            "Try optimise.learning_rate three to ten times lower, a longer optimise.warmup, a smaller optimise.clip",
            fatal=True,
        )


class NoLearning:
    """From the first step on the loss is flat: looked at after each `patience` steps at the full learning rate.

    It ends the run only where the loss is that of guessing; a checkpoint that was good at this before may stay flat.
    """

    def __init__(self, patience: int) -> None:
        self.patience, self.window = patience, max(5, patience // 4)
        self.early: list[float] = []
        self.late: deque[float] = deque(maxlen=self.window)
        self.since, self.done = 0, False

    def update(self, step: int, loss: float, *, warming: bool = False) -> Finding | None:
        if not self.early:
            self.done = step > 0  # a run that goes on has learnt before
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
            self.done = last < 0.9 * first  # in between, it may be chance
            return None
        self.done = True
        guessing = last > UNTRAINED_LOSS
        return Finding(
            "no learning",
            step,
            f"the loss was {first:.3g} in the beginning and is {last:.3g} after {step} steps",
            "Check that the texts belong to their recordings, or answers to their questions; then try "
            "optimise.learning_rate ten times higher, or more that learns (train: lora, top-6, all)"
            if guessing
            else "If the checkpoint was as good as it can be at this, all is well; else try a higher "
            "optimise.learning_rate",
            fatal=guessing,
        )


class GradientMonitor:
    """Gradients that are no numbers, and parameters that should learn but get no gradient."""

    def __init__(self, *, scaled: bool = False) -> None:
        self.allowed = (
            MAX_SKIPPED_STEPS if scaled else 0
        )  # fp16 skips steps with infinite gradients while it finds its scale
        self.non_finite_steps, self.zero_counts, self.warned = 0, Counter[str](), False

    def check_norm(self, step: int, norm: float) -> Finding | None:
        """`norm`: the length of the whole gradient, at every step."""
        self.non_finite_steps = 0 if math.isfinite(norm) else self.non_finite_steps + 1
        if self.non_finite_steps <= self.allowed:
            return None
        return Finding(
            "broken gradient",
            step,
            f"the loss is finite, but the gradient's length is {norm}"
            + (f", {self.non_finite_steps} steps in a row" if self.allowed else ""),
            "Try optimise.precision: bf16 or float32, a lower optimise.learning_rate, a longer optimise.warmup",
            fatal=True,
        )

    def check_parameters(self, step: int, norms: Mapping[str, float]) -> Finding | None:
        """`norms`: the length of the gradient of each parameter that should learn, 0 where there is none."""
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
            f"{len(dead)} of {len(norms)} parameters that should learn got no gradient {ZERO_GRAD_CHECKS} times: {format_names(dead)}",
            "The loss does not depend on what learns: look for a detach() or no_grad(), or train something else"
            if everything
            else "Freeze them if the net does not use them (train); else look for a detach() on their way to the loss",
            fatal=everything,
        )


class Forgetting:
    """A set that the checkpoint was good at: its error rate is `times` what it was when it was first measured."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.baseline: dict[str, float] = {}

    def update(self, step: int, name: str, metrics: Mapping[str, float]) -> Finding | None:
        kind = "cer" if "cer" in metrics else "wer"
        if kind not in metrics:
            return None
        start, rate = self.baseline.setdefault(name, metrics[kind]), metrics[kind]
        if rate <= max(self.factor * start, start + 0.01):  # one letter more is a multiple of nearly none
            return None
        return Finding(
            f"forgetting {name}",
            step,
            f"its {kind.upper()} was {start:.1%} in the beginning and is {rate:.1%}",
            "Mix recordings of that kind into data.train (with a share); or try train: lora, or a lower learning rate",
        )


class Overfitting:
    """The dev loss rises, three times in a row, while the training loss falls and the error rate gets no better."""

    def __init__(self) -> None:
        self.history: dict[str, list[tuple[float, float, float]]] = {}

    def update(self, step: int, name: str, metrics: Mapping[str, float], train_loss: float) -> Finding | None:
        """`learnt`: the loss in training, about this step."""
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
            f"the loss on it rose from {best[0]:.3g} to {loss:.3g}, while in training it fell from {best[2]:.3g} to "
            f"{train_loss:.3g}",
            "The best checkpoint is kept. Next time try less that learns (train: lora), fewer epochs, with recordings "
            "more augment and masks, evaluate.patience: 3",
        )


def check_losses(step: int, losses: Sequence[float], ids: Sequence[str]) -> Finding | None:
    """Losses that are no numbers, before anything is learnt from them.

    A CTC loss is NaN where the net's output is, and infinite where an utterance has fewer frames than its text needs.
    """
    wrong = [name for name, loss in zip(ids, losses, strict=True) if math.isnan(loss)]
    if wrong:
        return Finding(
            "broken loss",
            step,
            f"the loss of {len(wrong)} of {len(losses)} recordings in the batch is no number: {format_names(wrong)}",
            "If it is always these, leave them out; else try a lower optimise.learning_rate, or optimise.precision: "
            "bf16 or float32",
            fatal=True,
        )
    short = [name for name, loss in zip(ids, losses, strict=True) if math.isinf(loss)]
    if not short:
        return None
    return Finding(
        "too few frames",
        step,
        f"the loss of {len(short)} of {len(losses)} recordings in the batch is infinite, as their sound has fewer "
        f"frames than their text needs: {format_names(short)}",
        "Check that these texts belong to these recordings, and leave them out if not",
        fatal=True,
    )


def check_loss(step: int, loss: float, ids: Sequence[str]) -> Finding | None:
    """A loss over examples of text that is no number, before anything is learnt from it."""
    if math.isfinite(loss):
        return None
    return Finding(
        "broken loss",
        step,
        f"the loss of a batch is {loss}: {format_names(ids)}",
        "If it is always these, leave them out; else try a lower optimise.learning_rate, or optimise.precision: "
        "bf16 or float32",
        fatal=True,
    )
