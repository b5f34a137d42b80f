"""The recipe of fine-tuning: YAML and Python say the same, and every wrong key or value is named."""

from dataclasses import replace
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings

from mowa.data.audio.augment import AugmentConfig
from mowa.errors import RecipeError
from mowa.training.config import ctc, schema
from mowa.training.config.ctc import CTCRecipe, DataSource
from tests.data.chat.templates import LEAVES, another, trees

RECIPES = Path(__file__).parents[2] / "recipes"
STORIES = ("head", "adapters", "lora", "top-layers", "full", "new-language", "continue", "qat")
LEAST = {"model": "m", "data": {"train": "a.jsonl"}}


def at(plan, leaf):
    return reduce(getattr, leaf.path, plan)


def checked(**turns):
    return ctc.parse(schema.apply_overrides(LEAST, turns), "r")


@settings(max_examples=20, deadline=None)
@given(trees())
def test_round_trip(tmp_path_factory, turns):
    plan = ctc.parse(schema.apply_overrides({}, turns), "drawn")
    written = yaml.safe_load(schema.to_yaml(plan))
    for leaf in LEAVES:
        assert reduce(getitem, leaf.path, written) == turns[leaf.dotted]
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    schema.write_yaml(plan, path)
    assert ctc.read_recipe(path) == plan


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.dotted)
def test_a_wrong_key_is_named_by_its_path_with_the_right_one(leaf):
    *groups, key = leaf.path
    with pytest.raises(RecipeError) as wrong:
        checked(**{".".join([*groups, f"{key}x"]): 1})
    assert str(wrong.value) == f"{': '.join(['r', *groups])}: {key}x is no key here; did you mean {key}?"


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.dotted)
def test_a_value_of_another_kind_is_named_by_its_path(leaf):
    with pytest.raises(RecipeError, match=f"^r: {': '.join(leaf.path)}"):
        checked(**{leaf.dotted: [[]]})


@pytest.mark.parametrize("leaf", [leaf for leaf in LEAVES if leaf.minimum is not None], ids=lambda leaf: leaf.dotted)
def test_ranges(leaf):
    pair = isinstance(leaf.default, tuple)
    beyond = [leaf.least - 1] + ([leaf.most + 1] if leaf.most is not None else [])
    for value in beyond:
        with pytest.raises(RecipeError, match=f"^r: {': '.join(leaf.path)} is .*it must be at "):
            checked(**{leaf.dotted: [value, value] if pair else value})


@pytest.mark.parametrize("leaf", [leaf for leaf in LEAVES if leaf.dotted != "task"], ids=lambda leaf: leaf.dotted)
def test_every_default_is_allowed_and_every_knob_turns(leaf):
    value = another(leaf)
    before = checked()
    after = checked(**{leaf.dotted: value})
    assert at(after, leaf) != at(before, leaf)
    assert {one.dotted for one in LEAVES if at(after, one) != at(before, one)} == {leaf.dotted}


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        ({"train": "top-N"}, "train: 'top-N' is none of head, adapters, lora, top-N"),
        ({"train": "top-0"}, "train: 'top-0' is none of"),
        ({"train": "everything"}, "train: 'everything' is none of"),
        ({"optimise.warmup": 0.7, "optimise.hold": 0.4}, "optimise: warmup and hold"),
        ({"optimise.epochs": 0}, "optimise: steps and epochs are both 0"),
        ({"data.longest_s": 0.1}, "data: longest_s and shortest_s"),
        ({"data.train": [{"path": "a", "share": 0.5}, "b"]}, "data: train: some parts have a share"),
        ({"data.train": None}, "data: train: at least one is needed"),
        ({"data.train": [{"pth": "a"}]}, "data: train[0]: pth is no key here; did you mean path?"),
        ({"data.dev": [3]}, "data: dev[0]: expected keys and values, found 3"),
        ({"data.letters": {"": "a"}}, "data: letters: there is nothing"),
        ({"lora.where": []}, "lora: where: at least one is needed"),
        ({"augment.room": 1.5}, "augment: room is 1.5; it is a share"),
        ({"augment.speed": [1.1, 0.9]}, "augment: speed: 1.1 is more than 0.9"),
        ({"augment.speed": [0, 1]}, "augment: speed is 0.0; it must be at least 0.1"),
        ({"masks.time": -0.1}, "masks: time is -0.1; it is a share"),
        ({"masks.time_span": 0}, "masks: time_span is 0; it must be at least 1"),
        ({"distil.layers": 3, "train": "lora"}, "distil: a student learns all"),
        (
            {"qat": "int4", "train": "lora"},
            "qat: with train: lora the checkpoint's own weights stay as",
        ),
        ({"qat": "int4", "train": "head"}, "qat: the head is not rounded"),
        ({"qat": "int4", "vocabulary": "extend"}, "qat: a new head comes first"),
        ({"qat": "int8", "batch.layout": "padded"}, "qat: the teacher is fed packed batches"),
        ({"qat": "int4", "qat_group": 48}, "qat_group is 48; it must be one of 32, 64, 128"),
        ({"qat": "int3"}, "qat: 'int3' is none of them; did you mean int8?"),
        ({"learning_rate": 1}, "learning_rate is no key here; did you mean optimise: learning_rate?"),
        ({"language": False}, "language: expected str, found False; write it in quotes"),
    ],
)
def test_what_cannot_be_meant(turns, says):
    with pytest.raises(RecipeError) as wrong:
        checked(**turns)
    assert str(wrong.value).startswith(f"r: {says}")
    assert "\n" not in str(wrong.value)


