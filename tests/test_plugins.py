"""A package adds an export format and an engine with one module each: no file of mowa changes."""

import sys
from importlib.metadata import EntryPoint

import click
import numpy as np
import pytest
import soundfile

import mowa
from mowa.cli import export as export_command
from mowa.cli.main import main
from mowa.engines import registry as engines
from mowa.errors import MissingDependency, ModelError
from mowa.exporters import registry as formats
from mowa.plugins import Registry, load_entry_point
from tests.checkpoints import clip, tiny
from tests.installed import install
from tests.quantized import SHORT_FRONT_END

EXPORTER = '''
"""Export a net as a transformers checkpoint in a folder of its own."""

from mowa.adapters.merge import merge_adapter
from mowa.exporters.manifest import ExportResult
from mowa.exporters.registry import ExportFormat, ExportOption

FORMAT = ExportFormat(
    name="nested",
    description="a checkpoint in a folder of its own",
    module=__name__,
    options=(ExportOption("gain", "--gain", "factor. [default: 1]", float, "a number"),),
)


def unsupported_reason(model):
    return "" if model.scheme.weights == "float32" else "float32 only"


def write(model, folder, *, gain=1.0):
    net = merge_adapter(model).net
    net.save_pretrained(folder / "nested")
    return ExportResult(net.config, ("nested/model.safetensors",), {"gain": gain}, 0.0, 1.0)
'''
ENGINE = '''
"""Run what `nested_exporter` wrote."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mowa.engines.protocol import ArtifactEngine, BatchPolicy, log_softmax
from mowa.engines.registry import EngineInfo
from mowa.exporters import manifest

ENGINE = EngineInfo(name="nested", open=f"{__name__}:open_engine", artifact_formats=("nested",))


@dataclass(frozen=True)
class NestedEngine(ArtifactEngine):
    net: Any
    name = "nested"
    dtype = "float32"
    batch_policy = BatchPolicy.EQUAL_LENGTH

    def emissions(self, clips):
        with torch.inference_mode():
            return list(log_softmax(self.net(torch.from_numpy(np.stack(clips))).logits.numpy()))


def open_engine(folder, *, device, dtype, threads):
    from transformers import AutoModelForCTC

    artifact = manifest.read_artifact(folder, ("nested",))
    return NestedEngine(artifact, AutoModelForCTC.from_pretrained(folder / "nested"))
'''


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("base"), **SHORT_FRONT_END)


@pytest.fixture
def run(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(one) for one in arguments])
        return end.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def exporter(tmp_path, monkeypatch):
    install(tmp_path / "one", monkeypatch, "mowa.exporters", "nested", "nested_exporter:FORMAT", EXPORTER)
    yield
    sys.modules.pop("nested_exporter", None)


@pytest.fixture
def engine(tmp_path, monkeypatch):
    install(tmp_path / "two", monkeypatch, "mowa.engines", "nested", "nested_engine:ENGINE", ENGINE)
    yield
    sys.modules.pop("nested_engine", None)


def test_an_installed_format_is_exported_from_the_command_line(base, exporter, tmp_path, run):
    assert "nested_exporter" not in sys.modules
    assert "nested" in formats.FORMATS.names()
    assert "nested_exporter" not in sys.modules  # names are read from metadata alone
    code, out, _ = run("export", base, "--to", "nested", "--gain", "2", "-o", tmp_path / "out")
    assert code == 0
    assert "nested, float32" in out
    assert mowa.export(base, "nested", tmp_path / "python", gain=3.0).details == {"gain": 3.0}
    assert "nested: factor" in run("export", "--help")[1]
    assert "expected a number" in run("export", base, "--to", "nested", "--gain", "x", "-o", tmp_path / "x")[2]
    assert "--gain is an option of nested" in run("export", base, "--to", "onnx", "--gain", "2", "-o", tmp_path)[2]
    with pytest.raises(ModelError, match="nested has no option 'size': it has gain"):
        mowa.export(base, "nested", tmp_path / "x", size=3)
    with pytest.raises(ModelError, match="for which there is no engine here"):  # none is installed
        mowa.transcribe(clip(0, 16_000), tmp_path / "out", sampling_rate=16_000)


