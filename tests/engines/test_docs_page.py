"""The example of docs/add-an-engine.md runs an export."""

import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import mowa
from mowa.data import audio
from mowa.engines import selection
from mowa.errors import ModelError
from mowa.exporters import export
from tests.checkpoints import clip, tiny
from tests.installed import install
from tests.quantized import SHORT_FRONT_END

pytest.importorskip("onnxscript")

PAGE = (Path(__file__).parents[2] / "docs" / "add-an-engine.md").read_text(encoding="utf-8")


@pytest.fixture
def example(monkeypatch, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    module = types.ModuleType("mowa_name")
    module.load = lambda file, threads: onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    module.run = lambda model, clips: model.run(
        None, {"input_values": clips, "attention_mask": np.ones_like(clips, int)}
    )[0]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, "name.py", "exec"), vars(module))
    install(tmp_path / "site", monkeypatch, "mowa.engines", "name", "mowa_name:ENGINE")
    return module


def test_the_example_runs_an_export(example, tmp_path):
    model = mowa.load(str(tiny(tmp_path / "base", **SHORT_FRONT_END)))
    folder = export(model, "onnx", tmp_path / "out").folder
    manifest = json.loads((folder / "mowa.json").read_text())
    manifest |= {"format": example.FORMAT, "details": {"model": "model.onnx"}}
    (folder / "mowa.json").write_text(json.dumps(manifest))
    engine = selection.open_artifact(folder).engine
    assert engine.name == "name"
    reference = mowa.open_engine(model, device="cpu", dtype="float32")
    for length in (400, 4_097, 12_345):
        clips = [audio.normalize(clip(length, length))] * 2
        for ours, theirs in zip(engine.emissions(clips), reference.emissions(clips), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
    with pytest.raises(ValueError, match="cannot share a batch"):
        engine.emissions([clip(0, 400), clip(0, 401)])
    with pytest.raises(ModelError, match="use auto, float32"):
        selection.open_artifact(folder, dtype="int8")
