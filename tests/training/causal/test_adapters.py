"""A folder that PEFT alone wrote is a model: it is trained further, merged, generated with and evaluated."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import mowa
from mowa.engines import generation
from mowa.engines.settings import GenerationSettings
from mowa.training.config import dispatch
from tests.training.causal import chats

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT uses the old name


@pytest.fixture
def adapter(tmp_path):
    """An adapter with random weights, and the base's config.json beside it, as some trainers write it."""
    recipe = chats.recipe(tmp_path)
    net = AutoModelForCausalLM.from_pretrained(recipe["model"])
    torch.manual_seed(0)
    net = get_peft_model(net, LoraConfig(r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for weight in net.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    net.save_pretrained(tmp_path / "adapter")
    net.config.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def train(adapter, out, **overrides):
    recipe = dispatch.parse(chats.recipe(adapter.parent, **overrides) | {"model": str(adapter)}, "test")
    dispatch.train(recipe, adapter.parent / out, threads=1)
    return adapter.parent / out


def stock(base, adapter):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


def test_its_lora_is_trained_further(adapter, capsys):
    out = train(adapter, "further")
    assert "is trained further, with its own rank, alpha and targets" in capsys.readouterr().err
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], sorted(config["target_modules"])) == (3, ["down_proj", "q_proj"])
    report = json.loads((out / "report.json").read_text())
    assert report["metrics"]["dev"]["loss"] < report["baseline_metrics"]["dev"]["loss"]
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, out))
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    ids = torch.arange(3, 40)[None]
    assert torch.allclose(mowa.load(out).net(ids).logits, stock(adapter.parent / "base", out)(ids).logits, atol=1e-5)


@pytest.mark.parametrize("saved", [True, False], ids=["with a tokenizer", "alone"])
def test_its_chat_template_is_used(adapter, saved):
    base = mowa.load(adapter.parent / "base")
    own = AutoTokenizer.from_pretrained(adapter.parent / "base")
    own.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    own.save_pretrained(adapter) if saved else (adapter / "chat_template.jinja").write_text(own.chat_template)
    assert mowa.load(adapter).tokenizer.chat_template == own.chat_template != base.tokenizer.chat_template


def test_it_is_merged_before_a_full_training(adapter):
    out = train(adapter, "full", method="full", optimizer__max_steps=1, optimizer__learning_rate=1e-9)
    ids = torch.arange(3, 40)[None]
    expected = stock(adapter.parent / "base", adapter)(ids).logits
    assert torch.allclose(AutoModelForCausalLM.from_pretrained(out)(ids).logits, expected, atol=1e-3)


def test_it_generates_and_merges(adapter, tmp_path):
    model = mowa.load(adapter)
    theirs, tokenizer = stock(adapter.parent / "base", adapter), AutoTokenizer.from_pretrained(adapter.parent / "base")
    ids = tokenizer("how are you", return_tensors="pt")
    expected = theirs.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids["input_ids"].shape[1] :]
    answer = generation.generate(model, ["how are you"], GenerationSettings(max_new_tokens=8), chat=False)[0]
    assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)
    mowa.merge(adapter, out=tmp_path / "merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(merged(**ids).logits, theirs(**ids).logits, atol=1e-4)
