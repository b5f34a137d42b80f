"""Monitors on a real Trainer: each fires on its failure, and none on a healthy run with CTC's initial plateau."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from mowa.data.quality.filter import measure_overlap
from mowa.errors import TrainingStopped
from mowa.training.config.shared import MonitorConfig
from mowa.training.monitor import callbacks as monitoring
from mowa.training.monitor import sentinels
from mowa.types import Example

BLANK, TOKENS, UTTERANCES, LENGTH, WIDTH = 0, 10, 8, 5, 8
PROTOTYPES = 0.6 * torch.randn(TOKENS + 1, WIDTH, generator=torch.Generator().manual_seed(0))


def make_batch(index, *, broken=()):
    """Eight simulated utterances of five tokens, each four noisy frames long, with pauses between."""
    generator = torch.Generator().manual_seed(index)
    labels = torch.randint(1, TOKENS + 1, (UTTERANCES, LENGTH), generator=generator)
    held = torch.cat([labels[..., None].expand(-1, -1, 4), torch.zeros(UTTERANCES, LENGTH, 2, dtype=torch.long)], -1)
    frames = PROTOTYPES[held.flatten(1)] + 0.5 * torch.randn(UTTERANCES, LENGTH * 6, WIDTH, generator=generator)
    for utterance in broken:
        frames[utterance, 3] = math.nan
    return {"frames": frames, "labels": labels, "index": torch.tensor([index])}


class Net(nn.Module):
    """Sees five frames at once; like a new CTC head, it starts on a plateau of blanks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv1d(WIDTH, 32, 5, padding=2), nn.LayerNorm(32)
        self.lm_head = nn.Linear(32, TOKENS + 1)

    def forward(self, frames, index, labels=None):
        states = F.gelu(self.norm(self.conv(frames.transpose(1, 2)).transpose(1, 2)))
        return {"logits": self.lm_head(states), "index": index}


