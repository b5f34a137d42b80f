"""The ONNX engine equals the PyTorch engine in any batch; a model is exported to the cache once."""

import builtins
import shutil

import numpy as np
import pytest
import soundfile

import mowa
from mowa.adapters import checkpoint
from mowa.data import audio
from mowa.engines import onnx, protocol
from mowa.engines.protocol import BatchPolicy
from mowa.errors import MissingDependency, ModelError
from mowa.exporters import export
from mowa.quantization import quantize
from tests.adapters.tiny_adapters import OTHER_VOCABULARY, save_tiny_adapter
from tests.checkpoints import clip
from tests.checkpoints import tiny as whole_tiny

pytest.importorskip("onnxscript")

QUICK = {"conv_dim": (16,) * 3, "conv_kernel": (10, 8, 8), "conv_stride": (5, 8, 8), "num_hidden_layers": 1}


def tiny(folder, **changes):
    """Three convolutions with the hop of the stock seven: faster to trace."""
    return whole_tiny(folder, **QUICK | changes)


CLIPS = [audio.normalize(clip(index, length)) for index, length in enumerate([400, 401, 4_097, 12_345])]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOWA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "onnx"


one_norm = pytest.mark.parametrize("base", ["layer"], indirect=True)


@pytest.fixture(scope="module", params=["layer", "group"])
def base(request, tmp_path_factory):
    return tiny(tmp_path_factory.mktemp(request.param), norm=request.param)


@pytest.fixture(scope="module")
def exports(base, tmp_path_factory):
    """A cache that holds the float32 export of `base`; tracing takes seconds, so it is made once."""
    folder = tmp_path_factory.mktemp("exports")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOWA_CACHE", str(folder))
        onnx.open_engine(mowa.load(str(base)))
    return folder / "onnx"


@pytest.fixture
def exported(exports, cache):
    """The cache of this test, with a copy of that export."""
    return shutil.copytree(exports, cache)


def test_it_equals_the_pytorch_engine(base, exported):
    engine = onnx.open_engine(mowa.load(str(base)))
    native = mowa.open_engine(mowa.load(str(base)), device="cpu", dtype="float32")
    assert (engine.name, engine.device, engine.dtype) == ("onnx", "cpu", "float32")
    assert (engine.vocabulary, engine.preprocessing) == (native.vocabulary, native.preprocessing)
    assert engine.origin.source == native.origin.source
    for group in protocol.batch_by_length([len(one) for one in CLIPS], 60_000, engine.batch_policy):
        for index, scores in zip(group, engine.emissions([CLIPS[i] for i in group]), strict=True):
            (expected,) = native.emissions([CLIPS[index]])
            assert scores.shape == expected.shape
            np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_clips_that_cannot_share_a_batch_are_refused(base, exported):
    engine = onnx.open_engine(mowa.load(str(base)))
    group = engine.config.feat_extract_norm == "group"
    assert engine.batch_policy is (BatchPolicy.EQUAL_LENGTH if group else BatchPolicy.PADDED)
    if group:
        with pytest.raises(ValueError, match="cannot share"):
            engine.emissions(CLIPS)
        return
    int8 = onnx.open_engine(mowa.load(str(base)), dtype="int8")
    assert (int8.batch_policy, int8.dtype) == (BatchPolicy.SINGLE, "int8")
    with pytest.raises(ValueError, match="cannot share"):
        int8.emissions(CLIPS)


@one_norm
def test_recordings_are_transcribed(base, exported, tmp_path):
    file = tmp_path / "noise.wav"
    soundfile.write(file, clip(3, 20_000), 16_000)
    folder = str(base)
    ours = mowa.transcribe(file, onnx.open_engine(mowa.load(folder)), vad_threshold=0.0)
    theirs = mowa.transcribe(file, folder, device="cpu", dtype="float32", vad_threshold=0.0)
    assert ours.text == theirs.text
    assert ours.text


def test_a_model_is_exported_once(base, exported, monkeypatch):
    (made,) = exported.iterdir()
    monkeypatch.setattr(onnx.exporters, "export", lambda *_, **__: pytest.fail("it was exported again"))
    onnx.open_engine(mowa.load(str(base)))
    assert list(exported.iterdir()) == [made]


@one_norm
def test_a_damaged_export_is_replaced(base, exported):
    folder = str(base)
    (expected,) = onnx.open_engine(mowa.load(folder)).emissions(CLIPS[-1:])
    (made,) = exported.iterdir()
    (made / "model.onnx.data").write_bytes(b"\0" * 1_000)
    (scores,) = onnx.open_engine(mowa.load(folder)).emissions(CLIPS[-1:])
    np.testing.assert_allclose(scores, expected, atol=1e-5)


@one_norm
def test_every_adapter_has_its_own_export(base, exported, tmp_path):
    save_tiny_adapter(base, "lora", tmp_path / "adapter", vocabulary=OTHER_VOCABULARY)
    model = mowa.load(str(base))
    plain, adapted = onnx.open_engine(model), onnx.open_engine(checkpoint.load_adapter(model, tmp_path / "adapter"))
    assert len(list(exported.iterdir())) == 2
    assert adapted.vocabulary == OTHER_VOCABULARY
    native = mowa.open_engine(mowa.load(str(base)), device="cpu", dtype="float32")
    for ours, theirs in ((plain, native), (adapted, native.with_adapter(tmp_path / "adapter"))):
        np.testing.assert_allclose(ours.emissions(CLIPS[-1:])[0], theirs.emissions(CLIPS[-1:])[0], atol=1e-4)


def test_an_export_folder_is_opened(tmp_path):
    out = export(quantize(mowa.load(str(tiny(tmp_path / "base"))), "int8-dynamic"), "onnx", tmp_path / "out").folder
    assert onnx.open_engine(out).dtype == "int8"
    with pytest.raises(ModelError, match="was exported with scheme int8-dynamic"):
        onnx.open_engine(out, dtype="float32")
    with pytest.raises(ModelError, match="is not an export"):
        onnx.open_engine(tmp_path / "base")
    with pytest.raises(ModelError, match="dtype 'bfloat16' is not supported by the onnx engine"):
        onnx.open_engine(out, dtype="bfloat16")


@one_norm
def test_without_onnxruntime(base, exports, monkeypatch):
    (out,) = exports.iterdir()
    real = builtins.__import__

    def without(name, *rest, **more):
        if name == "onnxruntime":
            raise ImportError(name=name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependency, match="needs onnxruntime"):
        onnx.open_engine(out)
