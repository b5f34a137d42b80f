"""LoRA of experts, which are one tensor per block, by PEFT's `target_parameters`: trained, saved, loaded and merged."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import mowa
from mowa.errors import RecipeError
from mowa.exporters.merged import write_merged
from mowa.training.config import dispatch
from tests.tiny_causal import tiny_causal
from tests.training.causal import chats

IDS = torch.arange(3, 40)[None]


def train(folder, family, **overrides):
    tiny_causal(folder / "base", family)
    chats.conversations(folder / "chats.jsonl")
    dispatch.train(dispatch.parse(chats.recipe(folder, **overrides), "test"), folder / "out", threads=1)
    return folder / "out"


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT uses the old name
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_are_trained_saved_loaded_and_merged_as_in_peft(tmp_path, family):
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    out = train(tmp_path, family, lora__target_parameters=names, lora__target_modules=["attention"])
    config = json.loads((out / "adapter_config.json").read_text())
    assert sorted(config["target_parameters"]) == sorted(names)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), out).eval()
    updates = {name: value for name, value in theirs.named_parameters() if "experts" in name and "lora_B" in name}
    assert len(updates) >= 4
    assert all(value.any() for value in updates.values())
    with torch.inference_mode():
        expected = theirs(IDS).logits
        assert torch.allclose(mowa.load(out).net(IDS).logits, expected, atol=1e-5)
        write_merged(out, tmp_path / "merged", dtype="float32")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.allclose(merged(IDS).logits, expected, atol=1e-4)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        assert not torch.allclose(base(IDS).logits, expected, atol=1e-2)


def test_the_mlps_of_deepseek_are_not_taken_for_its_experts(tmp_path):
    """PEFT takes gate_proj, up_proj and down_proj for those of experts in checkpoints from before transformers 5."""
    out = train(tmp_path, "deepseek_v3", optimizer__max_steps=1)
    config = json.loads((out / "adapter_config.json").read_text())
    assert not config["target_parameters"]
    assert not {"gate_proj", "up_proj", "down_proj"} & set(config["target_modules"])
    write_merged(out, tmp_path / "merged", dtype="float32")
    with pytest.raises(RecipeError, match="PEFT takes down_proj, gate_proj, up_proj of deepseek_v3 for its experts"):
        train(tmp_path / "mlp", "deepseek_v3", lora__target_modules=["mlp"])


def test_dropout_on_experts_is_refused_before_the_run(tmp_path):
    with pytest.raises(RecipeError, match="supports neither dropout nor dora"):
        train(tmp_path, "qwen3_moe", lora__target_parameters=["experts.down_proj"], lora__dropout=0.1)
