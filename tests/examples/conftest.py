"""What the examples are given: an export of a tiny random net in float32, and one of pl-tiny in int8."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mowa
from mowa.exporters import export
from mowa.quantization import quantize
from tests.checkpoints import tiny
from tests.quantized import QUICK

EXAMPLES = Path(__file__).parents[2] / "examples"
WITHOUT = ("mowa", "torch", "transformers")
ALONE = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({WITHOUT}))  # whoever imports one of these fails
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="session")
def sample() -> Path:
    return EXAMPLES / "dzien-dobry.flac"


@pytest.fixture(scope="session")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masked")
    return export(mowa.load(str(tiny(folder / "net", **QUICK))), "onnx", folder / "onnx").folder


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of pl-tiny, in int8."""
    return export(
        quantize(mowa.load("pl-tiny"), "int8-dynamic"), "onnx", tmp_path_factory.mktemp("small") / "onnx"
    ).folder


@pytest.fixture(scope="session")
def run_alone():
    """Runs an example as somebody would who has neither mowa nor torch → (exit status, what it printed)."""

    def run(script: str, *arguments: object) -> tuple[int, str]:
        command = [sys.executable, "-I", "-c", ALONE, str(EXAMPLES / script), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", env=os.environ | {"PYTHONUTF8": "1"})
        return done.returncode, (done.stdout or done.stderr).strip()

    return run
