"""A checkpoint to a Model: the same numbers as transformers, and a plain word for everything that does not fit."""

from __future__ import annotations

import json
import logging
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
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    Wav2Vec2Processor,
)
from transformers.utils import logging as chatter

from mowa.errors import HubUnreachable, ModelError, UnknownModel
from mowa.io import hub as files
from mowa.loading import load, read_preprocessing, read_vocabulary
from tests.checkpoints import SMALLEST
from tests.hub import NOWHERE, point_client_at, running

TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "|", "a", "ą", "ź")
TINY = SMALLEST | {"vocab_size": len(TOKENS), "pad_token_id": 0}
AUDIO = {"sampling_rate": 16_000, "do_normalize": True, "return_attention_mask": True, "padding_value": 0.0}


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def change(folder: Path, name: str, **values: Any) -> None:
    """Set keys of a JSON file; a key set to None is taken out."""
    data = json.loads((folder / name).read_text(encoding="utf-8")) | values
    write(folder, name, {key: value for key, value in data.items() if value is not None})


def save(folder: Path, model_type: str = "wav2vec2", **config: Any) -> torch.nn.Module:
    """A tiny random model as the hub holds them: net, vocab.json, preprocessor_config.json, tokenizer's files."""
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
    """A copy of a good checkpoint, to be spoilt."""
    monkeypatch.setenv("MOWA_CACHE", str(tmp_path / "mowa-cache"))
    return shutil.copytree(pristine, tmp_path / "model")