def run(net, out, config=None, *, steps=12, batches=None, rate=1e-2, callbacks=(), **settings):
    """Train with the stock Trainer and a Monitor, and return the trainer and the blank ratio of each step."""
    batches = batches or [make_batch(index) for index in range(steps)]
    monitor, ratios = monitoring.Monitor(config or MonitorConfig(), out, net), []

    def loss(outputs, labels, num_items_in_batch=None):
        scores = outputs["logits"].log_softmax(-1).transpose(0, 1)
        frames, lengths = torch.full((len(labels),), scores.shape[0]), torch.full((len(labels),), labels.shape[1])
        each = F.ctc_loss(scores, labels, frames, lengths, BLANK, reduction="none")
        if torch.is_grad_enabled():
            ids = [f"{int(outputs['index'])}-{number}" for number in range(len(labels))]
            best = outputs["logits"].argmax(-1).flatten()
            ratios.append(float((best == BLANK).float().mean()))
            step = trainer.state.global_step
            monitor.on_ctc_batch(step, each.detach(), ids, best, BLANK, num_tokens=labels.numel())
        return each.sum() / labels.numel()

    arguments = TrainingArguments(
        output_dir=str(out / "run"), max_steps=steps, per_device_train_batch_size=1, per_device_eval_batch_size=1,
        learning_rate=rate, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=5,
        remove_unused_columns=False, label_names=["labels"], train_sampling_strategy="sequential", **settings,
    )  # fmt: skip
    trainer = Trainer(
        net, arguments, data_collator=lambda items: items[0], train_dataset=batches, compute_loss_func=loss,
        eval_dataset={"dev": [make_batch(10_000)]}, callbacks=[monitor.callback(), *callbacks],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer, ratios


def findings(out):
    return [json.loads(line) for line in (out / "monitor.jsonl").read_text().splitlines()]


# A healthy run ------------------------------------------------------------------------------------------------------


def test_silent_on_a_healthy_run_with_a_long_plateau(tmp_path, capsys):
    config = MonitorConfig(collapse_patience=40)
    settings = {"rate": 1e-3, "lr_scheduler_type": "constant", "eval_strategy": "steps", "eval_steps": 120}
    trainer, ratios = run(Net(), tmp_path, config, steps=240, **settings)
    assert sum(ratio >= config.blank_ratio for ratio in ratios) > config.collapse_patience, "the run has no plateau"
    assert ratios[-1] < 0.9
    measured = [row["eval_dev_loss"] for row in trainer.state.log_history if "eval_dev_loss" in row]
    assert measured[-1] < 0.7 * measured[0]
    assert not (tmp_path / "monitor.jsonl").exists()
    assert capsys.readouterr().err == ""


# Losses and outputs -------------------------------------------------------------------------------------------------


def test_nan_stops_the_run_before_the_weights_change(tmp_path):
    net = Net()
    batches = [make_batch(index, broken=(2, 6) if index == 7 else ()) for index in range(12)]
    with pytest.raises(TrainingStopped, match=r"non-finite loss at step 7: .* 2 of 8 recordings .*: 7-2, 7-6\n"):
        run(net, tmp_path, batches=batches)
    assert all(weight.isfinite().all() for weight in net.parameters())
    (row,) = findings(tmp_path)
    assert (row["monitor"], row["step"], row["fatal"]) == ("non-finite loss", 7, True)


def test_texts_of_other_recordings_end_in_blank_collapse(tmp_path, capsys):
    """The labels are random, so the plateau never ends."""
    mixed = [make_batch(index) | {"labels": make_batch(5000 + index)["labels"]} for index in range(300)]
    with pytest.raises(TrainingStopped, match=r"blank collapse at step (\d+)"):
        run(
            Net(),
            tmp_path,
            MonitorConfig(collapse_patience=40),
            steps=300,
            batches=mixed,
            rate=1e-3,
            lr_scheduler_type="constant",
        )
    assert [row["monitor"] for row in findings(tmp_path)] == ["blank plateau", "blank collapse"]
    assert "blank plateau at step" in capsys.readouterr().err


def test_a_learning_rate_of_ten_is_divergence(tmp_path):
    net, config = Net(), MonitorConfig(collapse_patience=40)
    run(net, tmp_path, config, steps=80)
    assert not (tmp_path / "monitor.jsonl").exists()
    with pytest.raises(TrainingStopped, match=r"divergence at step \d+: .*\n.*learning_rate"):
        run(net, tmp_path, config, steps=40, rate=10.0)


def test_a_learning_rate_of_zero_is_reported(tmp_path):
    with pytest.raises(TrainingStopped, match="loss not decreasing at step 40"):
        run(Net(), tmp_path, MonitorConfig(collapse_patience=40), steps=100, rate=0.0)


def test_zero_turns_each_check_off(tmp_path):
    off = MonitorConfig(
        blank_ratio=0.0, collapse_patience=0, divergence_factor=0.0, forgetting_factor=0.0, check_frozen=False
    )
    run(Net(), tmp_path, off, steps=30, rate=10.0, max_grad_norm=0.0)
    net = Net()
    monitor = monitoring.Monitor(off, tmp_path, net)
    monitor.on_evaluation("replay", {"cer": 0.1}, 0)
    monitor.on_evaluation("replay", {"cer": 0.9}, 10)
    assert not (tmp_path / "monitor.jsonl").exists()


def test_patience_begins_after_warmup(tmp_path):
    with pytest.raises(TrainingStopped, match=r"loss not decreasing at step (\d+)") as stopped:
        run(
            Net(),
            tmp_path,
            MonitorConfig(collapse_patience=20),
            steps=100,
            rate=1e-12,
            warmup_steps=30,
            lr_scheduler_type="linear",
        )
    assert 48 <= int(str(stopped.value).split(":")[0].rpartition(" ")[2]) <= 52


# Gradients and weights ----------------------------------------------------------------------------------------------


class Orphan(Net):
    """Has trainable parameters without gradient: one is not used, on the other the loss does not depend."""

    def __init__(self):
        super().__init__()
        self.unused, self.cut = nn.Parameter(torch.ones(3)), nn.Linear(WIDTH, WIDTH)
        self.masked_spec_embed = nn.Parameter(torch.ones(WIDTH))

    def forward(self, frames, index, labels=None):
        return super().forward(frames + 0 * self.cut(frames), index)


def test_parameters_without_gradient_are_named(tmp_path, capsys):
    run(Orphan(), tmp_path, steps=25)
    (row,) = findings(tmp_path)
    assert (row["monitor"], row["fatal"], row["step"]) == ("no gradient", False, sentinels.ZERO_GRAD_CHECKS - 1)
    assert "3 of 10 trainable parameters" in row["message"]
    for name in ("unused", "cut.weight", "cut.bias"):
        assert name in row["message"]
    assert "masked_spec_embed" not in row["message"]
    assert capsys.readouterr().err.count("no gradient at step") == 1


def test_a_constant_loss_stops_the_run(tmp_path):
    class Constant(Net):
        def forward(self, frames, index, labels=None):
            out = super().forward(frames, index)
            return out | {"logits": out["logits"] * 0}

    with pytest.raises(TrainingStopped, match="no gradient at step 9: 6 of 6"):
        run(Constant(), tmp_path, steps=25)


class LowRank(Net):
    """B starts at zero, so A has no gradient in the first step."""

    def __init__(self):
        super().__init__()
        self.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, WIDTH)), nn.Parameter(torch.zeros(WIDTH, 2))

    def forward(self, frames, index, labels=None):
        return super().forward(frames + frames @ self.a.T @ self.b.T, index)


