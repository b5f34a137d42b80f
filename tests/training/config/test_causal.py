"""Causal recipes: parsing, and the errors for wrong keys and values."""

import dataclasses
from pathlib import Path

import pytest

from mowa.errors import RecipeError
from mowa.training.config import causal, ctc, dispatch, schema
from mowa.training.config.causal import CausalRecipe

RECIPES = Path(__file__).parents[3] / "recipes"
LEAST = {"model": "someone/chat", "task": "causal", "data": {"train": "chats.jsonl"}}


def test_the_task_selects_the_recipe_class():
    assert isinstance(dispatch.parse(LEAST, "here"), CausalRecipe)
    assert isinstance(dispatch.parse({"model": "pl-tiny", "data": {"train": "a.jsonl"}}, "here"), ctc.CTCRecipe)
    with pytest.raises(RecipeError, match="here: task: 'speech' is not one of ctc, causal"):
        dispatch.parse(LEAST | {"task": "speech"}, "here")


def test_a_written_recipe_is_read_back(tmp_path):
    recipe = causal.parse(LEAST | {"method": "top-3", "batch": {"tokens": 9000}}, "here")
    schema.write_yaml(recipe, tmp_path / "recipe.yaml")
    assert dispatch.read_recipe(tmp_path / "recipe.yaml") == recipe
    assert recipe.top_n == 3
    assert dispatch.read_recipe(tmp_path / "recipe.yaml", {"optimizer.max_steps": 7}).optimizer.max_steps == 7


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"method": "head"}, "method: 'head' is not one of lora, top-N, full"),
        ({"data": {"train": "a", "trian_on": "all"}}, "data: unknown key trian_on; did you mean train_on?"),
        ({"data": {"train": "a", "train_on": "answers"}}, "data: train_on: 'answers' is not a valid choice"),
        ({"batch": {"tokens": 1000}}, r"batch: tokens \(1000\) is less than data: max_length \(2048\)"),
        ({"batch": {"seconds": 40}}, "batch: unknown key seconds"),
        ({"optimizer": {"epochs": 0}}, "max_steps and epochs are both 0"),
        ({"optimizer": {"ema_decay": 0.9}}, "ema_decay is for task: ctc only"),
        ({"optimizer": {"head_lr_multiplier": 3}}, "head_lr_multiplier is for task: ctc only"),
        ({"data": {"train": [{"path": "a", "share": 0.5}]}}, "share is for task: ctc only"),
        ({"memory": {"activation_offload": True}}, "activation_offload needs optimizer: gradient_checkpointing"),
        ({"lora": {"target_modules": []}}, "lora: target_modules: empty"),
    ],
)
def test_errors(tree, message):
    with pytest.raises(RecipeError, match=message):
        causal.parse(LEAST | tree, "here")


def test_shared_sections_have_the_classes_of_ctc_recipes():
    shared = {field.name: field.type for field in dataclasses.fields(CausalRecipe)}
    theirs = {field.name: field.type for field in dataclasses.fields(ctc.CTCRecipe)}
    assert {name for name in shared if shared[name] == theirs.get(name)} >= {
        "lora",
        "optimizer",
        "monitors",
        "distributed",
    }


@pytest.mark.parametrize("name", ["chat-lora", "chat-cpu", "chat-small-gpu", "chat-big-gpu", "continue-text"])
def test_shipped_recipes_are_causal(name):
    assert isinstance(dispatch.read_recipe(RECIPES / f"{name}.yaml"), CausalRecipe)
