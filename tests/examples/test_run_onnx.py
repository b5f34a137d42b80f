"""examples/run_onnx.py, where there is no mowa: the text that mowa itself gives."""

import ast
from pathlib import Path

import pytest
import soundfile

import mowa
from mowa.exporters import export
from tests.checkpoints import tiny
from tests.quantized import QUICK


def test_the_text_is_mowas(run_alone, masked, sample):
    text = mowa.transcribe(sample, str(masked)).text
    assert len(text) > 20
    assert run_alone("run_onnx.py", masked, sample) == (0, text)


def test_the_text_is_mowas_where_the_graph_takes_no_mask(run_alone, tmp_path, sample):
    folder = export(
        mowa.load(str(tiny(tmp_path / "net", "hubert", "group", **QUICK))), "onnx", tmp_path / "onnx"
    ).folder
    text = mowa.transcribe(sample, str(folder)).text
    assert len(text) > 20
    assert run_alone("run_onnx.py", folder, sample) == (0, text)


def test_another_rate_is_refused(run_alone, masked, sample, tmp_path):
    samples, _ = soundfile.read(sample)
    soundfile.write(tmp_path / "half.wav", samples[::2], 8_000)
    status, told = run_alone("run_onnx.py", masked, tmp_path / "half.wav")
    assert status == 1
    assert "is at 8000 Hz and the model hears 16000: resample it first" in told


def test_it_is_as_short_as_is_said():
    source = (Path(__file__).parents[2] / "examples" / "run_onnx.py").read_text(encoding="utf-8")
    docstring = ast.parse(source).body[0]
    assert len([line for line in source.splitlines()[docstring.end_lineno :] if line.strip()]) == 20


@pytest.mark.slow
def test_pl_tiny_in_int8_says_what_it_says_in_mowa(run_alone, small, sample):
    text = mowa.transcribe(sample, str(small)).text
    assert text.startswith("dzień dobry to jest mowa")
    assert run_alone("run_onnx.py", small, sample) == (0, text)