def test_lora_is_accepted(tmp_path):
    net = LowRank()
    seen = []
    net.a.register_hook(lambda gradient: seen.append(float(gradient.abs().sum())))
    run(net, tmp_path, steps=15, eval_strategy="steps", eval_steps=5)
    assert seen[0] == 0 < seen[1]
    assert not (tmp_path / "monitor.jsonl").exists()


def test_a_non_finite_gradient_stops_before_the_step(tmp_path):
    net = Net()
    net.norm.bias.register_hook(lambda gradient: gradient / 0)
    before = {name: weight.clone() for name, weight in net.state_dict().items()}
    with pytest.raises(TrainingStopped, match="non-finite gradient at step 0"):
        run(net, tmp_path)
    for name, weight in net.state_dict().items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=0)


class Nudge(TrainerCallback):
    """Change one frozen weight by one unit in the last place."""

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step == 3:
            with torch.no_grad():
                weight = model.conv.weight
                weight[1, 2, 3] = torch.nextafter(weight[1, 2, 3], torch.tensor(math.inf))


def test_a_frozen_weight_that_changes_is_named(tmp_path):
    net = Net()
    net.conv.requires_grad_(False)
    with pytest.raises(
        TrainingStopped, match=r"frozen weights changed at step 8: 1 of 2 frozen weights .* conv\.weight"
    ):
        run(net, tmp_path, callbacks=[Nudge()], eval_strategy="steps", eval_steps=4, eval_delay=5)


def test_statistics_of_a_frozen_batch_norm_must_not_change():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    net[0].requires_grad_(False)
    frozen = monitoring.FrozenWeights(net)
    net.eval()(torch.randn(5, 3))
    assert frozen.check(1) is None
    net.train()(torch.randn(5, 3))
    finding = frozen.check(2)
    assert finding.fatal
    for name in ("0.running_mean", "0.running_var", "0.num_batches_tracked"):
        assert name in finding.message
    assert "3 of 5" in finding.message


def test_checksums_depend_on_bits_and_not_on_memory_format():
    net = nn.Conv2d(3, 5, 3).requires_grad_(False)
    before = monitoring.weight_checksums(net)
    net.weight.data = net.weight.data.contiguous(memory_format=torch.channels_last)
    assert monitoring.weight_checksums(net) == before
    net.weight.data = net.weight.data.bfloat16()
    assert monitoring.weight_checksums(net) != before
    net.weight.data = torch.empty(0)  # ZeRO-3 leaves an empty tensor
    assert monitoring.weight_checksums(net).keys() == {"bias"}
    net.weight.requires_grad_(True)
    assert monitoring.weight_checksums(net).keys() == {"bias"}


# Measurements -------------------------------------------------------------------------------------------------------


