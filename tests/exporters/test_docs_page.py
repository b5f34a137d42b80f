"""The example of docs/add-an-exporter.md exports a model."""

import re
import sys
from pathlib import Path

import pytest

import mowa
from mowa.errors import ModelError
from mowa.exporters import protocol
from mowa.models import tolerances
from tests.checkpoints import tiny
from tests.installed import install
from tests.quantized import SHORT_FRONT_END, tiny_quantized

PAGE = (Path(__file__).parents[2] / "docs" / "add-an-exporter.md").read_text(encoding="utf-8")


@pytest.fixture
def registered(monkeypatch, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    name = re.match(r"# (\w+)\.py", code)[1]
    install(tmp_path / "site", monkeypatch, "mowa.exporters", "pt2", f"{name}:FORMAT", code)
    yield "pt2"
    sys.modules.pop(name, None)


def test_the_example_exports_a_model(registered, tmp_path):
    model = mowa.load(str(tiny(tmp_path / "base", **SHORT_FRONT_END)))
    artifact = protocol.export(model, registered, tmp_path / "out")
    assert artifact.format == registered
    assert artifact.agreement == 1
    assert artifact.files == ("model.pt2",)
    with pytest.raises(ModelError, match="use onnx"):
        protocol.export(tiny_quantized(tmp_path / "int8", "int8-weight"), registered, tmp_path / "int8-out")
    assert tolerances.MAX_ABS_DIFF == 1e-3  # as the page says
    assert tolerances.MIN_AGREEMENT == 0.94
