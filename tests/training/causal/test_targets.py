"""Which layers of nets with experts get LoRA, and which models a run cannot start from."""

import json

import pytest

import mowa
from mowa.adapters import lora
from mowa.errors import ModelError, RecipeError
from mowa.families import get_family, list_families
from mowa.training.config import dispatch
from tests.families.tiny import tiny
from tests.tiny_causal import tiny_causal
from tests.training.causal import chats

ALL_EXPERTS = ("mixtral", "qwen3_moe", "granitemoe", "gpt_oss")  # no MLP beside the experts
OPTIONS = {"rank": 2, "alpha": 4, "dropout": 0.0, "variant": "lora"}


def targets(family, *groups):
    net = lora.get_peft_model(tiny(family), get_family(family), target_modules=groups, **OPTIONS)
    return {name.rpartition(".lora_A")[0].rpartition(".")[2] for name, _ in net.named_parameters() if ".lora_A" in name}


@pytest.mark.parametrize("family", ALL_EXPERTS)
def test_attention_and_mlp_is_attention_where_the_mlps_are_experts(family):
    assert (
        targets(family, "attention", "mlp") == targets(family, "all-linear") == {"q_proj", "k_proj", "v_proj", "o_proj"}
    )
    with pytest.raises(
        RecipeError, match=r"target_modules: mlp: experts are .*; use \[all-linear\], which is attention of"
    ):
        targets(family, "mlp")


def test_every_family_trains_with_the_target_modules_of_the_recipes():
    for family in list_families():
        if family.task == "causal":
            assert lora.lora_config(family, target_modules=("all-linear",), **OPTIONS).target_modules, family.name


def test_a_run_says_that_experts_get_no_lora(tmp_path, capsys):
    tiny_causal(tmp_path / "base", "qwen3_moe")
    chats.conversations(tmp_path / "chats.jsonl")
    tree = chats.recipe(tmp_path, optimizer__max_steps=1, optimizer__epochs=3)
    dispatch.train(dispatch.parse(tree, "test"), tmp_path / "out", threads=1)
    printed = capsys.readouterr().err
    assert (
        "lora: experts are one tensor per block, not linear layers: they get no LoRA without target_parameters"
        in printed
    )
    assert "1 steps (max_steps is set: epochs is not used) over" in printed


def test_a_run_does_not_start_from_a_model_merged_in_memory(tmp_path):
    tree = chats.recipe(tmp_path, optimizer__max_steps=1)
    out = dispatch.train(dispatch.parse(tree, "test"), tmp_path / "out", threads=1)
    merged = mowa.merge(mowa.load(str(out)))
    message = rf"was merged in memory, and a run starts from files: write it with mowa.merge\('{out}', out=FOLDER\)"
    with pytest.raises(ModelError, match=message):
        mowa.train(model=merged, data=str(tmp_path / "chats.jsonl"), out=tmp_path / "again")
    mowa.merge(str(out), out=tmp_path / "merged")
    again = mowa.train(tree, model=tmp_path / "merged", out=tmp_path / "again")
    assert json.loads((tmp_path / "again" / "report.json").read_text())["model"] == str(tmp_path / "merged")
    assert again


def test_a_run_does_not_start_from_a_quantized_model(tmp_path):
    tree = chats.recipe(tmp_path, optimizer__max_steps=1)
    quantized = mowa.quantize(mowa.load(tree["model"]), "int8")
    with pytest.raises(RecipeError, match=r"is quantized .* and cannot be fine-tuned; start from the full-precision"):
        mowa.train(tree, model=quantized, out=tmp_path / "out")