def test_forgetting_is_relative_to_the_first_evaluation(tmp_path, capsys):
    monitor = monitoring.Monitor(MonitorConfig(forgetting_factor=1.5), tmp_path, Net())
    for step, rate in ((0, 0.10), (50, 0.14), (100, 0.16)):
        monitor.on_evaluation("replay-pl", {"cer": rate, "wer": 0.9}, step)
        monitor.on_evaluation("dev", {"cer": 9 * rate, "wer": 0.9, "loss": 1.0}, step)
    (row,) = findings(tmp_path)
    assert (row["monitor"], row["step"], row["fatal"]) == ("forgetting replay-pl", 100, False)
    assert "10.0%" in row["message"]
    assert "16.0%" in row["message"]
    assert "forgetting replay-pl" in capsys.readouterr().err
    assert not sentinels.Forgetting(1.5).update(0, "replay", {"loss": 1.0})


def test_a_resumed_run_is_compared_with_its_start(tmp_path):
    log = [
        {"eval_replay_runtime": 1.0, "eval_replay_cer": 0.10, "step": 0},
        {"loss": 2.0, "step": 10},
        {"eval_replay_runtime": 1.0, "eval_replay_cer": 0.14, "step": 20},
    ]
    monitor = monitoring.Monitor(MonitorConfig(), tmp_path, Net())
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    callback, state = monitor.callback(), TrainerState(global_step=20, log_history=log)
    callback.on_train_begin(arguments, state, None)
    callback.on_evaluate(arguments, state, None, metrics={"eval_replay_runtime": 1.0, "eval_replay_cer": 0.20})
    assert [row["message"] for row in findings(tmp_path)] == ["CER on this set was 10.0% at the start and is 20.0%"]


def test_overlap_is_reported(tmp_path, capsys):
    train = [Example(f"t{n}", f"{n}.wav", f"the sentence number {n}", 1.0, {"speaker": "a"}) for n in range(6)]
    dev = [
        Example("same", "1.wav", "some other words here", 1.0, {"speaker": "b"}),
        Example("said", "10.wav", "The sentence number 3!", 1.0, {"speaker": "b"}),
        Example("new", "11.wav", "nobody said this before", 1.0, {"speaker": "b"}),
    ]
    monitor = monitoring.Monitor(MonitorConfig(), tmp_path, Net())
    monitor.report_overlap(measure_overlap(train, dev))
    printed = capsys.readouterr().err
    assert "train/test overlap at step 0: of 3 recordings in dev and test, 1 are in train as well (same)" in printed
    assert "1 have a sentence of train (said)" in printed
    monitor.report_overlap(measure_overlap(train, dev[2:]))
    assert len(findings(tmp_path)) == 1
    speakers = monitoring.find_leakage(measure_overlap(train, [Example("x", "12.wav", "", 1.0, {"speaker": "a"})]))
    assert "for these speakers only" in speakers.suggestion


def test_only_the_main_process_prints_and_writes_but_all_stop(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monitor = monitoring.Monitor(MonitorConfig(), tmp_path, Net())
    monitor.report(sentinels.Finding("hint", 1, "message", "suggestion"))
    with pytest.raises(TrainingStopped, match="worse"):
        monitor.report(sentinels.Finding("worse", 1, "message", "suggestion", fatal=True))
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "monitor.jsonl").exists()


def test_a_warning_is_printed_once_and_logged_each_time(tmp_path, capsys):
    monitor = monitoring.Monitor(MonitorConfig(), tmp_path / "new", Net())
    for step in (1, 2):
        monitor.report(sentinels.Finding("hint", step, "message", "suggestion"))
    assert capsys.readouterr().err == "hint at step 1: message\n  suggestion\n"
    assert [row["step"] for row in findings(tmp_path / "new")] == [1, 2]


def test_eval_metrics_are_split_by_set():
    rows = {"eval_dev-ru_loss": 1.0, "eval_dev-ru_wer": 0.5, "eval_dev-ru_runtime": 2.0, "epoch": 1.0}
    assert monitoring.parse_eval_metrics(rows) == ("dev-ru", {"loss": 1.0, "wer": 0.5, "runtime": 2.0})
    assert monitoring.parse_eval_metrics({"eval_loss": 1.0, "eval_runtime": 2.0}) == (
        "dev",
        {"loss": 1.0, "runtime": 2.0},
    )
    assert monitoring.parse_eval_metrics({"loss": 1.0, "train_runtime": 2.0}) is None
