"""What is printed of a run, with a real Trainer; alignments are compared with jiwer's own counts."""

import io
import json
import math
import sys
from types import SimpleNamespace

import jiwer
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from mowa.errors import MissingDependency, RecipeError
from mowa.training.monitor import progress

REFERENCES, HYPOTHESES = ["ala ma kota", "pies", "dobry dzień"], ["ala ma kta", "pies", "dobry dzieńek"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))

    def forward(self, x, labels=None):
        logits = self.layers(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def run(out, reporter, *, steps=6, **more):
    generator = torch.Generator().manual_seed(0)
    rows = [{"x": torch.randn(4, generator=generator), "labels": torch.tensor(n % 3)} for n in range(8)]

    def compute_metrics(_):
        reporter.set_texts(REFERENCES, HYPOTHESES)
        return {"wer": 0.25, "cer": 0.0625, "blank_ratio": 0.7}

    arguments = TrainingArguments(
        output_dir=str(out / "run"), max_steps=steps, per_device_train_batch_size=2, use_cpu=True, report_to="none",
        disable_tqdm=True, save_strategy="no", logging_steps=2, eval_strategy="steps", eval_steps=3,
        learning_rate=1e-3, **more,
    )  # fmt: skip
    trainer = Trainer(
        Net(), arguments, train_dataset=rows, eval_dataset={"dev": rows, "replay": rows},
        compute_metrics=compute_metrics, callbacks=[reporter],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def test_plain_lines_without_a_terminal(tmp_path, capsys):
    run(tmp_path, progress.ProgressReporter(1, sizes=[10.0] * 6))
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert "loss" not in out
    steps = [line for line in lines if "· loss" in line and "left" in line]
    assert [line.split(" · ")[0] for line in steps] == ["step 2/6", "step 4/6", "step 6/6"]
    assert all("s of audio per second" in line and "lr " in line for line in steps)
    evaluations = [line for line in lines if "WER" in line]
    names = [line.split(" · ")[1].split(":")[0] for line in evaluations]
    assert names == ["dev", "replay"] * 2
    assert "WER 25.0% · CER 6.2% · loss" in evaluations[0]
    assert "blank 70%" in evaluations[0]
    place = lines.index(evaluations[0])
    assert [line.split() for line in lines[place + 1 : place + 3]] == [["ref", "pies"], ["hyp", "pies"]]


def test_no_examples_and_no_speed(tmp_path, capsys):
    run(tmp_path, progress.ProgressReporter(0))
    err = capsys.readouterr().err
    assert "hyp" not in err
    assert "per second" not in err
    assert "WER 25.0%" in err


def test_speed_counts_accumulated_batches(tmp_path, monkeypatch):
    clock = iter(range(1000))
    one_second_per_call = SimpleNamespace(monotonic=lambda: float(next(clock)))
    monkeypatch.setattr(progress, "time", one_second_per_call)
    reporter = progress.ProgressReporter(0, sizes=[1.0, 2.0, 3.0, 4.0, 50.0, 60.0, 7.0, 8.0])
    reporter.set_texts = lambda *texts: [next(clock) for _ in range(100)]  # evaluation takes long
    run(tmp_path, reporter, steps=4, gradient_accumulation_steps=2)
    assert [size for size, _ in reporter.step_times] == [3.0, 7.0, 110.0, 15.0]
    # The log after step 2 reads the clock too; the evaluation after step 3 does not count for step 4.
    assert [seconds for _, seconds in reporter.step_times] == [1.0, 1.0, 2.0, 1.0]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    reporter = progress.ProgressReporter(3, sizes=[10.0] * 6)
    run(tmp_path, reporter)
    shown = terminal.getvalue()
    assert "6/6 steps" in shown
    assert "evaluating 1/" in shown
    assert "dev WER 25.0% · replay WER 25.0%" in shown
    assert "hyp  ala ma k·ta" in shown
    assert shown.endswith("\n")
    assert reporter.bar is None


def test_only_the_main_process_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Trainer, "is_world_process_zero", lambda self: False)
    run(tmp_path, progress.ProgressReporter(3))
    assert capsys.readouterr().err == ""


# Examples -----------------------------------------------------------------------------------------------------------


def test_examples_mark_differences():
    assert progress.format_examples(REFERENCES, HYPOTHESES, 3).splitlines() == [
        "  ref  ala ma kota",
        "  hyp  ala ma k·ta",
        "               ^",
        "  ref  pies",
        "  hyp  pies",
        "  ref  dobry dzień··",
        "  hyp  dobry dzieńek",
        "                  ^^",
    ]


def test_examples_are_evenly_spaced_and_always_the_same():
    texts = [f"text {number}" for number in range(100)]
    shown = progress.format_examples(texts, texts, 2)
    assert shown.splitlines() == ["  ref  text 25", "  hyp  text 25", "  ref  text 75", "  hyp  text 75"]
    assert progress.format_examples(texts, texts, 2) == shown
    assert progress.format_examples(texts[:1], texts[:1], 5).splitlines() == ["  ref  text 0", "  hyp  text 0"]
    assert progress.format_examples([], [], 3) == ""


def test_wide_and_combining_characters_are_aligned():
    assert progress.format_examples(["日本go"], ["日no"], 1).splitlines()[0] == "  ref  日本go"
    lines = progress.format_examples(["a日b"], ["axb"], 1).splitlines()
    assert lines == ["  ref  a日b", "  hyp  ax b", "        ^^"]
    assert len(progress.format_examples(["e\u0301te\u0301"], ["e\u0301te\u0301"], 1).splitlines()) == 2


WORDS = st.text("abc dź", max_size=80).map(lambda text: " ".join(text.split()))


@settings(deadline=None, max_examples=60)
@given(WORDS, WORDS, st.sampled_from([20, 41, 100]))
def test_examples_have_both_texts_and_a_mark_for_each_error_of_jiwer(reference, hypothesis, width):
    lines = progress.format_examples([reference], [hypothesis], 1, width=width).splitlines()
    assert max(map(len, lines)) <= width
    for label, text in (("  ref", reference), ("  hyp", hypothesis)):
        shown = "".join(line.removeprefix(label) for line in lines if line.startswith(label))
        # A line may end at a space, so only other characters are compared.
        assert shown.replace(progress.GAP, "").replace(" ", "") == text.replace(" ", "")
    errors = jiwer.process_characters(reference, hypothesis)
    assert sum(line.count("^") for line in lines) == errors.substitutions + errors.deletions + errors.insertions


# Curve --------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    return figures


def test_history_of_a_real_run(tmp_path, drawn):
    trainer = run(tmp_path, progress.ProgressReporter(0))
    progress.write_history(trainer.state.log_history, tmp_path, best_step=3)
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert rows == trainer.state.log_history
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    losses, errors, rates, blanks = drawn[0].axes
    lines = {axis: {line.get_label(): line.get_xydata().tolist() for line in axis.lines} for axis in drawn[0].axes}
    assert [step for step, _ in lines[losses]["train"]] == [2, 4, 6]
    assert [step for step, _ in lines[losses]["replay"]] == [3, 6]
    assert lines[errors]["dev WER"] == [[3, 25.0], [6, 25.0]]
    assert lines[errors]["replay CER"] == [[3, 6.25], [6, 6.25]]
    assert lines[errors]["best"][0][0] == 3
    assert [step for step, _ in rates.lines[0].get_xydata()] == [2, 4, 6]
    assert blanks.lines[0].get_xydata().tolist() == [[3, 70.0], [6, 70.0]]


def test_history_of_a_run_that_stopped_early(tmp_path, drawn):
    progress.write_history([], tmp_path)
    assert (tmp_path / "history.jsonl").read_text() == ""
    rows = [
        {"loss": 2.0, "learning_rate": 1e-3, "grad_norm": math.nan, "step": 1},
        {"eval_loss": math.inf, "eval_wer": 1.0, "eval_runtime": 1.0, "step": 1},
    ]
    progress.write_history(rows, tmp_path)

    def refuse(odd):
        raise AssertionError(f"{odd} is not JSON")

    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse)["step"] for line in lines] == [1, 1]
    losses, errors, *_ = drawn[1].axes
    assert [line.get_label() for line in losses.lines] == ["train"]
    assert [line.get_label() for line in errors.lines] == ["dev WER"]


