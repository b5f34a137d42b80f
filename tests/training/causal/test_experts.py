"""Full training of nets with experts: the best checkpoint, a resumed run and the written model have the experts."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mowa import loading
from mowa.training import checkpoints, optimizer
from mowa.training.causal import dataset
from mowa.training.config import dispatch
from tests.families.tiny import CAUSAL, tiny
from tests.tiny_causal import load_in_transformers, tiny_causal
from tests.training.causal import chats

EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "granitemoe")
LARGE_STEPS = {
    "method": "full",
    "optimizer__learning_rate": 5e-2,
    "optimizer__lr_scheduler": "constant",
    "optimizer__warmup_ratio": 0.0,
    "batch__tokens": 1000,
}


def turns(file, answer, count=10):
    """Write conversations answered by word number `answer` of four, and return the file."""
    with file.open("w") as out:
        for number in range(count):
            asked = [chats.WORDS[(number * step + step) % len(chats.WORDS)] for step in range(1, 5)]
            messages = [{"role": "user", "content": " ".join(asked)}, {"role": "assistant", "content": asked[answer]}]
            out.write(json.dumps({"messages": messages}) + "\n")
    return file


def train(folder, family, out="out", **overrides):
    """Train on the last word of the question and evaluate on the first: the dev loss soon gets worse."""
    if not (folder / "base").is_dir():
        tiny_causal(folder / "base", family)
        turns(folder / "chats.jsonl", -1)
        turns(folder / "dev.jsonl", 0)
    tree = chats.recipe(folder, **LARGE_STEPS | {"data__dev": str(folder / "dev.jsonl")} | overrides)
    return dispatch.train(dispatch.parse(tree, "test"), folder / out, threads=1)


def rows(out, name):
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return [row[name] for row in lines if name in row]


@pytest.mark.parametrize("family", EXPERTS)
def test_the_written_model_is_the_best_one_of_the_run(tmp_path, family):
    out = train(tmp_path, family, optimizer__max_steps=8, evaluation__eval_steps=2)
    losses = rows(out, "eval_dev_loss")
    assert min(losses) < losses[-1] - 0.05
    net = load_in_transformers(out, dtype=torch.float32)
    samples = dataset.load_splits(dispatch.read_recipe(out / "recipe.yaml"), loading.load(str(out))).dev["dev"]
    assert dataset.evaluate(net, samples)["loss"] == pytest.approx(min(losses), abs=1e-5)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_the_written_adapter_of_a_net_with_experts_is_the_best_one(tmp_path, family):
    out = train(tmp_path, family, method="lora", optimizer__max_steps=8, evaluation__eval_steps=2)
    found = json.loads((out / "report.json").read_text())["metrics"]["dev"]["loss"]
    assert found == pytest.approx(min(rows(out, "eval_dev_loss")), abs=1e-5)


def killed(*_, **__):
    raise KeyboardInterrupt


def interrupt(folder, family, monkeypatch, out="interrupted", **overrides):
    """Start a run that ends in its fifth step, and return its last checkpoint."""
    with monkeypatch.context() as patched:
        patched.setattr(optimizer, "lr_lambda", lambda config, steps: lambda step: killed() if step > 4 else 1.0)
        with pytest.raises(KeyboardInterrupt):
            train(folder, family, out, **overrides)
    return folder / out / "run" / "checkpoint-3"


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe"])
def test_an_interrupted_run_of_experts_resumes_to_the_same_bits(tmp_path, monkeypatch, family):
    checkpoint = interrupt(tmp_path, family, monkeypatch)
    AutoModelForCausalLM.from_pretrained(checkpoint)  # the checkpoint is one that transformers loads
    resumed, whole = train(tmp_path, family, "interrupted"), train(tmp_path, family, "whole")
    assert rows(resumed, "eval_dev_loss") == rows(whole, "eval_dev_loss")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("family", [name for name in CAUSAL if name not in EXPERTS])
def test_checkpoints_have_the_names_of_the_parameters(tmp_path, family):
    net = tiny(family)
    with checkpoints.own_parameter_names(net):
        net.save_pretrained(tmp_path)
    assert "save_pretrained" not in vars(net)
    found = net.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not found.unexpected_keys
    assert set(found.missing_keys) <= {"lm_head.weight"}  # tied
