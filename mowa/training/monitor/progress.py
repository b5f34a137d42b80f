"""What a person sees of a fine-tuning run: progress, what was measured, examples, and in the end a picture.

It looks on and changes nothing. On a terminal there is a bar; elsewhere one plain line for each log and measurement.
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
from mowa.training.monitor.callbacks import parse_eval_metrics

TRACKERS = ("tensorboard", "wandb")
BAR_FORMAT = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]"
GAP = "·"  # where one text has a letter and the other none
SPEED_WINDOW = 50  # steps over which the speed is taken


class ProgressReporter(TrainerCallback):
    """Progress to standard error. `count` examples are shown at each measurement of a set; give their texts to `heard`.

    `sizes` of each batch of the run, in `unit`s and in the order in which they are learnt; without, no speed is shown.
    """

    def __init__(self, log_examples: int = 3, sizes: Sequence[float] = (), *, unit: str = "s of sound") -> None:
        self.log_examples, self.sizes, self.unit = log_examples, sizes, unit
        self.texts: tuple[Sequence[str], Sequence[str]] | None = None
        self.bar: Any = None
        self.metric_texts: dict[str, str] = {}
        self.loss = ""
        self.step_times: deque[tuple[float, float]] = deque(maxlen=SPEED_WINDOW)  # size, seconds it took
        self.began_s, self.since_s, self.first, self.batch = 0.0, 0.0, 0, 0

    def set_texts(self, references: Sequence[str], hypotheses: Sequence[str]) -> None:
        """The texts of the measurement that is about to be reported."""
        self.texts = (references, hypotheses)

    def close(self) -> None:
        """Leaves the terminal in order, however the run ended."""
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
                desc="learning",
                bar_format=BAR_FORMAT,
                dynamic_ncols=True,
                file=sys.stderr,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.monotonic()
        together = args.gradient_accumulation_steps * args.world_size
        sound = self.sizes[(state.global_step - 1) * together : state.global_step * together]
        self.step_times.append((sum(sound), now - self.since_s))
        self.since_s = now
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" not in logs or not state.is_world_process_zero:
            return
        self.loss = f"loss {logs['loss']:.3g} · rate {logs['learning_rate']:.2g}{self._speed()}"
        if self.bar is not None:
            self.bar.set_postfix_str(" · ".join([self.loss, *self.metric_texts.values()]))
        else:
            self._say(f"step {state.global_step}/{state.max_steps} · {self.loss} · {self._left(state)} left")

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        if self.bar is not None:
            self.batch += 1
            self.bar.set_description_str(f"measuring {self.batch}/{len(eval_dataloader)}")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        self.since_s, self.batch = time.monotonic(), 0  # measuring is no learning
        texts, self.texts = self.texts, None
        found = parse_eval_metrics(metrics)
        if found is None or not state.is_world_process_zero:
            return
        name, values = found
        if "wer" in values:
            self.metric_texts[name] = f"{name} WER {values['wer']:.1%}"
        elif "accuracy" in values:
            self.metric_texts[name] = f"{name} loss {values['loss']:.3g}"
        self._say(f"step {state.global_step}/{state.max_steps} · {name}: {_format_metrics(values)}")
        if texts is not None and self.log_examples:
            self._say(format_examples(*texts, self.log_examples))
        if self.bar is not None:
            self.bar.set_description_str("learning")
            self.bar.set_postfix_str(" · ".join([*([self.loss] if self.loss else []), *self.metric_texts.values()]))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.since_s = time.monotonic()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def _say(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def _speed(self) -> str:
        sound, took = (sum(part) for part in zip(*self.step_times, strict=True)) if self.step_times else (0.0, 0.0)
        return f" · {sound / took:.0f} {self.unit} a second" if sound and took else ""

    def _left(self, state: Any) -> str:
        done = max(1, state.global_step - self.first)
        left = (time.monotonic() - self.began_s) / done * (state.max_steps - state.global_step)
        return str(tqdm.format_interval(left))


def _format_metrics(values: Mapping[str, float]) -> str:
    """One measurement in words."""
    parts = [f"{kind.upper()} {values[kind]:.1%}" for kind in ("wer", "cer") if kind in values]
    parts += [f"loss {values['loss']:.3g}"] if "loss" in values else []
    parts += [f"right {values['accuracy']:.1%}"] if "accuracy" in values else []
    parts += [f"blank {values['blank']:.0%}"] if "blank" in values else []
    return " · ".join(parts)


def format_examples(references: Sequence[str], hypotheses: Sequence[str], count: int, *, width: int = 100) -> str:
    """`count` of the texts, spread evenly, letter under letter, with a mark under each difference (jiwer's alignment).

    The same ones every time, so that one sees them get better. Lines of at most `width` columns.
    """
    shown = min(count, len(references))
    chosen = [(2 * number + 1) * len(references) // (2 * shown) for number in range(shown)]
    return "\n".join(_aligned(references[index], hypotheses[index], width) for index in chosen)


def _aligned(reference: str, hypothesis: str, width: int) -> str:
    import jiwer

    seen = jiwer.process_characters(reference, hypothesis)
    (said,), (heard,) = seen.references, seen.hypotheses
    cells: list[tuple[str, str, str]] = []
    for chunk in seen.alignments[0]:
        parts = (said[chunk.ref_start_idx : chunk.ref_end_idx], heard[chunk.hyp_start_idx : chunk.hyp_end_idx])
        for first, second in itertools.zip_longest(*parts, fillvalue=GAP):
            across = max(_columns(first), _columns(second))
            first, second = (letter + " " * (across - _columns(letter)) for letter in (first, second))
            cells.append((first, second, (" " if chunk.type == "equal" else "^") * across))
    lines = []
    for row in _rows(cells, max(10, width - len("  heard  "))):
        above, below, marks = ("".join(part) for part in zip(*row, strict=True)) if row else ("", "", "")
        lines += [f"  said   {above}", f"  heard  {below}", *([f"         {marks}"] if marks.strip() else [])]
    return "\n".join(line.rstrip() for line in lines)


def _rows(cells: list[tuple[str, str, str]], room: int) -> list[list[tuple[str, str, str]]]:
    """Cut so that each row takes at most `room` columns. At least one row, be it empty."""
    rows: list[list[tuple[str, str, str]]] = [[]]
    taken = 0
    for cell in cells:
        if taken + len(cell[2]) > room:
            rows.append([])
            taken = 0
        rows[-1].append(cell)
        taken += len(cell[2])
    return rows


def _columns(letter: str) -> int:
    """How many columns of a terminal it takes: none if it is put over another, two if it is wide."""
    if unicodedata.combining(letter):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def write_history(log_history: Sequence[Mapping[str, Any]], output_dir: Path, *, best_step: int | None = None) -> None:
    """The Trainer's log (`state.log_history`) as history.jsonl and curve.png; `best`: the step whose weights stay."""
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
        _draw(errors, points, "accuracy", "o-", label=f"{name}, likeliest token right", color=color, times=100)
        _draw(blanks, points, "blank", "o-", color=color, times=100)
    reads = any("accuracy" in points[0] for points in sets.values())
    what, share = ("token", "tokens, %") if reads else ("letter", "error rate, %")
    losses.set(ylabel=f"loss a {what}, nats", yscale="log" if losses.lines else "linear")
    errors.set(ylabel=share, ylim=(0, None))
    rates.set(ylabel="learning rate", xlabel="step", ylim=(0, None))
    blanks.set(ylabel="blank frames, %", xlabel="step", ylim=(0, 100))
    blanks.set_visible(bool(blanks.lines))
    for axis in axes.flat if best_step is not None else ():
        axis.axvline(best_step, color="black", linewidth=0.8, linestyle=":", label="kept" if axis is errors else None)
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
    """For TrainingArguments' `report_to`. RecipeError for an unknown name; MissingPart where it is not there."""
    for name in report_to:
        if name not in TRACKERS:
            near = difflib.get_close_matches(name, TRACKERS, 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(TRACKERS)}"
            raise RecipeError(f"evaluate: trackers: {name!r} is none of them; {hint}")
        there = (name, "tensorboardX") if name == "tensorboard" else (name,)  # transformers writes with either
        if not any(importlib.util.find_spec(package) for package in there):
            raise MissingDependency(f"evaluate: trackers: {name} is not installed: pip install {name}, or leave it out")
    return list(report_to)
