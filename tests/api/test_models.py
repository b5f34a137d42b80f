"""`mowa.load` and `mowa.transcribe` open what mowa wrote by its folder; an export names what runs it."""

import json
import shutil

import pytest

import mowa
from mowa.errors import ModelError
from mowa.exporters.manifest import read_artifact
from tests.adapters.tiny_adapters import OTHER_VOCABULARY, save_tiny_adapter
from tests.checkpoints import clip, tiny
from tests.quantized import SHORT_FRONT_END, tiny_quantized

AUDIO = {"audio": clip(5, 16_000), "sampling_rate": 16_000, "vad_threshold": 0.0, "device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("base"), **SHORT_FRONT_END)


def write_export(folder, base, export_format):
    """The manifest of an export of `base`, without its files: a quick stand-in."""
    shutil.copytree(base, folder)
    origin = {"name": "the-base", "source": "the-base", "revision": None, "license": None}
    header = {"format_version": 4, "artifact": "export", "task": "ctc", "family": "wav2vec2", "origin": origin}
    model = mowa.load(base)
    sections = {
        "format": export_format,
        "scheme": {"name": "float32", "weights": "float32"},
        "details": {},
        "verification": {"agreement": None, "unverified_reason": ""},
        "vocabulary": {"tokens": model.vocabulary.tokens, "blank": 0, "delimiter": 4, "specials": []},
        "preprocessing": {"rate_hz": 16_000},
    }
    (folder / "mowa.json").write_text(json.dumps(header | {"files": {}, "package_versions": {}} | sections))
    return folder


def test_an_adapter_is_opened_by_its_folder(base, tmp_path):
    save_tiny_adapter(base, "bottleneck", tmp_path / "adapter", vocabulary=OTHER_VOCABULARY)
    model = mowa.load(tmp_path / "adapter")
    assert model.vocabulary == OTHER_VOCABULARY
    text = mowa.transcribe(model=tmp_path / "adapter", **AUDIO).text
    assert text == mowa.transcribe(model=model, **AUDIO).text != ""
    assert set(text) <= {*OTHER_VOCABULARY.tokens, " "}


def test_a_quantized_checkpoint_is_opened_by_its_folder(tmp_path):
    quantized = tiny_quantized(tmp_path / "base", "int8-weight")
    folder = mowa.export(quantized, "safetensors", tmp_path / "out").folder
    assert mowa.load(folder).scheme == quantized.scheme
    assert json.loads((folder / "mowa.json").read_text())["artifact"] == "checkpoint"
    text = mowa.transcribe(model=folder, **AUDIO).text
    assert text == mowa.transcribe(model=str(folder), **AUDIO | {"engine": "pytorch"}).text != ""


@pytest.mark.parametrize(
    ("export_format", "what"),
    [
        ("onnx", r"an export to onnx, which mowa\.transcribe\(audio, model=FOLDER\) runs"),
        ("ctranslate2", r"an export to ctranslate2, which mowa\.transcribe\(audio, model=FOLDER\) runs"),
        ("coreml", r"a Core ML package, which runs on Apple devices: see examples/run_coreml\.py"),
        ("tensorrt", r"a TensorRT export, which runs on a GPU with TensorRT: see examples/run_tensorrt\.py"),
    ],
)
def test_an_export_is_not_loaded_but_says_what_runs_it(base, tmp_path, export_format, what):
    folder = write_export(tmp_path / "out", base, export_format)
    with pytest.raises(ModelError, match=rf"cannot be loaded, it is {what}; the original model is the-base$"):
        mowa.load(folder)
    if export_format in ("coreml", "tensorrt"):
        with pytest.raises(ModelError, match=f"out is {what}$"):
            mowa.transcribe(model=folder, **AUDIO)


def test_what_an_older_mowa_wrote_is_rejected(base, tmp_path):
    folder = write_export(tmp_path / "out", base, "onnx")
    (folder / "mowa.json").write_text(json.dumps({"format_version": 3, "format": "onnx", "files": {}}))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mowa.json").write_text(json.dumps({"format_version": 2, "adapter_type": "lora"}))
    for name, remedy in (("out", "export the model again"), ("adapter", "train the adapter again")):
        for opened in (mowa.load, lambda model: mowa.transcribe(model=model, **AUDIO)):
            with pytest.raises(ModelError, match=f"written by an older version of mowa .*: {remedy}"):
                opened(tmp_path / name)


@pytest.mark.parametrize(("key", "value"), [("family", "hubert"), ("task", "causal")])
def test_a_manifest_that_contradicts_the_config_is_damaged(base, tmp_path, key, value):
    folder = write_export(tmp_path / "export", base, "onnx")
    manifest = json.loads((folder / "mowa.json").read_text())
    (folder / "mowa.json").write_text(json.dumps(manifest | {key: value}))
    with pytest.raises(ModelError, match=rf"is damaged \(it says .*{value}.*, and config\.json wav2vec2, ctc"):
        read_artifact(folder)
