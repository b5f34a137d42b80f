"""Fine-tune in two processes, through the command: losses and weights equal those of one process."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCTC

from tests.checkpoints import corpus, tiny

NO_DROPOUT = {f"{name}_dropout": 0.0 for name in ("hidden", "attention", "activation", "feat_proj", "final")}
STEPS = 20


def run(folder, base, manifest, devices, strategy):
    options = {
        "devices": devices,
        "strategy": strategy,
        "batch.gradient-accumulation-steps": 2 // devices,
        "max-steps": STEPS,
        "dev": manifest,
    }
    options |= {
        "evaluation.eval-steps": 10,
        "spec-augment.mask-time-prob": 0,
        "augment.speed": "1,1",
        "optimizer.precision": "float32",
    }
    options |= {"batch.seconds": 4, "learning-rate": 1e-4}
    command = [sys.executable, "-m", "mowa", "train", "--model", base, "--data", manifest, "-o", folder, "--threads", 2]
    command += [part for name, value in options.items() for part in (f"--{name}", value)]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row], AutoModelForCTC.from_pretrained(folder).state_dict()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    base, manifest = tiny(tmp_path / "base", layerdrop=0.0, **NO_DROPOUT), corpus(tmp_path / "corpus", 24)
    losses, weights = run(tmp_path / "one", base, manifest, 1, "auto")
    assert len(losses) == STEPS // 10
    assert losses[-1] < losses[0]
    for strategy in ("ddp", "zero2", "zero3"):
        sharded_losses, sharded = run(tmp_path / strategy, base, manifest, 2, strategy)
        assert sharded_losses == pytest.approx(losses, rel=1e-3), strategy
        for name, value in weights.items():
            torch.testing.assert_close(sharded[name], value, rtol=1e-2, atol=2e-4, msg=f"{strategy}: {name}")
