"""A checkpoint that lacks weights, or holds others, ends the run that reads it, whoever reads it."""

import re
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from mowa.errors import TrainingStopped
from mowa.training import checkpoints, optimizer
from mowa.training.causal import save, trainer
from mowa.training.config import dispatch
from projects.pl_tiny import pretrain
from tests.checkpoints import corpus, tiny
from tests.training.causal import chats
from tests.training.causal.test_experts import interrupt, killed, train
from tests.training.ctc import test_trainer as speech


def rewrite(file, change):
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})


def rename_first(state):
    name = min(state)
    state[name + ".other"] = state.pop(name)


def drop_first(state):
    del state[min(state)]


def add_one(state):
    state["base_model.model.lora_other.weight"] = torch.zeros(2)


CHANGES = pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_first, "missing"),
        (add_one, "without a parameter|is unexpected"),
        (rename_first, "missing"),
    ],
)


@CHANGES
def test_a_resumed_run_reads_whole_checkpoints_only(tmp_path, monkeypatch, change, message):
    rewrite(interrupt(tmp_path, "llama", monkeypatch) / "model.safetensors", change)
    with pytest.raises(TrainingStopped, match=message):
        train(tmp_path, "llama", "interrupted")


@CHANGES
def test_a_resumed_run_reads_whole_adapters_only(tmp_path, monkeypatch, change, message):
    checkpoint = interrupt(tmp_path, "llama", monkeypatch, method="lora")
    rewrite(checkpoint / "adapter_model.safetensors", change)
    with pytest.raises(TrainingStopped, match=message):
        train(tmp_path, "llama", "interrupted", method="lora")


def test_a_checkpoint_with_experts_one_by_one_is_not_resumed(tmp_path, monkeypatch):
    """As an earlier version wrote them."""
    monkeypatch.setattr(checkpoints, "own_parameter_names", nullcontext)
    interrupt(tmp_path, "qwen3_moe", monkeypatch)
    with pytest.raises(TrainingStopped, match=r"experts\.down_proj and \d+ more missing, .*without a parameter"):
        train(tmp_path, "qwen3_moe", "interrupted")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_best_checkpoint_is_read_whole(tmp_path, monkeypatch, method):
    marked = checkpoints.MarkCompleteCallback.on_save

    def damage(self, args, state, control, **others):
        marked(self, args, state, control, **others)
        folder = tmp_path / "out" / "run" / f"checkpoint-{state.global_step}"
        rewrite(next(file for file in folder.glob("*model.safetensors")), drop_first)

    monkeypatch.setattr(checkpoints.MarkCompleteCallback, "on_save", damage)
    with pytest.raises(TrainingStopped, match="missing"):
        train(tmp_path, "llama", method=method)


def test_the_best_checkpoint_has_the_loss_that_it_had():
    save.verify_best(2.0001, 2.0, 1e-3)
    save.verify_best(2.0, None, 1e-3)
    with pytest.raises(TrainingStopped, match=re.escape("its loss was 2.0000 nats per token, and is now 2.5000")):
        save.verify_best(2.5, 2.0, 1e-3)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_saved_model_without_a_weight_is_not_accepted(tmp_path, monkeypatch, method):
    written = save.save

    def damaged(run, output_dir, measured):
        written(run, output_dir, measured)
        rewrite(next(output_dir.glob("*model.safetensors")), drop_first)

    monkeypatch.setattr(trainer, "TASK", replace(trainer.TASK, save=damaged))
    recipe = dispatch.parse(chats.recipe(tmp_path, method=method, optimizer__max_steps=2), "test")
    with pytest.raises(TrainingStopped, match=r"cannot be loaded again: .* missing"):
        dispatch.train(recipe, tmp_path / "out", threads=1)
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_resumed_average_has_all_weights(tmp_path):
    net = torch.nn.Linear(2, 3)
    average = {name: value.detach().clone() for name, value in net.named_parameters()}
    without, others = {"weight": average["weight"]}, average | {"other": torch.zeros(1)}
    for changed, message in ((without, "bias missing"), (others, "other without")):
        save_file(changed, tmp_path / checkpoints.EMA_FILE)
        with pytest.raises(TrainingStopped, match=message):
            checkpoints.EMACallback(net, 0.9, tmp_path)
    save_file(average, tmp_path / checkpoints.EMA_FILE)
    assert checkpoints.EMACallback(net, 0.9, tmp_path).ema.keys() == average.keys()


@pytest.mark.parametrize("method", ["full", "head", "lora"])
def test_a_resumed_run_on_speech_reads_whole_checkpoints_only(tmp_path, monkeypatch, method):
    base, manifest = tiny(tmp_path / "base", conv_dim=(8,) * 7, intermediate_size=32), corpus(tmp_path / "corpus", 12)
    options = {"method": method, "optimizer.lr_scheduler": "constant"}
    with monkeypatch.context() as patched:
        patched.setattr(optimizer, "lr_lambda", lambda config, steps: lambda step: killed() if step > 4 else 1.0)
        with pytest.raises(KeyboardInterrupt):
            speech.run(speech.recipe(base, manifest, **options), tmp_path / "out")
    rewrite(tmp_path / "out" / "run" / "checkpoint-3" / "model.safetensors", drop_first)
    with pytest.raises(TrainingStopped, match="missing"):
        speech.run(speech.recipe(base, manifest, **options), tmp_path / "out")


def test_averaged_checkpoints_have_the_same_weights(tmp_path):
    net = torch.nn.Linear(2, 3)
    whole = {f"net.{name}": value.detach() for name, value in net.named_parameters()}
    folders = [tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"]
    for folder, state in zip(folders, (whole, {"net.bias": whole["net.bias"]}), strict=True):
        folder.mkdir()
        save_file(state, folder / "model.safetensors")
    with pytest.raises(TrainingStopped, match=r"checkpoint-2: .*net\.weight missing"):
        pretrain.average_checkpoints(net, folders)


def test_a_resumed_stage_of_pl_tiny_reads_whole_checkpoints_only(tmp_path):
    net = torch.nn.Linear(2, 3)
    save_file({"weight": net.weight.detach()}, tmp_path / "model.safetensors")
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(TrainingStopped, match="bias missing"):
        pretrain.StageTrainer(model=net, args=arguments)._load_from_checkpoint(str(tmp_path))
