"""Tokens are added, and embeddings and head trained beside LoRA: saved, loaded, merged, and the same in plain PEFT."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import mowa
from mowa.errors import RecipeError
from mowa.exporters.merged import write_merged
from mowa.training.config import dispatch
from tests.tiny_causal import tiny_causal
from tests.training.causal import chats

pytestmark = pytest.mark.filterwarnings(  # PEFT uses the old name, and warns of tied layers that it unties
    "ignore:.is_gradient_checkpointing:FutureWarning", "ignore:Model has .tie_word_embeddings"
)
NEW = ("<|city|>", "<|end_city|>")
IDS = torch.arange(3, 40)[None]


def train(folder, out="out", *, tied=False, family="llama", **overrides):
    if not (folder / "base").is_dir():
        tiny_causal(folder / "base", family, tie_word_embeddings=tied)
        rows = [json.loads(row) for row in chats.conversations(folder / "chats.jsonl").read_text().splitlines()]
        for row in rows:
            row["messages"][-1]["content"] = f"{NEW[0]}{row['messages'][-1]['content']}{NEW[1]}"
        (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dispatch.train(dispatch.parse(chats.recipe(folder, **overrides), "test"), folder / out, threads=1)
    return folder / out


def plain_peft(base, adapter, rows=None):
    net = AutoModelForCausalLM.from_pretrained(base)
    if rows:
        net.resize_token_embeddings(rows, mean_resizing=False)
    return PeftModel.from_pretrained(net, adapter).eval()


def logits(net, ids=IDS):
    with torch.inference_mode():
        return net(ids).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("modules", [(), ("embed_tokens", "lm_head")])
def test_added_tokens_are_trained_saved_loaded_and_merged(tmp_path, tied, modules):
    out = train(tmp_path, tied=tied, data__add_tokens=list(NEW), lora__modules_to_save=list(modules))
    tokenizer, base = AutoTokenizer.from_pretrained(out), mowa.load(tmp_path / "base")
    new = tokenizer.convert_tokens_to_ids(list(NEW))
    assert new == [len(base.tokenizer), len(base.tokenizer) + 1]
    assert tokenizer("<|city|>Warsaw")["input_ids"][0] == new[0]
    ids = torch.cat([IDS, torch.tensor([new])], dim=1)
    theirs = plain_peft(tmp_path / "base", out, len(tokenizer))
    model = mowa.load(out)
    assert model.tokenizer.convert_tokens_to_ids(list(NEW)) == new
    assert torch.allclose(logits(model.net, ids), logits(theirs, ids), atol=1e-5)
    assert base.net.get_input_embeddings().num_embeddings == new[0]  # the base does not change
    write_merged(out, tmp_path / "merged", dtype="float32")
    net, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()), info
    assert (net.lm_head.weight is net.model.embed_tokens.weight) == tied
    assert torch.allclose(logits(net, ids), logits(theirs, ids), atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").convert_tokens_to_ids(list(NEW)) == new
    assert torch.equal(logits(base.net), logits(mowa.load(tmp_path / "base").net))


def test_rows_of_other_tokens_do_not_change(tmp_path):
    out = train(tmp_path, data__add_tokens=list(NEW))
    write_merged(out, tmp_path / "merged", dtype="float32")
    net, base = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("merged", "base"))
    for part in ("model.embed_tokens", "lm_head"):
        before, after = base.get_parameter(f"{part}.weight"), net.get_parameter(f"{part}.weight")
        assert torch.equal(after[: len(before)], before)
    delta = [
        value for name, value in load_file(out / "adapter_model.safetensors").items() if "trainable_tokens" in name
    ]
    assert [value.shape[0] for value in delta] == [2, 2]


def test_a_full_training_adds_tokens(tmp_path):
    out = train(tmp_path, method="full", data__add_tokens=list(NEW))
    model = mowa.load(out)
    assert (
        model.net.get_input_embeddings().num_embeddings
        == len(model.tokenizer)
        == len(mowa.load(tmp_path / "base").tokenizer) + 2
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [5, 9]},
        {"resized": 24},
    ],
    ids=str,
)
def test_an_adapter_that_peft_wrote_is_loaded_and_merged(tmp_path, tied, options):
    options = dict(options)
    base = tiny_causal(tmp_path / "base", tie_word_embeddings=tied)
    net = AutoModelForCausalLM.from_pretrained(base)
    rows = net.config.vocab_size + options.pop("resized", 0)
    net.resize_token_embeddings(rows, mean_resizing=False)
    torch.manual_seed(0)
    net = get_peft_model(net, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for weight in net.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    resized = rows != AutoModelForCausalLM.from_pretrained(base).config.vocab_size
    net.save_pretrained(tmp_path / "adapter", save_embedding_layers=resized)
    model = mowa.load(base, adapter=tmp_path / "adapter")
    ids = torch.cat([IDS, torch.tensor([[5, 9, rows - 1]])], dim=1)
    expected = logits(net.eval(), ids)
    assert torch.allclose(logits(model.net, ids), expected, atol=1e-5)
    write_merged(tmp_path / "adapter", tmp_path / "merged", base_model=str(base), dtype="float32")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), ids), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lora__modules_to_save": ["embed"]}, "modules_to_save: the model has no module 'embed'"),
        ({"lora__target_parameters": ["experts.up"]}, "target_parameters: the model has no parameter 'experts.up'"),
        ({"method": "top-1", "data__add_tokens": ["<a>"]}, "add_tokens: method top-1 trains no embeddings"),
    ],
)
def test_what_cannot_be_trained_is_named(tmp_path, overrides, message):
    with pytest.raises(RecipeError, match=message):
        train(tmp_path, **overrides)
