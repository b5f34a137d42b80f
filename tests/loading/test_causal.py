"""Language models are loaded completely; every mismatch is an error."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import mowa
from mowa.errors import ModelError
from mowa.loading import causal, ctc
from tests.data.chat.tokenizers import tokenizer as make_tokenizer
from tests.training.causal import chats


@pytest.fixture
def folder(tmp_path):
    return chats.model(tmp_path / "base")


def test_logits_equal_those_of_transformers(folder):
    model = mowa.load(str(folder))
    assert model.task == "causal"
    assert model.family.name == "llama"
    ids = torch.tensor([model.tokenizer("how are you")["input_ids"]])
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.net(ids).logits, theirs(ids).logits)
    assert not any(weight.requires_grad for weight in model.net.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_net_has_the_requested_dtype(folder, dtype):
    assert mowa.load(str(folder), dtype=dtype).net.dtype == getattr(torch, dtype)


def test_speech_and_language_models_are_not_interchangeable(folder):
    with pytest.raises(ModelError, match=r"is not a speech model \(llama\)"):
        ctc.load(str(folder))
    with pytest.raises(ModelError, match=r"is a speech model \(wav2vec2\); a language model is needed here"):
        causal.load("pl-tiny")


def test_a_missing_weight_is_named(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"are incomplete: model\.layers\.1\.mlp\.up_proj\.weight missing"):
        mowa.load(str(folder))


def test_the_tokenizer_of_another_model_is_rejected(folder):
    larger = make_tokenizer("spaced")
    larger.add_tokens([f"<more{number}>" for number in range(500)])
    larger.save_pretrained(folder)
    with pytest.raises(ModelError, match="belongs to another model, or tokens were added"):
        mowa.load(str(folder))


def test_a_vocabulary_resized_only_in_the_config_is_rejected(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 8}))
    with pytest.raises(ModelError, match=r"has shape .* but config\.json requires"):
        mowa.load(str(folder))


def test_more_embeddings_than_tokens_are_accepted(tmp_path):
    folder = chats.model(tmp_path / "base")
    net = AutoModelForCausalLM.from_pretrained(folder)
    net.resize_token_embeddings(net.config.vocab_size + 16)
    net.save_pretrained(folder)
    assert mowa.load(str(folder)).net.get_input_embeddings().num_embeddings == net.config.vocab_size


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "has no tokenizer"),
        ("tokenizer.json", "{", "the tokenizer of .* cannot be read"),
        ("config.json", "{}", "has no model_type"),
        ("model.safetensors", "no weights", "are damaged"),
        ("model.safetensors", None, "has no complete weights"),
    ],
)
def test_missing_and_damaged_files_are_named(folder, file, content, message):
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    with pytest.raises(ModelError, match=message):
        mowa.load(str(folder))


@pytest.mark.parametrize(("name", "message"), [("./nowhere", "does not exist"), ("no model", "unknown model")])
def test_unknown_names(name, message):
    with pytest.raises(ModelError, match=message):
        mowa.load(name)
