"""What verbs must not change: loaded models, base models under adapters, folders of other models."""

import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import mowa
from mowa.adapters.loading import load_adapter
from tests.checkpoints import clip, corpus, tiny
from tests.tiny_causal import tiny_causal
from tests.training.causal import chats

STEPS = {"max_steps": 2, "eval_steps": 2, "precision": "float32", "threads": 1}
IDS = torch.arange(1, 12)[None]


def weights(model):
    return {name: value.clone() for name, value in model.net.state_dict().items()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
def test_transcribing_leaves_a_loaded_model_as_it_is(tmp_path, dtype):
    model = mowa.load(tiny(tmp_path / "net"))
    before = weights(model)
    first = mowa.open_engine(model, device="cpu", dtype="float32")
    (expected,) = first.emissions([clip(0, 9_000)])
    mowa.transcribe(clip(0, 9_000), model, sampling_rate=16_000, dtype=dtype, device="cpu", vad_threshold=0)
    assert same(weights(model), before)
    assert (first.emissions([clip(0, 9_000)])[0] == expected).all()


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return tiny_causal(tmp_path_factory.mktemp("causal") / "base")


def save_peft(folder, base, **options):
    """An adapter that PEFT trained nothing of and saved, with random weights."""
    net = mowa.load(base).net
    wrapped = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_" in name or (options.get("bias") == "all" and name.endswith(".bias")):
                value.normal_()
    wrapped.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"bias": "all"}, {"init_lora_weights": "pissa"}])
def test_an_adapter_of_peft_leaves_its_base_as_it_is(tmp_path, causal, options):
    folder = save_peft(tmp_path / "adapter", causal, **options)
    base = mowa.load(causal)
    before = base.net(IDS).logits
    first = load_adapter(base, folder).net(IDS).logits
    again = load_adapter(base, folder).net(IDS).logits
    assert torch.equal(base.net(IDS).logits, before)
    assert torch.equal(first, again)
    assert not torch.equal(first, before)


@pytest.mark.filterwarnings("ignore")
def test_tensors_that_peft_would_ignore_are_an_error(tmp_path, causal):
    folder = save_peft(tmp_path / "adapter", causal)
    tensors = load_file(folder / "adapter_model.safetensors")
    fewer = {name: value for name, value in tensors.items() if "lora_B" not in name}
    save_file(fewer, folder / "adapter_model.safetensors")
    with pytest.raises(mowa.ModelError, match=r"lora_B\S* is missing"):
        mowa.load(causal, adapter=folder)
    more = {f"other.{name}": value.clone() for name, value in tensors.items()} | tensors
    save_file(more, folder / "adapter_model.safetensors")
    with pytest.raises(mowa.ModelError, match="is unexpected"):
        mowa.load(causal, adapter=folder)
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(mowa.ModelError, match="does not fit"):
        mowa.load(causal, adapter=folder)


def test_a_run_does_not_mix_with_another_model(tmp_path):
    base, data = tiny(tmp_path / "net", conv_dim=(8,) * 7, intermediate_size=32), corpus(tmp_path / "corpus", 8)
    options = {"model": base, "data": data, "dev": data, "out": tmp_path / "out"} | STEPS
    mowa.train(method="head", **options)
    shutil.rmtree(tmp_path / "out" / "run")
    with pytest.raises(mowa.RecipeError, match=r"holds another model \(config.json, "):
        mowa.train(method="lora", **options)
    assert mowa.load(tmp_path / "out").task == "ctc"


def test_a_loaded_model_is_trained_once(tmp_path):
    base, data = chats.model(tmp_path / "base"), chats.conversations(tmp_path / "chats.jsonl")
    model = mowa.load(base)
    options = {"model": model, "data": data, "dev": data, "method": "full"} | STEPS
    mowa.train(out=tmp_path / "one", **options)
    with pytest.raises(mowa.RecipeError, match="was trained in this process already"):
        mowa.train(out=tmp_path / "two", **options)
