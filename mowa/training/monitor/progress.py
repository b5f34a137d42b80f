"""Print the progress, metrics and example outputs of a fine-tuning run, and draw its curve.

On a terminal there is a progress bar; elsewhere one line for each log entry and evaluation.
"""

from __future__ import annotations

import difflib
import importlib.util
import itertools
import json
import math
import sys
import time
import unicodedata
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from mowa.errors import MissingDependency, RecipeError
from mowa.tasks.metrics import align_characters
from mowa.training.monitor.callbacks import parse_eval_metrics

TRACKERS = ("tensorboard", "wandb")
BAR_FORMAT = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]"
GAP = "·"  # stands for a missing character in aligned texts
SPEED_WINDOW = 50  # steps over which the speed is averaged
ESTIMATE_STEPS = 5  # steps after which the rest of the run is estimated; the first one, which warms up, does not count


class ProgressReporter(TrainerCallback):
    """Print progress to standard error.

    Args:
        log_examples: examples to print at each evaluation of a set, from the texts given to `set_texts`.
        sizes: size of each batch of the run, in order; without, no speed is printed.
        unit: unit of `sizes`.
    """

    def __init__(self, log_examples: int = 3, sizes: Sequence[float] = (), *, unit: str = "s of audio") -> None:
        self.log_examples, self.sizes, self.unit = log_examples, sizes, unit
        self.texts: tuple[Sequence[str], Sequence[str]] | None = None
        self.bar: Any = None
        self.metric_texts: dict[str, str] = {}
        self.loss = ""
        self.step_times: deque[tuple[float, float]] = deque(maxlen=SPEED_WINDOW)  # size of a step, and its seconds
        self.began_s, self.since_s, self.first, self.batch = 0.0, 0.0, 0, 0
        self.eval_times: dict[str, float] = {}  # seconds of the last evaluation of each set

    def set_texts(self, references: Sequence[str], hypotheses: Sequence[str]) -> None:
        """Set the texts of the evaluation that is reported next."""
        self.texts = (references, hypotheses)

    def close(self) -> None:
        """Close the progress bar, however the run ended."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began_s = self.since_s = time.monotonic()
        self.first = state.global_step
        if state.is_world_process_zero and sys.stderr.isatty():
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="training",
                bar_format=BAR_FORMAT,
                dynamic_ncols=True,
                file=sys.stderr,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.monotonic()
        per_step = args.gradient_accumulation_steps * args.world_size
        sizes = self.sizes[(state.global_step - 1) * per_step : state.global_step * per_step]
        self.step_times.append((sum(sizes), now - self.since_s))
        self.since_s = now
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
        left = state.max_steps - state.global_step
        if state.is_world_process_zero and left and state.global_step - self.first == ESTIMATE_STEPS:
            self._print(self._estimate(left, sum(self.sizes[state.global_step * per_step :]), args.eval_steps))

    def _estimate(self, steps: int, size: float, eval_steps: float | None) -> str:
        """Return the time that `steps` more steps over `size` will take, from the speed of the steps so far."""
        sizes, times = zip(*list(self.step_times)[1:], strict=True)
        seconds = sum(times) / sum(sizes) * size if sum(sizes) else sum(times) / len(times) * steps
        text = f"{steps} more steps will take about {tqdm.format_interval(seconds)}, estimated from {len(times)} steps"
        if not (eval_steps and self.eval_times):
            return f"{text}; evaluations are not included"
        count, each = math.ceil(steps / eval_steps), sum(self.eval_times.values())
        return f"{text}, and {count} evaluation{'s' * (count > 1)} about {tqdm.format_interval(count * each)}"

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" not in logs or not state.is_world_process_zero:
            return
        self.loss = f"loss {logs['loss']:.3g} · lr {logs['learning_rate']:.2g}{self._speed()}"
        if self.bar is not None:
            self.bar.set_postfix_str(" · ".join([self.loss, *self.metric_texts.values()]))
        else:
            self._print(f"step {state.global_step}/{state.max_steps} · {self.loss} · {self._left(state)} left")

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        if self.bar is not None:
            self.batch += 1
            self.bar.set_description_str(f"evaluating {self.batch}/{len(eval_dataloader)}")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        self.since_s, self.batch = time.monotonic(), 0  # do not count evaluation as training time
        texts, self.texts = self.texts, None
        found = parse_eval_metrics(metrics)
        if found is None or not state.is_world_process_zero:
            return
        name, values = found
        self.eval_times[name] = values.get("runtime", 0.0)
        if "wer" in values:
            self.metric_texts[name] = f"{name} WER {values['wer']:.1%}"
        elif "accuracy" in values:
            self.metric_texts[name] = f"{name} loss {values['loss']:.3g}"
        self._print(f"step {state.global_step}/{state.max_steps} · {name}: {_format_metrics(values)}")
        if texts is not None and self.log_examples:
            self._print(format_examples(*texts, self.log_examples))
        if self.bar is not None:
            self.bar.set_description_str("training")
            self.bar.set_postfix_str(" · ".join([*([self.loss] if self.loss else []), *self.metric_texts.values()]))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.since_s = time.monotonic()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def _print(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def _speed(self) -> str:
        size, seconds = (sum(part) for part in zip(*self.step_times, strict=True)) if self.step_times else (0.0, 0.0)
        return f" · {size / seconds:.0f} {self.unit} per second" if size and seconds else ""

    def _left(self, state: Any) -> str:
        done = max(1, state.global_step - self.first)
        left = (time.monotonic() - self.began_s) / done * (state.max_steps - state.global_step)
        return str(tqdm.format_interval(left))


def _format_metrics(values: Mapping[str, float]) -> str:
    """Format the metrics of one evaluation in a line."""
    parts = [f"{kind.upper()} {values[kind]:.1%}" for kind in ("wer", "cer") if kind in values]
    parts += [f"loss {values['loss']:.3g}"] if "loss" in values else []
    parts += [f"accuracy {values['accuracy']:.1%}"] if "accuracy" in values else []
    parts += [f"blank {values['blank_ratio']:.0%}"] if "blank_ratio" in values else []
    return " · ".join(parts)


def format_examples(references: Sequence[str], hypotheses: Sequence[str], count: int, *, width: int = 100) -> str:
    """Align references and hypotheses character by character, with a mark under each difference (jiwer's alignment).

    Args:
        references: the true texts.
        hypotheses: the outputs.
        count: examples to format; evenly spaced, so the same ones every time.
        width: columns of a line at most.
    """
    shown = min(count, len(references))
    chosen = [(2 * number + 1) * len(references) // (2 * shown) for number in range(shown)]
    return "\n".join(_aligned(references[index], hypotheses[index], width) for index in chosen)


def _aligned(reference: str, hypothesis: str, width: int) -> str:
    cells: list[tuple[str, str, str]] = []
    for *parts, equal in align_characters(reference, hypothesis):
        for first, second in itertools.zip_longest(*parts, fillvalue=GAP):
            columns = max(_columns(first), _columns(second))
            first, second = (character + " " * (columns - _columns(character)) for character in (first, second))
            cells.append((first, second, (" " if equal else "^") * columns))
    lines = []
    for row in _wrap(cells, max(10, width - len("  ref  "))):
        above, below, marks = ("".join(part) for part in zip(*row, strict=True)) if row else ("", "", "")
        lines += [f"  ref  {above}", f"  hyp  {below}", *([f"       {marks}"] if marks.strip() else [])]
    return "\n".join(line.rstrip() for line in lines)


def _wrap(cells: list[tuple[str, str, str]], max_columns: int) -> list[list[tuple[str, str, str]]]:
    """Wrap cells to rows of at most `max_columns`; at least one row, which may be empty."""
    rows: list[list[tuple[str, str, str]]] = [[]]
    columns = 0
    for cell in cells:
        if columns + len(cell[2]) > max_columns:
            rows.append([])
            columns = 0
        rows[-1].append(cell)
        columns += len(cell[2])
    return rows


def _columns(character: str) -> int:
    """Return the columns that a character takes in a terminal: 0 if it combines, 2 if it is wide."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def write_history(log_history: Sequence[Mapping[str, Any]], output_dir: Path, *, best_step: int | None = None) -> None:
    """Write the Trainer's log (`state.log_history`) as history.jsonl and curve.png, with `best_step` marked."""
    plain = [{key: None if _is_non_finite(value) else value for key, value in row.items()} for row in log_history]
    (output_dir / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    from matplotlib.figure import Figure

    sets: dict[str, list[dict[str, Any]]] = {}
    for row in log_history:
        if found := parse_eval_metrics(row):
            sets.setdefault(found[0], []).append(found[1] | {"step": row["step"]})
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, height_ratios=[3, 1])
    (losses, errors), (rates, blanks) = axes
    logged = [row for row in log_history if "loss" in row]
    _draw(losses, logged, "loss", "-", label="train", color="grey")
    _draw(rates, logged, "learning_rate", "-", color="grey")
    for number, (name, points) in enumerate(sets.items()):
        color = f"C{number % 10}"
        _draw(losses, points, "loss", "o-", label=name, color=color)
        _draw(errors, points, "wer", "o-", label=f"{name} WER", color=color, times=100)
        _draw(errors, points, "cer", "o--", label=f"{name} CER", color=color, times=100)
        _draw(errors, points, "accuracy", "o-", label=f"{name} accuracy", color=color, times=100)
        _draw(blanks, points, "blank_ratio", "o-", color=color, times=100)
    causal = any("accuracy" in points[0] for points in sets.values())
    losses.set(ylabel="loss per token, nats", yscale="log" if losses.lines else "linear")
    errors.set(ylabel="accuracy, %" if causal else "error rate, %", ylim=(0, None))
    rates.set(ylabel="learning rate", xlabel="step", ylim=(0, None))
    blanks.set(ylabel="blank frames, %", xlabel="step", ylim=(0, 100))
    blanks.set_visible(bool(blanks.lines))
    for axis in axes.flat if best_step is not None else ():
        axis.axvline(best_step, color="black", linewidth=0.8, linestyle=":", label="best" if axis is errors else None)
    for axis in (losses, errors):
        if axis.lines:
            axis.legend(fontsize=8)
    figure.savefig(output_dir / "curve.png", dpi=110)


def _draw(axis: Any, rows: Sequence[Mapping[str, Any]], key: str, style: str, *, times: float = 1, **how: Any) -> None:
    points = [(row["step"], row[key] * times) for row in rows if key in row and not _is_non_finite(row[key])]
    if points:
        axis.plot(*zip(*points, strict=True), style, markersize=3, linewidth=1.2, **how)


def _is_non_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def validate_report_to(report_to: Sequence[str]) -> list[str]:
    """Return tracker names for TrainingArguments' `report_to`.

    Raises:
        RecipeError: a name is unknown.
        MissingDependency: a tracker is not installed.
    """
    for name in report_to:
        if name not in TRACKERS:
            near = difflib.get_close_matches(name, TRACKERS, 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(TRACKERS)}"
            raise RecipeError(f"evaluation: report_to: {name!r} is not a valid choice; {hint}")
        packages = (name, "tensorboardX") if name == "tensorboard" else (name,)  # transformers uses either
        if not any(importlib.util.find_spec(package) for package in packages):
            raise MissingDependency(f"evaluation: report_to: {name} is not installed: pip install {name}, or remove it")
    return list(report_to)
