"""Each sentinel fires on the disaster it is there for, and none on a healthy run with CTC's all-blank plateau in it."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from mowa.data.quality import filter
from mowa.errors import TrainingStopped
from mowa.training.config.ctc import MonitorConfig
from mowa.training.monitor import callbacks as watch
from mowa.training.monitor import sentinels
from mowa.types import Example

BLANK, LETTERS, UTTERANCES, SPELT, WIDTH = 0, 10, 8, 5, 8
PROTOTYPES = 0.6 * torch.randn(LETTERS + 1, WIDTH, generator=torch.Generator().manual_seed(0))


def lesson(index, *, spoilt=()):
    """Eight made-up utterances of five letters, each held for four noisy frames, with pauses between."""
    made = torch.Generator().manual_seed(index)
    labels = torch.randint(1, LETTERS + 1, (UTTERANCES, SPELT), generator=made)
    held = torch.cat([labels[..., None].expand(-1, -1, 4), torch.zeros(UTTERANCES, SPELT, 2, dtype=torch.long)], -1)
    sound = PROTOTYPES[held.flatten(1)] + 0.5 * torch.randn(UTTERANCES, SPELT * 6, WIDTH, generator=made)
    for utterance in spoilt:
        sound[utterance, 3] = math.nan
    return {"sound": sound, "labels": labels, "index": torch.tensor([index])}


class Net(nn.Module):
    """Hears five frames at once; as a new CTC head does, it begins on a plateau of blanks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.ear, self.norm, self.lm_head = (
            nn.Conv1d(WIDTH, 32, 5, padding=2),
            nn.LayerNorm(32),
            nn.Linear(32, LETTERS + 1),
        )

    def forward(self, sound, index, labels=None):
        heard = F.gelu(self.norm(self.ear(sound.transpose(1, 2)).transpose(1, 2)))
        return {"logits": self.lm_head(heard), "index": index}