def test_an_installed_engine_runs_its_exports(base, exporter, engine, tmp_path, run):
    folder = mowa.export(base, "nested", tmp_path / "out").folder
    file = tmp_path / "a.wav"
    soundfile.write(file, clip(1, 16_000), 16_000)
    expected = mowa.transcribe(file, base, device="cpu", dtype="float32", vad_threshold=0.0)
    assert "nested" in engines.engine_choices()
    for model, options in ((folder, {}), (str(folder), {"engine": "nested"})):
        found = mowa.transcribe(file, model, vad_threshold=0.0, **options)
        assert found.text == expected.text != ""
    code, out, _ = run("transcribe", file, "-m", folder, "--vad-threshold", "0")
    assert (code, out.strip()) == (0, expected.text)
    with pytest.raises(ModelError, match=r"is an export to nested, which mowa\.transcribe"):
        mowa.load(folder)
    with pytest.raises(ModelError, match="cannot run with --engine onnx"):
        mowa.transcribe(file, folder, engine="onnx")
    with pytest.raises(ModelError, match="the nested engine runs exports only"):
        mowa.transcribe(file, base, engine="nested")
    with pytest.raises(ModelError, match="is an export to nested, which runs on cpu only: omit --device"):
        mowa.transcribe(file, folder, device="cuda")
    with pytest.raises(ModelError, match="dtype 'int8' is not supported by the nested engine: use auto, float32"):
        mowa.transcribe(file, folder, dtype="int8")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('its wheel is flat')", "its wheel is flat"),
        ("ENGINE = 3", "expected EngineInfo, found int"),
        (
            "from mowa.engines.registry import *; ENGINE = EngineInfo('other', '', ())",
            "is called 'nested' and the value",
        ),
    ],
)
def test_a_package_that_fails_is_skipped(tmp_path, monkeypatch, caplog, source, reason):
    install(tmp_path / "bad", monkeypatch, "mowa.engines", "nested", "nested_bad:ENGINE", source)
    assert [one.name for one in engines.ENGINES.all()] == ["pytorch", "onnx", "ctranslate2"]
    assert "skipping the engines of nested_bad" in caplog.text
    assert reason in caplog.text
    with pytest.raises(ModelError, match="unknown engine 'nested'"):
        engines.ENGINES.get("nested")
    sys.modules.pop("nested_bad", None)


def test_a_package_does_not_replace_a_built_in_engine(tmp_path, monkeypatch):
    install(tmp_path / "bad", monkeypatch, "mowa.engines", "onnx", "nested_bad:ENGINE", "raise RuntimeError")
    assert engines.engine_choices() == ("auto", "pytorch", "onnx", "ctranslate2")
    assert engines.ENGINES.get("onnx").open == "mowa.engines.onnx:open_engine"


def test_a_missing_package_is_named(monkeypatch):
    found = formats.ExportFormat("nested", "", "x", packages=("nothing_of_that_name",), install="nested[all]")
    from mowa.exporters import protocol

    monkeypatch.setattr(protocol, "FORMATS", Registry("mowa.exporters", "format", formats.ExportFormat, (found,)))
    with pytest.raises(MissingDependency, match=r"export to nested needs nothing_of_that_name: pip install 'nested\["):
        protocol.require_packages("nested")


def test_every_built_in_value_is_complete():
    for info in engines.ENGINES.builtins:
        assert info.dtypes[0] == engines.AUTO
        assert bool(info.open_cached) == ("cache" in info.capabilities)
    flags = [option.flag for found in formats.FORMATS.builtins for option in found.options]
    assert len(flags) == len(set(flags))
    context = click.Context(export_command.export)
    assert set(flags) <= {flag for parameter in export_command.export.get_params(context) for flag in parameter.opts}
    for found in formats.FORMATS.builtins:
        assert found.runs or engines.find_engine_of_format(found.name)
    assert formats.parse_profile("1x2,3x4,5x6") == ((1, 2), (3, 4), (5, 6))
    np.testing.assert_array_equal(formats.parse_seconds("5,10.5"), [5, 10.5])


def test_a_module_that_exits_when_it_is_imported_is_skipped(tmp_path, monkeypatch, caplog):
    (tmp_path / "quitting_plugin.py").write_text("import sys\nsys.exit('no licence')\n")
    monkeypatch.syspath_prepend(tmp_path)
    load_entry_point(EntryPoint("quitting", "quitting_plugin:VALUE", "mowa.engines"), lambda value: None)
    assert "skipping the engines of quitting (quitting_plugin:VALUE): no licence" in caplog.text
