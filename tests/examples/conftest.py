"""Exports for the examples: of a tiny random net in float32, and of pl-tiny in int8."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mowa
from mowa.exporters import export
from mowa.quantization import quantize
from tests.checkpoints import tiny
from tests.quantized import SHORT_FRONT_END

EXAMPLES = Path(__file__).parents[2] / "examples"
UNAVAILABLE = ("mowa", "torch", "transformers")
RUN = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({UNAVAILABLE}))  # importing one of these fails
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="session")
def sample() -> Path:
    return EXAMPLES / "dzien-dobry.flac"


@pytest.fixture(scope="session")
def float32_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float32")
    return export(mowa.load(str(tiny(folder / "net", **SHORT_FRONT_END))), "onnx", folder / "onnx").folder


@pytest.fixture(scope="session")
def int8_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of pl-tiny."""
    model = quantize(mowa.load("pl-tiny"), "int8-dynamic")
    return export(model, "onnx", tmp_path_factory.mktemp("int8") / "onnx").folder


@pytest.fixture(scope="session")
def run_example():
    """A function that runs an example without mowa and torch, and returns its exit status and output."""

    def run(script: str, *arguments: object) -> tuple[int, str]:
        command = [sys.executable, "-I", "-c", RUN, str(EXAMPLES / script), *map(str, arguments)]
        completed = subprocess.run(command, capture_output=True, encoding="utf-8", env=os.environ | {"PYTHONUTF8": "1"})
        return completed.returncode, (completed.stdout or completed.stderr).strip()

    return run