def run(net, out, knobs=None, *, steps=12, batches=None, rate=1e-2, callbacks=(), **settings):
    """The stock Trainer with sentinels, as a fine-tuning run has them. → (trainer, each step's share of blanks)."""
    batches = batches or [lesson(index) for index in range(steps)]
    sentries, shares = watch.Monitor(knobs or MonitorConfig(), out, net), []

    def loss(outputs, labels, num_items_in_batch=None):
        scores = outputs["logits"].log_softmax(-1).transpose(0, 1)
        frames, lengths = torch.full((len(labels),), scores.shape[0]), torch.full((len(labels),), labels.shape[1])
        each = F.ctc_loss(scores, labels, frames, lengths, BLANK, reduction="none")
        if torch.is_grad_enabled():
            ids = [f"{int(outputs['index'])}-{number}" for number in range(len(labels))]
            best = outputs["logits"].argmax(-1).flatten()
            shares.append(float((best == BLANK).float().mean()))
            step = trainer.state.global_step
            sentries.on_ctc_batch(step, each.detach(), ids, best, BLANK, num_tokens=labels.numel())
        return each.sum() / labels.numel()

    arguments = TrainingArguments(
        output_dir=str(out / "run"), max_steps=steps, per_device_train_batch_size=1, per_device_eval_batch_size=1,
        learning_rate=rate, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=5,
        remove_unused_columns=False, label_names=["labels"], train_sampling_strategy="sequential", **settings,
    )  # fmt: skip
    trainer = Trainer(
        net, arguments, data_collator=lambda items: items[0], train_dataset=batches, compute_loss_func=loss,
        eval_dataset={"dev": [lesson(10_000)]}, callbacks=[sentries.callback(), *callbacks],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer, shares


def journal(out):
    return [json.loads(line) for line in (out / "watch.jsonl").read_text().splitlines()]


# A healthy run ------------------------------------------------------------------------------------------------------


def test_silent_on_a_healthy_run_with_a_plateau_longer_than_the_patience(tmp_path, capsys):
    knobs = MonitorConfig(collapse_patience=40)
    settings = {"rate": 1e-3, "lr_scheduler_type": "constant", "eval_strategy": "steps", "eval_steps": 120}
    trainer, shares = run(Net(), tmp_path, knobs, steps=240, **settings)
    assert sum(share >= knobs.blank_ratio for share in shares) > knobs.collapse_patience, (
        "no plateau, so this shows nothing"
    )
    assert shares[-1] < 0.9
    measured = [row["eval_dev_loss"] for row in trainer.state.log_history if "eval_dev_loss" in row]
    assert measured[-1] < 0.7 * measured[0]
    assert not (tmp_path / "watch.jsonl").exists()
    assert capsys.readouterr().err == ""


# Losses and outputs -------------------------------------------------------------------------------------------------


def test_nan_stops_the_trainer_before_the_weights_are_spoilt(tmp_path):
    net = Net()
    batches = [lesson(index, spoilt=(2, 6) if index == 7 else ()) for index in range(12)]
    with pytest.raises(TrainingStopped, match=r"broken loss at step 7: .* 2 of 8 recordings .*: 7-2, 7-6\n"):
        run(net, tmp_path, batches=batches)
    assert all(weight.isfinite().all() for weight in net.parameters())
    (row,) = journal(tmp_path)
    assert (row["name"], row["step"], row["fatal"]) == ("broken loss", 7, True)


def test_texts_of_other_recordings_end_in_blank_collapse(tmp_path, capsys):
    """Nothing can be learnt, so the plateau never ends."""
    mixed = [lesson(index) | {"labels": lesson(5000 + index)["labels"]} for index in range(300)]
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
    assert [row["name"] for row in journal(tmp_path)] == ["plateau", "blank collapse"]
    assert "plateau at step" in capsys.readouterr().err


def test_a_learning_rate_of_ten_is_divergence(tmp_path):
    net, knobs = Net(), MonitorConfig(collapse_patience=40)
    run(net, tmp_path, knobs, steps=80)
    assert not (tmp_path / "watch.jsonl").exists()
    with pytest.raises(TrainingStopped, match=r"divergence at step \d+: .*\n.*learning_rate"):
        run(net, tmp_path, knobs, steps=40, rate=10.0)


def test_a_learning_rate_of_nothing_is_no_learning(tmp_path):
    with pytest.raises(TrainingStopped, match="no learning at step 40"):
        run(Net(), tmp_path, MonitorConfig(collapse_patience=40), steps=100, rate=0.0)


def test_each_is_off_at_zero(tmp_path):
    off = MonitorConfig(
        blank_ratio=0.0, collapse_patience=0, divergence_factor=0.0, forgetting_factor=0.0, check_frozen=False
    )
    run(Net(), tmp_path, off, steps=30, rate=10.0, max_grad_norm=0.0)
    net = Net()
    sentries = watch.Monitor(off, tmp_path, net)
    sentries.on_evaluation("replay", {"cer": 0.1}, 0)
    sentries.on_evaluation("replay", {"cer": 0.9}, 10)
    assert not (tmp_path / "watch.jsonl").exists()


def test_warm_up_is_seen_from_the_optimiser(tmp_path):
    """Flat while the rate rises is nothing; the patience begins when it has risen."""
    with pytest.raises(TrainingStopped, match=r"no learning at step (\d+)") as stopped:
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
    """Has two parameters that should learn and cannot: one is not used, of the other the loss knows nothing."""

    def __init__(self):
        super().__init__()
        self.unused, self.cut = nn.Parameter(torch.ones(3)), nn.Linear(WIDTH, WIDTH)
        self.masked_spec_embed = nn.Parameter(torch.ones(WIDTH))

    def forward(self, sound, index, labels=None):
        return super().forward(sound + 0 * self.cut(sound), index)


def test_parameters_without_gradient_are_named(tmp_path, capsys):
    run(Orphan(), tmp_path, steps=25)
    (row,) = journal(tmp_path)
    assert (row["name"], row["fatal"], row["step"]) == ("no gradient", False, sentinels.ZERO_GRAD_CHECKS - 1)
    assert "3 of 10 parameters" in row["seen"]
    for name in ("unused", "cut.weight", "cut.bias"):
        assert name in row["seen"]
    assert "masked_spec_embed" not in row["seen"]
    assert capsys.readouterr().err.count("no gradient at step") == 1


def test_a_loss_that_depends_on_nothing_ends_the_run(tmp_path):
    class Deaf(Net):
        def forward(self, sound, index, labels=None):
            heard = super().forward(sound, index)
            return heard | {"logits": heard["logits"] * 0}

    with pytest.raises(TrainingStopped, match="no gradient at step 9: 6 of 6"):
        run(Deaf(), tmp_path, steps=25)


class LowRank(Net):
    """B begins at nothing, so A has no gradient in the first step."""

    def __init__(self):
        super().__init__()
        self.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, WIDTH)), nn.Parameter(torch.zeros(WIDTH, 2))

    def forward(self, sound, index, labels=None):
        return super().forward(sound + sound @ self.a.T @ self.b.T, index)