# Trackers -----------------------------------------------------------------------------------------------------------


def test_trackers_must_be_known_and_installed(monkeypatch):
    installed = set()
    finder = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: name if name in installed else None))
    monkeypatch.setattr(progress, "importlib", finder)
    assert progress.validate_report_to(()) == []
    with pytest.raises(MissingDependency, match="wandb is not installed: pip install wandb"):
        progress.validate_report_to(("wandb",))
    with pytest.raises(RecipeError, match=r"'tensorbord' .* did you mean tensorboard"):
        progress.validate_report_to(("tensorbord",))
    installed.add("tensorboardX")
    assert progress.validate_report_to(("tensorboard",)) == ["tensorboard"]
    with pytest.raises(MissingDependency, match="wandb"):
        progress.validate_report_to(("tensorboard", "wandb"))


def test_the_rest_of_the_run_is_estimated_after_the_first_steps(monkeypatch, capsys):
    """Steps take 10 s for the first and then 2 s per unit; the planned sizes of the rest are known."""
    clock = iter([0.0, 10.0, 12.0, 16.0, 18.0, 20.0, 22.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    state = SimpleNamespace(global_step=0, max_steps=8, is_world_process_zero=True)
    arguments = SimpleNamespace(gradient_accumulation_steps=1, world_size=1, eval_steps=2)
    reporter = progress.ProgressReporter(sizes=[1, 1, 2, 1, 1, 1, 30, 29])
    reporter.on_train_begin(arguments, state, None)
    reporter.eval_times = {"dev": 20.0, "replay": 10.0}
    for step in range(1, 7):
        state.global_step = step
        reporter.on_step_end(arguments, state, None)
    (line,) = capsys.readouterr().err.splitlines()
    expected = "3 more steps will take about 02:00, estimated from 4 steps, and 2 evaluations about 01:00"
    assert line == expected


def test_a_run_without_measured_evaluations_says_so(tmp_path, capsys):
    run(tmp_path, progress.ProgressReporter(0), steps=8)
    assert "more steps will take about 00:00" in capsys.readouterr().err
    reporter = progress.ProgressReporter(0)
    reporter.step_times.extend([(0.0, 9.0), (0.0, 2.0), (0.0, 4.0)])
    assert reporter._estimate(10, 0, 5) == (
        "10 more steps will take about 00:30, estimated from 2 steps; evaluations are not included"
    )
