"""Tuning a language model in two processes, through the command: the losses and weights of one process."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.training.causal import chats

STEPS = 20


def run(folder, devices, strategy, **turned):
    out = folder / strategy
    how = {
        "batch__tokens": 128,
        "batch__accumulate": 2 // devices,
        "optimise__steps": STEPS,
        "optimise__learning_rate": 1e-3,
        "evaluate__every": 4,
        "parallel": {"devices": devices, "strategy": strategy},
    }
    recipe = folder / f"{strategy}.yaml"
    recipe.write_text(yaml.safe_dump(chats.recipe(folder, **how, **turned)))
    command = [sys.executable, "-m", "mowa", "train", recipe, "-o", out, "--threads", "2"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    (weights,) = out.glob("*model.safetensors")
    return [row["loss"] for row in rows if "loss" in row], load_file(weights)


@pytest.mark.slow
@pytest.mark.parametrize("train", ["all", "lora"])
def test_two_processes_do_what_one_does(tmp_path, train):
    losses, weights = run(tmp_path, 1, "auto", train=train)
    assert len(losses) == STEPS // 4
    assert losses[-1] < losses[0]
    for strategy in ("zero2", "zero3"):
        theirs, shared = run(tmp_path, 2, strategy, train=train)
        assert theirs == pytest.approx(losses, rel=1e-3), strategy
        assert shared.keys() == weights.keys()
        for name, value in weights.items():
            torch.testing.assert_close(shared[name], value, rtol=1e-2, atol=2e-4, msg=f"{strategy}: {name}")