def pickled(folder: Path, rename: Callable[[str], str] = lambda name: name) -> Path:
    """Turn the safetensors of `folder` into the pickle that old checkpoints have."""
    state = load_file(folder / "model.safetensors")
    torch.save({rename(name): tensor for name, tensor in state.items()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def reweigh(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


# what loads


@pytest.mark.parametrize("front", ["group", "layer"])
@pytest.mark.parametrize("model_type", ["wav2vec2", "hubert", "wavlm"])
def test_the_net_is_the_one_that_was_saved(tmp_path: Path, model_type: str, front: str) -> None:
    saved = save(tmp_path, model_type, feat_extract_norm=front, do_stable_layer_norm=front == "layer")
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_the_one_asked_for(folder: Path, dtype: str) -> None:
    net = load(str(folder), dtype=dtype).net
    assert {parameter.dtype for parameter in net.parameters()} == {getattr(torch, dtype)}


def _old_name(name: str) -> str:
    """As torch < 2.0 named what weight norm keeps."""
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


def test_loading_says_nothing_and_leaves_the_settings(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    reweigh(folder, lambda state: state.update({"project_q.weight": torch.ones(3, 3)}))
    load(str(folder))
    assert capfd.readouterr() == ("", "")
    assert (chatter.get_verbosity(), chatter.is_progress_bar_enabled()) == before


def test_what_pretraining_left_behind_is_harmless(folder: Path) -> None:
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


# what does not


def test_a_name_that_is_nothing() -> None:
    with pytest.raises(UnknownModel, match="did you mean 'polish'"):
        load("Polish")


def test_the_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_client_at(NOWHERE, tmp_path, monkeypatch)
    with pytest.raises(HubUnreachable, match="connect once, or name a folder"):
        load("someone/tiny")


@pytest.mark.parametrize(
    ("architecture", "model_type", "message"),
    [
        (
            "WhisperForConditionalGeneration",
            "whisper",
            "does not know the model type 'whisper': known are bert",
        ),
        ("BertForMaskedLM", "bert", "is a bert model, which is for embedding: name a causal language model"),
        ("Wav2Vec2ForPreTraining", "wav2vec2", "is a Wav2Vec2ForPreTraining, which has no CTC head: fine-tune one"),
        ("HubertForSequenceClassification", "hubert", "is a HubertForSequenceClassification, which has no CTC head"),
    ],
)
def test_another_kind_of_model_is_refused_before_its_weights_come(
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


def test_a_net_without_a_head_is_refused_by_its_weights(tmp_path: Path) -> None:
    save(tmp_path)
    Wav2Vec2Model(AutoConfig.for_model("wav2vec2", **TINY)).save_pretrained(tmp_path)
    change(tmp_path, "config.json", architectures=None)
    with pytest.raises(ModelError, match=r"hold no lm_head, so it has no CTC head: fine-tune one"):
        load(str(tmp_path))


def _drop(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda state: [state.pop(key) for key in list(state) if key.startswith(name)]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            _drop("wav2vec2.encoder.layers.1.final_layer_norm.bias"),
            r"lack wav2vec2\.encoder\.layers\.1\.final_",
        ),
        (
            _drop("wav2vec2.encoder.layers.1."),
            r"lack wav2vec2\.encoder\.layers\.1\..* and 15 more: the checkpoint",
        ),
        (_drop("lm_head.bias"), r"lack lm_head\.bias"),
        (
            lambda state: state.update({"lm_head.weight": torch.zeros(9, 32)}),
            r"lm_head\.weight in .* has shape \[9, 32\], its config\.json asks for \[8, 32\]",
        ),
        (
            lambda state: state.update({"wav2vec2.encoder.layers.2.final_layer_norm.bias": torch.ones(32)}),
            r"has no place for its weights wav2vec2\.encoder\.layers\.2\.final_layer_norm\.bias",
        ),
    ],
)
def test_weights_that_do_not_fit_are_never_made_up(folder: Path, edit: Callable[..., Any], message: str) -> None:
    reweigh(folder, edit)
    with pytest.raises(ModelError, match=message) as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", "{", "config.json cannot be read"),
        ("config.json", "{}", "names no model_type, so it is not a transformers checkpoint"),
        ("config.json", '{"model_type": "wav2vec2", "hidden_size": "many"}', "does not describe a wav2vec2 model"),
        ("config.json", '{"model_type": "wav2vec2", "conv_dim": [1]}', "does not describe a wav2vec2 model"),
        ("vocab.json", None, "has no vocab.json"),
        ("preprocessor_config.json", None, "has no preprocessor_config.json"),
        ("model.safetensors", None, "has no complete weights"),
        ("model.safetensors", "rubbish", "the weights of .* are damaged"),
    ],
)
def test_a_file_that_is_missing_or_damaged_is_named(folder: Path, name: str, content: str | None, message: str) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(ModelError, match=message) as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"dtype": "float8"}, "'float8' is not one of float32, bfloat16, float16"),
        ({"device": "abacus"}, "device 'abacus' cannot be used here .*: try cpu"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here .*: try cpu"),
    ],
)
def test_a_wish_that_cannot_be_granted(folder: Path, wish: dict[str, str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(str(folder), **wish)


# vocabulary


def test_the_vocabulary_says_what_each_output_means(folder: Path) -> None:
    vocab = read_vocabulary(folder, len(TOKENS))
    assert vocab.tokens == TOKENS
    assert (vocab.blank, vocab.delimiter, vocab.specials) == (0, 4, {1, 2, 3})


def test_names_of_specials_are_read_not_known(folder: Path) -> None:
    names = {"<pad>": "[PAD]", "<unk>": "[UNK]", "<s>": "^", "|": "_"}
    write(folder, "vocab.json", {names.get(token, token): id for id, token in enumerate(reversed(TOKENS))})
    change(folder, "config.json", pad_token_id=None)
    change(folder, "tokenizer_config.json", pad_token={"content": "[PAD]"}, word_delimiter_token="_")
    write(folder, "special_tokens_map.json", {"unk_token": {"content": "[UNK]"}, "bos_token": "^"})
    vocab = read_vocabulary(folder, 8)
    assert (vocab.blank, vocab.delimiter, vocab.specials) == (7, 3, {4, 5, 6})


def test_what_transformers_writes_today_is_read(tmp_path: Path) -> None:
    save(tmp_path)
    tokenizer = Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
    extractor = Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json"):
        (tmp_path / name).unlink()
    Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer).save_pretrained(tmp_path)
    vocab = read_vocabulary(tmp_path, len(TOKENS))
    assert (vocab.tokens, vocab.blank, vocab.delimiter, vocab.specials) == (TOKENS, 0, 4, {1, 2, 3})
    assert read_preprocessing(tmp_path).normalize is False
    assert read_preprocessing(tmp_path).attention_mask is True


def test_added_tokens_count_up_to_the_head(folder: Path) -> None:
    """Old fine-tunes have <s> and </s> beside vocab.json; some heads were made before they were added."""
    bare = [token for token in TOKENS if token not in ("<s>", "</s>")]
    write(folder, "vocab.json", {token: id for id, token in enumerate(bare)})
    write(folder, "added_tokens.json", {"<s>": 6, "</s>": 7})
    vocab = read_vocabulary(folder, 8)
    assert vocab.tokens == (*bare, "<s>", "</s>")
    assert vocab.specials == {1, 6, 7}
    assert read_vocabulary(folder, 6).tokens == tuple(bare)
    (folder / "added_tokens.json").unlink()
    decoder = {"6": {"content": "<s>", "special": True}, "7": {"content": "[NOISE]", "special": True}}
    change(folder, "tokenizer_config.json", added_tokens_decoder=decoder)
    assert read_vocabulary(folder, 8).specials == {1, 6, 7}


def test_where_config_and_tokenizer_disagree_the_loss_decides(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(folder, "config.json", pad_token_id=3)
    with caplog.at_level(logging.WARNING, "mowa"):
        vocab = read_vocabulary(folder, 8)
    assert (vocab.blank, vocab.specials) == (3, {0, 1, 2})
    assert "pads with id 0, the CTC loss with 3: blank is 3" in caplog.text


@pytest.mark.parametrize("size", [1, 7, 9, 4097])
def test_a_vocabulary_of_another_size_is_refused(folder: Path, size: int) -> None:
    with pytest.raises(ModelError, match=f"has 8 tokens and its head {size} outputs"):
        read_vocabulary(folder, size)


@pytest.mark.parametrize(
    ("vocab", "pad", "message"),
    [
        ({"<pad>": 0, "a": 1, "b": 1}, 0, "are not 0 to 2, each once"),
        ({"<pad>": 0, "a": 1, "b": 3}, 0, "are not 0 to 2, each once"),
        ({"a": 0, "b": 1, "c": 2}, None, "names no blank within its 3 outputs: config.json pad_token_id is None"),
        ({"a": 0, "b": 1, "c": 2}, 3, "names no blank within its 3 outputs: config.json pad_token_id is 3"),
    ],
)
def test_a_vocabulary_that_is_none(folder: Path, vocab: dict[str, int], pad: int | None, message: str) -> None:
    write(folder, "vocab.json", vocab)
    change(folder, "config.json", pad_token_id=pad)
    with pytest.raises(ModelError, match=message):
        read_vocabulary(folder, 3)


def test_many_languages_need_a_target(folder: Path) -> None:
    pol = {token: id for id, token in enumerate(TOKENS)}
    write(folder, "vocab.json", {"eng": {"<pad>": 0}, "pol": pol})
    with pytest.raises(ModelError, match=r"holds 2 languages \(eng, pol, …\) and the target_lang of .* is None"):
        read_vocabulary(folder, 8)
    change(folder, "tokenizer_config.json", target_lang="pol")
    assert read_vocabulary(folder, 8).tokens == TOKENS


# preprocessing


def test_audio_settings_are_read(folder: Path) -> None:
    write(folder, "preprocessor_config.json", {"sampling_rate": 8000, "do_normalize": False, "padding_value": 1.0})
    settings = read_preprocessing(folder)
    assert (settings.rate_hz, settings.normalize, settings.attention_mask, settings.padding_value) == (
        8000,
        False,
        False,
        1.0,
    )


@pytest.mark.parametrize("key", ["do_normalize", "sampling_rate"])
def test_audio_settings_are_never_assumed(folder: Path, key: str) -> None:
    change(folder, "preprocessor_config.json", **{key: None})
    with pytest.raises(ModelError, match=f"preprocessor_config.json does not say {key}"):
        read_preprocessing(folder)


def test_aliases_are_folders_of_ours_or_hub_ids() -> None:
    for target in files.MODEL_ALIASES.values():
        assert isinstance(target, Path) or target.count("/") == 1
