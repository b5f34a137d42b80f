"""A language model is loaded whole or not at all: every misfit is a line that says what it is."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import mowa
from mowa.errors import ModelError
from mowa.loading import causal, ctc
from mowa.types import LanguageModel
from tests.data.chat.tokenizers import tokenizer as made
from tests.training.causal import chats


@pytest.fixture
def folder(tmp_path):
    return chats.model(tmp_path / "base")


def test_it_says_what_transformers_says(folder):
    model = mowa.load(str(folder))
    assert isinstance(model, LanguageModel)
    assert model.family.name == "llama"
    ids = torch.tensor([model.tokenizer("how are you")["input_ids"]])
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.net(ids).logits, theirs(ids).logits)
    assert not any(weight.requires_grad for weight in model.net.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_is_held_as_asked(folder, dtype):
    assert mowa.load(str(folder), dtype=dtype).net.dtype == getattr(torch, dtype)


def test_a_language_model_is_none_that_hears_and_the_other_way_round(folder):
    with pytest.raises(ModelError, match="is a llama model, and reads text"):
        ctc.load(str(folder))
    with pytest.raises(ModelError, match="is a wav2vec2 model, which hears"):
        causal.load("pl-tiny")


def test_a_missing_weight_is_named(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight: the checkpoint is incomplete"):
        mowa.load(str(folder))


def test_the_tokenizer_of_another_model_is_refused(folder):
    larger = made("spaced")
    larger.add_tokens([f"<more{number}>" for number in range(500)])
    larger.save_pretrained(folder)
    with pytest.raises(ModelError, match="it is another model's, or tokens were added"):
        mowa.load(str(folder))


def test_a_vocabulary_that_was_resized_in_the_config_alone_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 8}))
    with pytest.raises(ModelError, match=r"has shape .* its config\.json asks for"):
        mowa.load(str(folder))


def test_more_rows_than_tokens_are_padding_and_fine(tmp_path):
    folder = chats.model(tmp_path / "base")
    net = AutoModelForCausalLM.from_pretrained(folder)
    net.resize_token_embeddings(net.config.vocab_size + 16)
    net.save_pretrained(folder)
    assert mowa.load(str(folder)).net.get_input_embeddings().num_embeddings == net.config.vocab_size


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("tokenizer.json", None, "has no tokenizer"),
        ("tokenizer.json", "{", "the tokenizer of .* cannot be read"),
        ("config.json", "{}", "names no model_type"),
        ("model.safetensors", "no weights", "are damaged"),
        ("model.safetensors", None, "has no complete weights"),
    ],
)
def test_what_is_missing_or_damaged_is_said(folder, file, content, said):
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    with pytest.raises(ModelError, match=said):
        mowa.load(str(folder))


@pytest.mark.parametrize(("name", "said"), [("./nowhere", "there is no folder"), ("no model", "no model is called")])
def test_a_name_that_nothing_answers_to(name, said):
    with pytest.raises(ModelError, match=said):
        mowa.load(name)