def test_lora_is_no_disaster(tmp_path):
    net = LowRank()
    seen = []
    net.a.register_hook(lambda gradient: seen.append(float(gradient.abs().sum())))
    run(net, tmp_path, steps=15, eval_strategy="steps", eval_steps=5)
    assert seen[0] == 0 < seen[1]
    assert not (tmp_path / "watch.jsonl").exists()


def test_a_broken_gradient_stops_before_the_step(tmp_path):
    net = Net()
    net.norm.bias.register_hook(lambda gradient: gradient / 0)
    before = {name: weight.clone() for name, weight in net.state_dict().items()}
    with pytest.raises(TrainingStopped, match="broken gradient at step 0"):
        run(net, tmp_path)
    for name, weight in net.state_dict().items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=0)


class Nudge(TrainerCallback):
    """Moves one frozen weight by one in the last place."""

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step == 3:
            with torch.no_grad():
                weight = model.ear.weight
                weight[1, 2, 3] = torch.nextafter(weight[1, 2, 3], torch.tensor(math.inf))


def test_a_frozen_weight_that_moves_is_named(tmp_path):
    net = Net()
    net.ear.requires_grad_(False)
    with pytest.raises(TrainingStopped, match=r"frozen moved at step 8: 1 of 2 frozen weights .* ear\.weight"):
        run(net, tmp_path, callbacks=[Nudge()], eval_strategy="steps", eval_steps=4, eval_delay=5)


def test_statistics_of_a_frozen_batch_norm_must_stand_still():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    net[0].requires_grad_(False)
    frozen = watch.FrozenWeights(net)
    net.eval()(torch.randn(5, 3))
    assert frozen.check(1) is None
    net.train()(torch.randn(5, 3))
    finding = frozen.check(2)
    assert finding.fatal
    for name in ("0.running_mean", "0.running_var", "0.num_batches_tracked"):
        assert name in finding.message
    assert "3 of 5" in finding.message


def test_sums_know_the_bits_and_not_where_they_lie():
    net = nn.Conv2d(3, 5, 3).requires_grad_(False)
    before = watch.weight_checksums(net)
    net.weight.data = net.weight.data.contiguous(memory_format=torch.channels_last)
    assert watch.weight_checksums(net) == before
    net.weight.data = net.weight.data.bfloat16()
    assert watch.weight_checksums(net) != before
    net.weight.data = torch.empty(0)  # ZeRO-3 leaves nothing behind: not moved, but not there
    assert watch.weight_checksums(net).keys() == {"bias"}
    net.weight.requires_grad_(True)
    assert watch.weight_checksums(net).keys() == {"bias"}


# Measurements -------------------------------------------------------------------------------------------------------


