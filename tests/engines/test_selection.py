"""What is picked: what was named, PyTorch where nothing else is there, else what measured fastest; and it is said."""

import json

import numpy as np
import pytest

import mowa
from mowa import hardware
from mowa.data import audio
from mowa.engines import onnx, selection
from mowa.errors import ModelError
from tests.adapters.made import OTHER, saved
from tests.checkpoints import clip
from tests.checkpoints import tiny as whole_tiny

QUICK = {"conv_dim": (16,) * 3, "conv_kernel": (10, 8, 8), "conv_stride": (5, 8, 8), "num_hidden_layers": 1}


def tiny(folder, **changes):
    """Fewer convolutions with the hop of seven: quicker to trace."""
    return whole_tiny(folder, **QUICK | changes)


SOUND = audio.normalize(clip(0, 9_000))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOWA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def base(tmp_path):
    return str(tiny(tmp_path / "base"))


def test_the_named_engine_is_the_engine(base):
    native = selection.select_engine(mowa.load(base), name="pytorch", device="cpu", dtype="float32")
    exported = selection.select_engine(mowa.load(base), name="onnx")
    assert (native.engine.name, exported.engine.name) == ("pytorch", "onnx")
    assert "as it was named" in native.reason
    (ours,), (theirs,) = (one.engine.emissions([SOUND]) for one in (native, exported))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_auto_is_native_where_nothing_was_exported(base, cache, caplog):
    with caplog.at_level("INFO", "mowa"):
        choice = selection.select_engine(mowa.load(base), device="cpu")
    assert choice.engine.name == "pytorch"
    assert choice.reason.startswith(f"pytorch, {choice.engine.dtype} on cpu: ")
    assert choice.reason in caplog.text
    assert not (cache / "onnx").exists()


@pytest.mark.parametrize("faster", ["pytorch", "onnx"])
def test_auto_takes_what_measured_fastest_and_remembers(base, cache, monkeypatch, faster):
    onnx.open_engine(mowa.load(base))
    asked = []

    def measured(engines):
        asked.append([selection._label(one) for one in engines])
        return {selection._label(one): 1.0 if one.name == faster else 2.0 for one in engines}

    monkeypatch.setattr(selection, "time_engines", measured)
    for _ in range(2):
        choice = selection.select_engine(mowa.load(base), device="cpu", dtype="float32")
        assert choice.engine.name == faster
        assert "pytorch float32" in choice.reason
        assert "onnx float32" in choice.reason
    assert asked == [["pytorch float32", "onnx float32"]]
    (key,) = json.loads((cache / selection.TIMINGS_FILE).read_text())
    assert hardware.cpu_name() in key


def test_what_is_measured_is_the_engines(base):
    engines = [
        selection.select_engine(mowa.load(base), name=name, device="cpu", dtype="float32").engine
        for name in ("pytorch", "onnx")
    ]
    seconds = selection.time_engines(engines)
    assert list(seconds) == ["pytorch float32", "onnx float32"]
    assert all(spent > 0 for spent in seconds.values())


def test_another_models_export_is_not_taken(base, tmp_path, monkeypatch):
    onnx.open_engine(mowa.load(str(tiny(tmp_path / "other", hidden_size=48))))
    monkeypatch.setattr(selection, "time_engines", lambda engines: pytest.fail("there is nothing to compare"))
    assert selection.select_engine(mowa.load(base), device="cpu").engine.name == "pytorch"


def test_a_damaged_export_is_said_and_not_taken(base, cache, caplog):
    onnx.open_engine(mowa.load(base))
    next(cache.glob("onnx/*/model.onnx")).write_bytes(b"nothing")
    assert selection.select_engine(mowa.load(base), device="cpu", dtype="float32").engine.name == "pytorch"
    assert "is missing or damaged" in caplog.text


def test_narrow_arithmetic_is_only_named(base, monkeypatch):
    onnx.open_engine(mowa.load(base), dtype="int8")
    assert selection.select_engine(mowa.load(base), device="cpu").engine.dtype in ("float32", "bfloat16")
    assert selection.select_engine(mowa.load(base), name="pytorch", device="cpu", dtype="int8").engine.dtype == "int8"
    assert selection.select_engine(mowa.load(base), name="onnx", dtype="int8").engine.dtype == "int8"


@pytest.mark.parametrize("name", ["pytorch", "onnx"])
def test_an_adapter_is_heard(base, tmp_path, name):
    saved(tmp_path / "base", "lora", tmp_path / "adapter", words=OTHER)
    choice = selection.select_engine(
        mowa.load(base), name=name, device="cpu", dtype="float32", adapter=tmp_path / "adapter"
    )
    assert choice.engine.vocabulary == OTHER
    native = mowa.open_engine(mowa.load(base), device="cpu", dtype="float32").with_adapter(tmp_path / "adapter")
    np.testing.assert_allclose(choice.engine.emissions([SOUND])[0], native.emissions([SOUND])[0], atol=1e-4)


def test_what_cannot_be_is_refused(base):
    model = mowa.load(base)
    with pytest.raises(ModelError, match="engine 'tensorrt' is not one of auto, native, onnx"):
        selection.select_engine(model, name="tensorrt")
    with pytest.raises(ModelError, match="the onnx engine runs on processors"):
        selection.select_engine(model, name="onnx", device="cuda")
