"""Recipes for texts: the schema of recordings, with keys of their own; wrong ones are named, the right ones near."""

import dataclasses
from pathlib import Path

import pytest

from mowa.errors import RecipeError
from mowa.training.config import causal, ctc, dispatch, schema
from mowa.training.config.causal import CausalRecipe

RECIPES = Path(__file__).parents[2] / "recipes"
LEAST = {"model": "someone/chat", "task": "causal", "data": {"train": "chats.jsonl"}}


def test_a_recipe_is_what_its_task_says():
    assert isinstance(dispatch.parse(LEAST, "here"), CausalRecipe)
    assert isinstance(dispatch.parse({"model": "pl-tiny", "data": {"train": "a.jsonl"}}, "here"), ctc.CTCRecipe)
    with pytest.raises(RecipeError, match="here: task: 'speech' is none of ctc, causal"):
        dispatch.parse(LEAST | {"task": "speech"}, "here")


def test_what_is_written_is_read_again(tmp_path):
    plan = causal.parse(LEAST | {"train": "top-3", "batch": {"tokens": 9000}}, "here")
    schema.write_yaml(plan, tmp_path / "recipe.yaml")
    assert dispatch.read_recipe(tmp_path / "recipe.yaml") == plan
    assert plan.top_n == 3
    assert dispatch.read_recipe(tmp_path / "recipe.yaml", {"optimise.steps": 7}).optimizer.max_steps == 7


@pytest.mark.parametrize(
    ("turned", "said"),
    [
        ({"train": "head"}, "train: 'head' is none of lora, top-N, all"),
        ({"data": {"train": "a", "lern": "all"}}, "data: lern is no key here; did you mean learn?"),
        ({"data": {"train": "a", "learn": "answers"}}, "data: learn: 'answers' is none of them"),
        ({"batch": {"tokens": 1000}}, "batch: tokens is 1000 and data: length 2048"),
        ({"batch": {"seconds": 40}}, "batch: seconds is no key here"),
        ({"optimise": {"epochs": 0}}, "steps and epochs are both 0"),
        ({"optimise": {"ema": 0.9}}, "ema is for recordings"),
        ({"optimise": {"head_times": 3}}, "head_times is for recordings"),
        ({"data": {"train": [{"path": "a", "share": 0.5}]}}, "shares are for recordings"),
        ({"memory": {"offload": True}}, "offload is of use only with optimise: checkpointing"),
        ({"lora": {"where": []}}, "lora: where: at least one"),
    ],
)
def test_what_is_wrong_is_said(turned, said):
    with pytest.raises(RecipeError, match=said):
        causal.parse(LEAST | turned, "here")


def test_knobs_that_recordings_have_too_are_the_same_ones():
    shared = {field.name: field.type for field in dataclasses.fields(CausalRecipe)}
    theirs = {field.name: field.type for field in dataclasses.fields(ctc.CTCRecipe)}
    assert {name for name in shared if shared[name] == theirs.get(name)} >= {"lora", "optimise", "watch", "parallel"}


@pytest.mark.parametrize("name", ["chat-lora", "chat-cpu", "chat-small-gpu", "chat-big-gpu", "continue-text"])
def test_shipped_recipes_are_instructions(name):
    assert isinstance(dispatch.read_recipe(RECIPES / f"{name}.yaml"), CausalRecipe)
