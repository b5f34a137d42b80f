"""Selection of an engine: the requested one, PyTorch without an alternative, else the fastest; the reason is logged."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mowa
from mowa import hardware
from mowa.data import audio
from mowa.engines import onnx, selection, transcription
from mowa.engines.settings import EngineSpec
from mowa.errors import ModelError
from mowa.exporters import manifest
from mowa.io import hashing
from tests.adapters.tiny_adapters import OTHER_VOCABULARY, save_tiny_adapter
from tests.checkpoints import clip
from tests.checkpoints import tiny as whole_tiny

QUICK = {"conv_dim": (16,) * 3, "conv_kernel": (10, 8, 8), "conv_stride": (5, 8, 8), "num_hidden_layers": 1}


def tiny(folder, **changes):
    """Three convolutions with the hop of the stock seven: faster to trace."""
    return whole_tiny(folder, **QUICK | changes)


SOUND = audio.normalize(clip(0, 9_000))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOWA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def exports(base, tmp_path_factory):
    """A cache that holds the float32 export of `base`; tracing takes seconds, so it is made once."""
    folder = tmp_path_factory.mktemp("exports")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOWA_CACHE", str(folder))
        onnx.open_engine(mowa.load(base))
    return folder


@pytest.fixture
def exported(exports, cache):
    """The cache of this test, with a copy of that export."""
    return shutil.copytree(exports, cache)


def test_a_requested_engine_is_used(base, exported):
    native = selection.select_engine(mowa.load(base), name="pytorch", device="cpu", dtype="float32")
    exported = selection.select_engine(mowa.load(base), name="onnx")
    assert (native.engine.name, exported.engine.name) == ("pytorch", "onnx")
    assert "requested" in native.reason
    (ours,), (theirs,) = (one.engine.emissions([SOUND]) for one in (native, exported))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_auto_is_pytorch_without_an_export(base, cache, caplog):
    with caplog.at_level("INFO", "mowa"):
        choice = selection.select_engine(mowa.load(base), device="cpu")
    assert choice.engine.name == "pytorch"
    assert choice.reason.startswith(f"pytorch, {choice.engine.dtype} on cpu: ")
    assert choice.reason in caplog.text
    assert not (cache / "onnx").exists()


def test_a_quantized_model_in_float32_is_not_an_error_beside_exports_of_others(base, exported):
    choice = selection.select_engine(mowa.quantize(base, "int8"), device="cpu", dtype="float32")
    assert (choice.engine.name, choice.engine.dtype) == ("pytorch", "float32")


@pytest.mark.parametrize("faster", ["pytorch", "onnx"])
def test_auto_uses_the_fastest_and_caches_the_timings(base, exported, monkeypatch, faster):
    timed = []

    def time_engines(engines):
        timed.append([selection._label(one) for one in engines])
        return {selection._label(one): 1.0 if one.name == faster else 2.0 for one in engines}

    monkeypatch.setattr(selection, "time_engines", time_engines)
    for _ in range(2):
        choice = selection.select_engine(mowa.load(base), device="cpu", dtype="float32")
        assert choice.engine.name == faster
        assert "pytorch float32" in choice.reason
        assert "onnx float32" in choice.reason
    assert timed == [["pytorch float32", "onnx float32"]]
    (key,) = json.loads((exported / selection.TIMINGS_FILE).read_text())
    assert hardware.cpu_name() in key


def test_engines_are_timed(base, exported):
    engines = [
        selection.select_engine(mowa.load(base), name=name, device="cpu", dtype="float32").engine
        for name in ("pytorch", "onnx")
    ]
    seconds = selection.time_engines(engines)
    assert list(seconds) == ["pytorch float32", "onnx float32"]
    assert all(elapsed_s > 0 for elapsed_s in seconds.values())


def test_the_export_of_another_model_is_ignored(exported, tmp_path, monkeypatch):
    other = str(tiny(tmp_path / "other", hidden_size=48))
    monkeypatch.setattr(selection, "time_engines", lambda engines: pytest.fail("timed without an alternative"))
    assert selection.select_engine(mowa.load(other), device="cpu").engine.name == "pytorch"


def test_a_damaged_export_is_logged_and_ignored(base, exported, caplog):
    next(exported.glob("onnx/*/model.onnx")).write_bytes(b"nothing")
    assert selection.select_engine(mowa.load(base), device="cpu", dtype="float32").engine.name == "pytorch"
    assert "is missing or damaged" in caplog.text


def test_a_model_that_was_changed_in_memory_does_not_get_the_export_of_its_files(base, exported):
    model = mowa.load(base)
    with torch.no_grad():
        model.net.lm_head.weight.mul_(0.5)
    expected = mowa.open_engine(mowa.load(base), device="cpu", dtype="float32").emissions([SOUND])[0]
    engine = selection.select_engine(model, name="onnx").engine
    assert np.abs(engine.emissions([SOUND])[0] - expected).max() > 0.1
    assert len(list((exported / "onnx").iterdir())) == 2


@pytest.fixture
def settled(base, exported, monkeypatch):
    """Counts the files and nets that are hashed; the files count as settled, and the cache of checksums is empty."""
    reads = []
    read, hash_net = hashing._read_and_hash, manifest.model_sha256
    monkeypatch.setattr(hashing, "MIN_AGE_S", -1.0)
    monkeypatch.setattr(hashing, "_read_and_hash", lambda file: reads.append(file.name) or read(file))
    monkeypatch.setattr(manifest, "model_sha256", lambda model: reads.append("net") or hash_net(model))
    hashing._sha256.cache_clear()
    return reads


@pytest.mark.parametrize("name", ["onnx", "auto"])
def test_a_second_start_by_name_hashes_no_weights(base, settled, monkeypatch, name):
    monkeypatch.setattr(selection, "_cached_timings", lambda engines: {"pytorch float32": 2.0, "onnx float32": 1.0})
    spec = EngineSpec(base, engine=name, device="cpu", dtype="float32")
    assert transcription.load_engine(spec).engine.name == "onnx"
    assert {"net", "model.safetensors", "model.onnx.data"} <= set(settled)
    settled.clear()
    hashing._sha256.cache_clear()  # as another process
    assert transcription.load_engine(spec).engine.name == "onnx"
    assert settled == []


def test_changed_files_get_an_export_of_their_own(base, exported, settled, tmp_path):
    folder = shutil.copytree(base, tmp_path / "copy")
    spec = EngineSpec(str(folder), engine="onnx")
    transcription.load_engine(spec)
    assert len(list((exported / "onnx").iterdir())) == 1  # the same weights
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] *= 0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    engine = transcription.load_engine(spec).engine
    assert len(list((exported / "onnx").iterdir())) == 2
    native = mowa.open_engine(mowa.load(folder), device="cpu", dtype="float32")
    np.testing.assert_allclose(engine.emissions([SOUND])[0], native.emissions([SOUND])[0], atol=1e-4)


def test_int8_is_used_only_on_request(base, monkeypatch):
    onnx.open_engine(mowa.load(base), dtype="int8")
    assert selection.select_engine(mowa.load(base), device="cpu").engine.dtype in ("float32", "bfloat16")
    assert selection.select_engine(mowa.load(base), name="pytorch", device="cpu", dtype="int8").engine.dtype == "int8"
    assert selection.select_engine(mowa.load(base), name="onnx", dtype="int8").engine.dtype == "int8"


@pytest.mark.parametrize("name", ["pytorch", "onnx"])
def test_an_adapter_is_applied(base, tmp_path, name):
    save_tiny_adapter(Path(base), "lora", tmp_path / "adapter", vocabulary=OTHER_VOCABULARY)
    choice = selection.select_engine(
        mowa.load(base), name=name, device="cpu", dtype="float32", adapter=tmp_path / "adapter"
    )
    assert choice.engine.vocabulary == OTHER_VOCABULARY
    native = mowa.open_engine(mowa.load(base), device="cpu", dtype="float32").with_adapter(tmp_path / "adapter")
    np.testing.assert_allclose(choice.engine.emissions([SOUND])[0], native.emissions([SOUND])[0], atol=1e-4)


def test_unsupported_choices_are_refused(base):
    model = mowa.load(base)
    with pytest.raises(ModelError, match="unknown engine 'tensorrt': use one of pytorch, onnx, ctranslate2"):
        selection.select_engine(model, name="tensorrt")
    with pytest.raises(ModelError, match="the onnx engine runs on cpu only"):
        selection.select_engine(model, name="onnx", device="cuda")
    with pytest.raises(ModelError, match="the ctranslate2 engine runs exports only: `mowa export --to ctranslate2`"):
        selection.select_engine(model, name="ctranslate2")
