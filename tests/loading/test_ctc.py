"""CTC checkpoints are loaded with the same numbers as by transformers; everything that does not match is an error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCTC,
    Wav2Vec2Model,
)
from transformers.utils import logging as transformers_logging

from mowa.errors import HubUnreachable, ModelError, UnknownModel
from mowa.loading import load
from tests.checkpoints import SMALLEST
from tests.hub import NOWHERE, point_client_at, running

TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "|", "a", "ą", "ź")
TINY = SMALLEST | {"vocab_size": len(TOKENS), "pad_token_id": 0}
AUDIO = {"sampling_rate": 16_000, "do_normalize": True, "return_attention_mask": True, "padding_value": 0.0}


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def change(folder: Path, name: str, **values: Any) -> None:
    """Set keys of a JSON file; keys set to None are removed."""
    data = json.loads((folder / name).read_text(encoding="utf-8")) | values
    write(folder, name, {key: value for key, value in data.items() if value is not None})


def save(folder: Path, model_type: str = "wav2vec2", **config: Any) -> torch.nn.Module:
    """Save a tiny random model with the files of a Hub repository, and return the net."""
    torch.manual_seed(0)
    net = AutoModelForCTC.from_config(AutoConfig.for_model(model_type, **TINY | config)).eval()
    net.save_pretrained(folder)
    write(folder, "vocab.json", {token: id for id, token in enumerate(TOKENS)})
    write(folder, "tokenizer_config.json", {"pad_token": "<pad>", "word_delimiter_token": "|"})
    write(folder, "special_tokens_map.json", {"unk_token": {"content": "<unk>"}, "bos_token": "<s>"})
    write(folder, "preprocessor_config.json", AUDIO)
    return net


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    save(folder)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a valid checkpoint, for tests that damage it."""
    monkeypatch.setenv("MOWA_CACHE", str(tmp_path / "mowa-cache"))
    return shutil.copytree(pristine, tmp_path / "model")


