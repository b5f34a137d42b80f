"""Fine-tune a language model in two processes, through the command: losses and weights equal those of one process."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.training.causal import chats

STEPS = 20


def run(folder, devices, strategy, **overrides):
    out = folder / strategy
    options = {
        "batch__tokens": 128,
        "batch__gradient_accumulation_steps": 2 // devices,
        "optimizer__max_steps": STEPS,
        "optimizer__learning_rate": 1e-3,
        "evaluation__eval_steps": 4,
        "distributed": {"devices": devices, "strategy": strategy},
    }
    recipe = folder / f"{strategy}.yaml"
    recipe.write_text(yaml.safe_dump(chats.recipe(folder, **options, **overrides)))
    command = [sys.executable, "-m", "mowa", "train", recipe, "-o", out, "--threads", "2"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    (weights,) = out.glob("*model.safetensors")
    return [row["loss"] for row in rows if "loss" in row], load_file(weights)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_processes_equal_one(tmp_path, method):
    losses, weights = run(tmp_path, 1, "auto", method=method)
    assert len(losses) == STEPS // 4
    assert losses[-1] < losses[0]
    for strategy in ("zero2", "zero3"):
        sharded_losses, sharded = run(tmp_path, 2, strategy, method=method)
        assert sharded_losses == pytest.approx(losses, rel=1e-3), strategy
        assert sharded.keys() == weights.keys()
        for name, value in weights.items():
            torch.testing.assert_close(sharded[name], value, rtol=1e-2, atol=2e-4, msg=f"{strategy}: {name}")