def test_a_constant_schedule_holds_nothing():
    assert checked(**{"optimise.schedule": "cosine", "optimise.warmup": 0.7}).optimizer.warmup_ratio == 0.7
    assert checked(**{"optimise.warmup": 0.7, "optimise.hold": 0.3}).optimizer.hold_ratio == 0.3


def test_plain_paths_stand_for_parts():
    parts = (DataSource("a.jsonl"),)
    assert checked().data.train == parts
    assert checked(**{"data.train": ["a.jsonl"]}).data.train == parts
    assert checked(**{"data.train": {"path": "a.jsonl", "split": "test"}}).data.train == (
        DataSource("a.jsonl", "test"),
    )
    assert checked(**{"data.dev": None}).data.dev == ()


def test_one_roughness_brings_no_other():
    assert checked(**{"augment.noise": 0.5}).augment == replace(ctc.DEFAULT_AUGMENT, noise=0.5)
    assert checked().augment == ctc.DEFAULT_AUGMENT != AugmentConfig()


@pytest.mark.parametrize("name", STORIES)
def test_shipped_recipes_read_and_round_trip(name, tmp_path):
    plan = ctc.read_recipe(RECIPES / f"{name}.yaml")
    schema.write_yaml(plan, tmp_path / "again.yaml")
    assert ctc.read_recipe(tmp_path / "again.yaml") == plan


def test_shipped_recipes_tell_every_story():
    plans = {name: ctc.read_recipe(RECIPES / f"{name}.yaml") for name in STORIES}
    assert [plans[name].method for name in STORIES[:5]] == ["head", "adapters", "lora", "top-6", "all"]
    assert plans["top-layers"].top_n == 6
    assert plans["new-language"].vocabulary == plans["head"].vocabulary == "new"
    assert plans["continue"].data.replay
    assert all(plan.data.replay == () for plan in plans.values() if plan.vocabulary == "new")  # `gather` refuses it
    of_texts = {"chat-lora", "chat-cpu", "chat-small-gpu", "chat-big-gpu", "continue-text"}  # test_instruct reads them
    assert not {path.stem for path in RECIPES.glob("*.yaml")} - {*STORIES, *of_texts, "micro", "pl-tiny"}


@pytest.mark.parametrize(
    ("train", "top"), [("all", None), ("head", None), ("top-1", 1), ("top-12", 12)], ids=lambda value: str(value)
)
def test_top(train, top):
    assert CTCRecipe(model="m", data=checked().data, method=train).top_n == top