def test_forgetting_is_measured_from_the_start(tmp_path, capsys):
    sentries = watch.Monitor(MonitorConfig(forgetting_factor=1.5), tmp_path, Net())
    for step, rate in ((0, 0.10), (50, 0.14), (100, 0.16)):
        sentries.on_evaluation("replay-pl", {"cer": rate, "wer": 0.9}, step)
        sentries.on_evaluation("dev", {"cer": 9 * rate, "wer": 0.9, "loss": 1.0}, step)
    (row,) = journal(tmp_path)
    assert (row["name"], row["step"], row["fatal"]) == ("forgetting replay-pl", 100, False)
    assert "10.0%" in row["seen"]
    assert "16.0%" in row["seen"]
    assert "forgetting replay-pl" in capsys.readouterr().err
    assert not sentinels.Forgetting(1.5).update(0, "replay", {"loss": 1.0})


def test_a_run_that_goes_on_remembers_its_start(tmp_path):
    log = [
        {"eval_replay_runtime": 1.0, "eval_replay_cer": 0.10, "step": 0},
        {"loss": 2.0, "step": 10},
        {"eval_replay_runtime": 1.0, "eval_replay_cer": 0.14, "step": 20},
    ]
    sentries = watch.Monitor(MonitorConfig(), tmp_path, Net())
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    callback, state = sentries.callback(), TrainerState(global_step=20, log_history=log)
    callback.on_train_begin(arguments, state, None)
    callback.on_evaluate(arguments, state, None, metrics={"eval_replay_runtime": 1.0, "eval_replay_cer": 0.20})
    assert [row["seen"] for row in journal(tmp_path)] == ["its CER was 10.0% in the beginning and is 20.0%"]


def test_leaks_are_said_before_the_run(tmp_path, capsys):
    train = [Example(f"t{n}", f"{n}.wav", f"the sentence number {n}", 1.0, {"speaker": "a"}) for n in range(6)]
    dev = [
        Example("same", "1.wav", "some other words here", 1.0, {"speaker": "b"}),
        Example("said", "10.wav", "The sentence number 3!", 1.0, {"speaker": "b"}),
        Example("new", "11.wav", "nobody said this before", 1.0, {"speaker": "b"}),
    ]
    sentries = watch.Monitor(MonitorConfig(), tmp_path, Net())
    sentries.report_overlap(filter.measure_overlap(train, dev))
    said = capsys.readouterr().err
    assert "of 3 recordings to measure on 1 are learnt from too (same), 1 say sentences that are learnt (said)" in said
    sentries.report_overlap(filter.measure_overlap(train, dev[2:]))
    assert len(journal(tmp_path)) == 1
    voices = watch.find_leakage(filter.measure_overlap(train, [Example("x", "12.wav", "", 1.0, {"speaker": "a"})]))
    assert "these voices" in voices.advice


def test_only_the_first_process_speaks_and_writes_but_all_stop(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    sentries = watch.Monitor(MonitorConfig(), tmp_path, Net())
    sentries.report(sentinels.Finding("hint", 1, "seen", "advice"))
    with pytest.raises(TrainingStopped, match="worse"):
        sentries.report(sentinels.Finding("worse", 1, "seen", "advice", fatal=True))
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "watch.jsonl").exists()


def test_a_warning_is_printed_once_and_kept_each_time(tmp_path, capsys):
    sentries = watch.Monitor(MonitorConfig(), tmp_path / "new", Net())
    for step in (1, 2):
        sentries.report(sentinels.Finding("hint", step, "seen", "advice"))
    assert capsys.readouterr().err == "hint at step 1: seen\n  advice\n"
    assert [row["step"] for row in journal(tmp_path / "new")] == [1, 2]


def test_measured_reads_what_the_trainer_calls_its_sets():
    rows = {"eval_dev-ru_loss": 1.0, "eval_dev-ru_wer": 0.5, "eval_dev-ru_runtime": 2.0, "epoch": 1.0}
    assert watch.parse_eval_metrics(rows) == ("dev-ru", {"loss": 1.0, "wer": 0.5, "runtime": 2.0})
    assert watch.parse_eval_metrics({"eval_loss": 1.0, "eval_runtime": 2.0}) == ("dev", {"loss": 1.0, "runtime": 2.0})
    assert watch.parse_eval_metrics({"loss": 1.0, "train_runtime": 2.0}) is None
