"""Language models without a registry entry are trained, merged and used for generation."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

import mowa
from mowa.engines import generation
from mowa.engines.settings import GenerationSettings
from mowa.exporters.merged import write_merged
from mowa.models.causal import packing
from mowa.training.config import dispatch
from mowa.training.distributed import strategy
from tests.families.test_unregistered import unregistered
from tests.training.causal import chats

PACKED = {"gpt2": True, "opt": False, "mamba": False}  # OPT computes positions by itself, Mamba has a state


def train(folder, model_type, out="out", **overrides):
    if not (folder / "base").is_dir():
        unregistered(folder / "base", model_type)
        chats.conversations(folder / "chats.jsonl")
    dispatch.train(dispatch.parse(chats.recipe(folder, **overrides), "test"), folder / out, threads=1)
    return folder / out


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning", "ignore:fan_in_fan_out")  # of PEFT
@pytest.mark.parametrize("model_type", PACKED)
def test_lora_is_trained_merged_and_generates(tmp_path, model_type, capsys):
    out = train(tmp_path, model_type)
    shown = capsys.readouterr().err
    assert f"acceleration      –  {model_type}: it has no registry entry" in shown
    assert ("batches are padded" in shown) != PACKED[model_type]
    report = json.loads((out / "report.json").read_text())
    assert report["metrics"]["dev"]["loss"] < report["baseline_metrics"]["dev"]["loss"]
    write_merged(out, tmp_path / "merged", dtype="float32")
    model, merged = mowa.load(out), mowa.load(tmp_path / "merged")
    prompts = ["how are you", "what is this that and now then"]
    settings = GenerationSettings(max_new_tokens=6)
    together = [one.text for one in generation.generate(model, prompts, settings)]
    assert together == [generation.generate(model, [prompt], settings)[0].text for prompt in prompts]
    assert together == [one.text for one in generation.generate(merged, prompts, settings)]
    ids = torch.arange(3, 30)[None]
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), out).eval()
    assert torch.allclose(theirs(ids).logits, model.net(ids).logits, atol=1e-5)
    assert torch.allclose(theirs(ids).logits, merged.net(ids).logits, atol=1e-4)


def test_convolutions_are_no_experts_to_quantization(tmp_path):
    """The int8 checkpoint is compared with stock transformers when it is written."""
    unregistered(tmp_path / "base", "mamba")
    model = mowa.quantize(mowa.load(tmp_path / "base"), "int8-weight")
    mowa.export(model, "safetensors", tmp_path / "int8")
    ids = torch.arange(3, 30)[None]
    assert torch.equal(mowa.load(tmp_path / "int8").net(ids).logits, model.net(ids).logits)


@pytest.mark.parametrize("model_type", PACKED)
def test_the_precision_is_chosen_where_the_config_names_no_width_of_the_mlp(tmp_path, model_type):
    config = AutoConfig.from_pretrained(unregistered(tmp_path / "base", model_type))
    recipe = dispatch.parse(chats.recipe(tmp_path, optimizer__precision="auto"), "test")
    assert strategy.resolve_precision(recipe, config) in ("float32", "bf16")


def test_the_top_blocks_and_the_final_norm_are_trained(tmp_path):
    out = train(tmp_path, "opt", method="top-1")
    net, base = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, tmp_path / "base"))
    changed = {n for n, p in net.named_parameters() if not torch.equal(p, base.get_parameter(n))}
    assert all(".layers.1." in name or "decoder.final_layer_norm." in name for name in changed)
    assert "model.decoder.final_layer_norm.weight" in changed


def test_a_final_norm_of_another_name_is_trained(tmp_path):
    """Phi calls it final_layernorm."""
    chats.conversations(tmp_path / "chats.jsonl")
    from tests.tiny_causal import tiny_causal

    tiny_causal(tmp_path / "base", "phi")
    out = train(tmp_path, "phi", method="top-1")
    net, base = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, tmp_path / "base"))
    assert not torch.equal(net.model.final_layernorm.weight, base.model.final_layernorm.weight)


def test_packed_and_padded_runs_of_a_net_with_dropout_have_the_same_first_loss(tmp_path):
    """GPT-2 has dropout, which must not enter the comparison of packed and padded samples before the first step."""
    train(tmp_path, "gpt2", optimizer__max_steps=1)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert config["resid_pdrop"] == 0.1


def test_packing_is_tested_on_the_net(tmp_path):
    for model_type, expected in PACKED.items():
        net = AutoModelForCausalLM.from_pretrained(unregistered(tmp_path / model_type, model_type))
        assert packing.is_supported(net) == expected
        assert not net.training
    shutil.rmtree(tmp_path)


def test_experts_counted_under_another_name_are_trained(tmp_path):
    """TRL looks for `num_experts`, which Phi 3.5 MoE has not, and its loss of the router is left out."""
    unregistered(tmp_path / "base", "phimoe", num_local_experts=4, num_key_value_heads=2)
    chats.conversations(tmp_path / "chats.jsonl")
    assert (train(tmp_path, "phimoe", optimizer__max_steps=1) / "adapter_model.safetensors").is_file()