def pickled(folder: Path, rename: Callable[[str], str] = lambda name: name) -> Path:
    """Replace the safetensors of `folder` by a pickle, as in old checkpoints."""
    state = load_file(folder / "model.safetensors")
    torch.save({rename(name): tensor for name, tensor in state.items()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def reweigh(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


# checkpoints that load


@pytest.mark.parametrize("feat_extract_norm", ["group", "layer"])
@pytest.mark.parametrize("model_type", ["wav2vec2", "hubert", "wavlm"])
def test_the_loaded_net_equals_the_saved_one(tmp_path: Path, model_type: str, feat_extract_norm: str) -> None:
    saved = save(
        tmp_path, model_type, feat_extract_norm=feat_extract_norm, do_stable_layer_norm=feat_extract_norm == "layer"
    )
    model = load(str(tmp_path))
    assert model.family.name == model_type
    assert not model.net.training
    assert not any(parameter.requires_grad for parameter in model.net.parameters())
    loaded = model.net.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.state_dict().items())
    audio = torch.randn(2, 801)
    with torch.no_grad():
        torch.testing.assert_close(model.net(audio).logits, saved(audio).logits, rtol=0, atol=1e-6)
    assert len(model.vocabulary) == len(TOKENS)


def _rename(state: dict[str, torch.Tensor], rename: Callable[[str], str]) -> None:
    for name in list(state):
        state[rename(name)] = state.pop(name)


@pytest.mark.parametrize("pickle", [False, True], ids=["safetensors", "pickle"])
def test_weights_saved_from_a_wrapper_are_loaded(folder: Path, pickle: bool) -> None:
    expected = load_file(folder / "model.safetensors")
    reweigh(folder, lambda state: _rename(state, lambda name: f"module.{name}"))
    loaded = load(str(pickled(folder) if pickle else folder)).net.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_another_prefix_is_named(folder: Path) -> None:
    reweigh(folder, lambda state: _rename(state, lambda name: f"net.{name}" if "wav2vec2" in name else name))
    message = r"incomplete: (wav2vec2\.\S+) and \d+ more missing; they have net\.\1 instead: rename it"
    with pytest.raises(ModelError, match=message):
        load(str(folder))


@pytest.mark.parametrize("from_hub", [False, True])
def test_a_language_model_beside_a_checkpoint_is_mentioned(
    folder: Path, from_hub: bool, caplog: pytest.LogCaptureFixture
) -> None:
    load(str(folder))
    assert not caplog.records
    if from_hub:  # where only the audio settings name it
        change(folder, "preprocessor_config.json", processor_class="Wav2Vec2ProcessorWithLM")
    else:
        (folder / "language_model").mkdir()
    load(str(folder))
    assert caplog.messages == [f"{folder} comes with an n-gram language model, which is not used: decoding is greedy"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_net_has_the_requested_dtype(folder: Path, dtype: str) -> None:
    net = load(str(folder), dtype=dtype).net
    assert {parameter.dtype for parameter in net.parameters()} == {getattr(torch, dtype)}


def _old_name(name: str) -> str:
    """Return the name of a weight-norm parameter in torch < 2.0."""
    return name.replace("parametrizations.weight.original0", "weight_g").replace(
        "parametrizations.weight.original1", "weight_v"
    )


@pytest.mark.parametrize("rename", [str, _old_name], ids=["parametrizations", "weight_g"])
def test_a_pickle_loads_as_transformers_loads_it(folder: Path, rename: Callable[[str], str]) -> None:
    pickled(folder, rename)
    assert ("weight_g" in str(torch.load(folder / "pytorch_model.bin").keys())) == (rename is _old_name)
    theirs = AutoModelForCTC.from_pretrained(folder, use_safetensors=False).state_dict()
    ours = load(str(folder)).net.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_loading_prints_nothing_and_restores_the_settings(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    reweigh(folder, lambda state: state.update({"project_q.weight": torch.ones(3, 3)}))
    load(str(folder))
    assert capfd.readouterr() == ("", "")
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before


def test_weights_of_pretraining_are_ignored(folder: Path) -> None:
    reweigh(folder, lambda state: state.pop("wav2vec2.masked_spec_embed", None))
    reweigh(folder, lambda state: state.update({"quantizer.codevectors": torch.ones(1, 4, 2)}))
    load(str(folder))


def test_a_hub_model_is_loaded_at_its_commit(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(tmp_path / "hf", monkeypatch) as hub:
        commit = hub.publish("someone/tiny", pickled(folder, _old_name))
        model = load("someone/tiny@main")
        assert (model.origin.source, model.origin.revision) == ("someone/tiny", commit)
        hub.log.clear()
        again = load("someone/tiny", offline=True)
        assert not hub.log
    assert torch.equal(again.net.lm_head.weight, model.net.lm_head.weight)


# checkpoints that do not


def test_an_unknown_name() -> None:
    with pytest.raises(UnknownModel, match="did you mean 'polish'"):
        load("Polish")


def test_the_hub_is_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_client_at(NOWHERE, tmp_path, monkeypatch)
    with pytest.raises(HubUnreachable, match="download it once, or use a folder"):
        load("someone/tiny")


@pytest.mark.parametrize(
    ("architecture", "model_type", "message"),
    [
        (
            "WhisperForConditionalGeneration",
            "whisper",
            "'whisper'",
        ),
        ("BertForMaskedLM", "bert", r"is a model for embedding \(bert\), which mowa cannot load yet"),
        ("Wav2Vec2ForPreTraining", "wav2vec2", r"\(Wav2Vec2ForPreTraining\) has no CTC head: fine-tune it first"),
        ("HubertForSequenceClassification", "hubert", r"\(HubertForSequenceClassification\) has no CTC head"),
    ],
)
def test_unsupported_models_are_rejected_before_their_weights_are_downloaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, model_type: str, message: str
) -> None:
    change(folder, "config.json", architectures=[architecture], model_type=model_type)
    with pytest.raises(ModelError, match=message):
        load(str(folder))
    with running(tmp_path / "hf", monkeypatch) as hub:
        hub.publish("someone/other", folder)
        with pytest.raises(ModelError, match=message):
            load("someone/other")
        assert "model.safetensors" not in hub.downloads


def test_weights_without_a_head_are_rejected(tmp_path: Path) -> None:
    save(tmp_path)
    Wav2Vec2Model(AutoConfig.for_model("wav2vec2", **TINY)).save_pretrained(tmp_path)
    change(tmp_path, "config.json", architectures=None)
    with pytest.raises(ModelError, match=r"have no lm_head, so there is no CTC head: fine-tune it first"):
        load(str(tmp_path))


def _drop(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda state: [state.pop(key) for key in list(state) if key.startswith(name)]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            _drop("wav2vec2.encoder.layers.1.final_layer_norm.bias"),
            r"incomplete: wav2vec2\.encoder\.layers\.1\.final_layer_norm\.bias missing",
        ),
        (
            _drop("wav2vec2.encoder.layers.1."),
            r"incomplete: wav2vec2\.encoder\.layers\.1\..* and 15 more missing",
        ),
        (_drop("lm_head.bias"), r"incomplete: lm_head\.bias missing"),
        (
            lambda state: state.update({"lm_head.weight": torch.zeros(9, 32)}),
            r"lm_head\.weight in .* has shape \[9, 32\], but config\.json requires \[8, 32\]",
        ),
        (
            lambda state: state.update({"wav2vec2.encoder.layers.2.final_layer_norm.bias": torch.ones(32)}),
            r"do not match its config\.json: no parameter for wav2vec2\.encoder\.layers\.2\.final_layer_norm\.bias",
        ),
    ],
)
def test_weights_that_do_not_match_are_rejected(folder: Path, edit: Callable[..., Any], message: str) -> None:
    reweigh(folder, edit)
    with pytest.raises(ModelError, match=message) as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", "{", "config.json cannot be read"),
        ("config.json", "{}", "config.json has no model_type or architectures"),
        ("config.json", '{"model_type": "wav2vec2", "hidden_size": "many"}', "is not a valid wav2vec2 config"),
        ("config.json", '{"model_type": "wav2vec2", "conv_dim": [1]}', "is not a valid wav2vec2 config"),
        ("vocab.json", None, "has no vocab.json"),
        ("preprocessor_config.json", None, "has no preprocessor_config.json"),
        ("model.safetensors", None, "has no complete weights"),
        ("model.safetensors", "damaged", "the weights of .* are damaged"),
    ],
)
def test_missing_and_damaged_files_are_named(folder: Path, name: str, content: str | None, message: str) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(ModelError, match=message) as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "'float8' is not one of float32, bfloat16, float16"),
        ({"device": "abacus"}, "device 'abacus' cannot be used here .*: try cpu"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here .*: try cpu"),
    ],
)
def test_unknown_dtypes_and_devices(folder: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(str(folder), **options)
