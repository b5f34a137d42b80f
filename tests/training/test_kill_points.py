"""A kill at any file operation of a save does not break resumption: the run ends with the same bits, on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KINDS = ["ctc", "causal", "pl_tiny"]


def kill(kind, folder, *points):
    """Return the number of points, and what went wrong."""
    command = [sys.executable, "-m", "tests.training.kill_points", kind, str(folder), *map(str, points)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout[done.stdout.index("{") :])
    return found["points"], found["wrong"]


@pytest.mark.parametrize(
    "kind", [kind if kind == "ctc" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_a_kill_while_a_checkpoint_or_the_result_is_written(kind, tmp_path):
    points, wrong = kill(kind, tmp_path, 0.45, 0.92)
    assert not wrong
    assert points > 50


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_at_every_file_operation(kind, tmp_path):
    points, wrong = kill(kind, tmp_path, "all")
    assert not wrong
    assert points > 50
