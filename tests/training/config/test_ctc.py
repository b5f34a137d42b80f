"""CTC recipes: YAML and Python agree, and errors name every wrong key or value by its path."""

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
from tests.training.config.strategies import CAUSAL_ONLY, LEAVES, another, trees

RECIPES = Path(__file__).parents[3] / "recipes"
SHIPPED = ("head", "bottleneck", "lora", "top-layers", "full", "new-language", "continue", "qat", "streaming")
LEAST = {"model": "m", "data": {"train": "a.jsonl"}}


def at(recipe, leaf):
    return reduce(getattr, leaf.path, recipe)


def parse(**overrides):
    return ctc.parse(schema.apply_overrides(LEAST, overrides), "r")


@settings(max_examples=20, deadline=None)
@given(trees())
def test_round_trip(tmp_path_factory, tree):
    recipe = ctc.parse(schema.apply_overrides({}, tree), "drawn")
    written = yaml.safe_load(schema.to_yaml(recipe))
    for leaf in LEAVES:
        assert reduce(getitem, leaf.path, written) == tree[leaf.dotted]
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    schema.write_yaml(recipe, path)
    assert ctc.read_recipe(path) == recipe


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.dotted)
def test_a_misspelt_key_is_named_with_the_closest_one(leaf):
    *groups, key = leaf.path
    with pytest.raises(RecipeError) as error:
        parse(**{".".join([*groups, f"{key}x"]): 1})
    assert str(error.value) == f"{': '.join(['r', *groups])}: unknown key {key}x; did you mean {key}?"


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.dotted)
def test_a_value_of_another_type_is_named_by_its_path(leaf):
    with pytest.raises(RecipeError, match=f"^r: {': '.join(leaf.path)}"):
        parse(**{leaf.dotted: [[]]})


@pytest.mark.parametrize("leaf", [leaf for leaf in LEAVES if leaf.minimum is not None], ids=lambda leaf: leaf.dotted)
def test_ranges(leaf):
    pair = isinstance(leaf.default, tuple)
    beyond = [leaf.minimum - 1] + ([leaf.maximum + 1] if leaf.maximum is not None else [])
    for value in beyond:
        with pytest.raises(RecipeError, match=f"^r: {': '.join(leaf.path)} is .*it must be at "):
            parse(**{leaf.dotted: [value, value] if pair else value})


@pytest.mark.parametrize(
    "leaf", [leaf for leaf in LEAVES if leaf.dotted not in ("task", *CAUSAL_ONLY)], ids=lambda leaf: leaf.dotted
)
def test_every_default_is_valid_and_every_option_changes_one_value(leaf):
    value = another(leaf)
    others = {"streaming.chunk_s": [1.28], "batch.packing": False} if leaf.path[0] == "streaming" else {}
    before = parse(**others)
    after = parse(**others | {leaf.dotted: value})
    assert at(after, leaf) != at(before, leaf)
    assert {one.dotted for one in LEAVES if at(after, one) != at(before, one)} == {leaf.dotted}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"method": "top-N"}, "method: 'top-N' is not one of head, bottleneck, lora, top-N"),
        ({"method": "top-0"}, "method: 'top-0' is not one of"),
        ({"method": "everything"}, "method: 'everything' is not one of"),
        ({"optimizer.warmup_ratio": 0.7, "optimizer.hold_ratio": 0.4}, "optimizer: warmup_ratio and hold_ratio"),
        ({"optimizer.epochs": 0}, "optimizer: max_steps and epochs are both 0"),
        ({"data.max_duration_s": 0.1}, "data: max_duration_s must be greater than min_duration_s"),
        ({"data.train": [{"path": "a", "share": 0.5}, "b"]}, "data: train: some sources have a share"),
        ({"data.train": None}, "data: train: empty; at least one is required"),
        ({"data.train": [{"pth": "a"}]}, "data: train[0]: unknown key pth; did you mean path?"),
        ({"data.dev": [3]}, "data: dev[0]: expected keys and values, found 3"),
        ({"data.char_map": {"": "a"}}, "data: char_map: the empty string"),
        ({"lora.target_modules": []}, "lora: target_modules: empty"),
        ({"augment.reverb": 1.5}, "augment: reverb is 1.5; it must be between 0 and 1"),
        ({"augment.speed": [1.1, 0.9]}, "augment: speed: 1.1 is greater than 0.9"),
        ({"augment.speed": [0, 1]}, "augment: speed is 0.0; it must be at least 0.1"),
        ({"spec_augment.mask_time_prob": -0.1}, "spec_augment: mask_time_prob is -0.1; it must be between"),
        ({"spec_augment.mask_time_length": 0}, "spec_augment: mask_time_length is 0; it must be at least 1"),
        ({"distillation.student_layers": 3, "method": "lora"}, "distillation: a student needs method: full"),
        (
            {"qat": "int4", "method": "lora"},
            "qat: method: lora does not train the quantized weights",
        ),
        ({"qat": "int4", "method": "head"}, "qat: the head is not quantized"),
        ({"qat": "int4", "vocabulary": "extend"}, "qat: needs vocabulary: keep"),
        ({"qat": "int8", "batch.packing": False}, "qat: the teacher needs packed batches"),
        ({"qat": "int4", "qat_group_size": 48}, "qat_group_size is 48; it must be one of 32, 64, 128"),
        ({"qat": "int3"}, "qat: 'int3' is not a valid choice; did you mean int8?"),
        ({"learning_rate": 1}, "unknown key learning_rate; did you mean optimizer: learning_rate?"),
        ({"language": False}, "language: expected str, found False; put it in quotes"),
        ({"streaming.lookahead_s": 0.3}, "streaming: chunk_s is empty, so nothing is chunked"),
        ({"streaming.left_context_s": 2}, "streaming: chunk_s is empty, so nothing is chunked"),
        ({"streaming.chunk_s": "full"}, "streaming: chunk_s holds only full"),
        ({"streaming.chunk_s": 1e9}, "streaming: chunk_s: 1e+09 is over 60 s; use full"),
        ({"method": "top-" + "9" * 5000}, "method: 'top-999"),
        ({"optimizer.learning_rate": "full"}, "optimizer: learning_rate: expected a finite number, found full"),
        ({"train": "a"}, "unknown key train; did you mean data: train?"),
        ({"streaming.chunk_s": 0.01}, "streaming: chunk_s is 0.01; it must be at least 0.02"),
        ({"streaming.chunk_s": 1, "streaming.lookahead_s": []}, "streaming: lookahead_s: empty"),
        ({"streaming.chunk_s": 1, "batch.packing": True}, "streaming: chunks are not applied to packed batches"),
        ({"streaming.chunk_s": 1, "method": "head"}, "streaming: method: head freezes the encoder"),
        ({"streaming.chunk_s": 1, "method": "lora"}, "streaming: method: lora freezes the encoder"),
        ({"streaming.chunk_s": 1, "qat": "int8"}, "streaming: cannot be combined with distillation or qat"),
    ],
)
def test_errors(overrides, message):
    with pytest.raises(RecipeError) as error:
        parse(**overrides)
    assert str(error.value).startswith(f"r: {message}")
    assert "\n" not in str(error.value)


def test_only_tri_stage_uses_the_hold_ratio():
    cosine = {"optimizer.lr_scheduler": "cosine", "optimizer.warmup_ratio": 0.7}
    assert parse(**cosine).optimizer.warmup_ratio == 0.7
    assert parse(**{"optimizer.warmup_ratio": 0.7, "optimizer.hold_ratio": 0.3}).optimizer.hold_ratio == 0.3


def test_streaming_pads_unless_packing_is_set():
    assert not parse(**{"streaming.chunk_s": [0.32, "full"]}).batch.packing
    assert not parse(**{"streaming.chunk_s": 0.32, "batch.seconds": 9.0}).batch.packing
    assert parse(**{"streaming.chunk_s": 0.32}).streaming.chunk_s == (0.32,)
    assert parse(streaming=None).batch.packing


def test_paths_become_sources():
    sources = (DataSource("a.jsonl"),)
    assert parse().data.train == sources
    assert parse(**{"data.train": ["a.jsonl"]}).data.train == sources
    assert parse(**{"data.train": {"path": "a.jsonl", "split": "test"}}).data.train == (DataSource("a.jsonl", "test"),)
    assert parse(**{"data.dev": None}).data.dev == ()


def test_one_augmentation_does_not_turn_on_others():
    assert parse(**{"augment.noise": 0.5}).augment == replace(ctc.DEFAULT_AUGMENT, noise=0.5)
    assert parse().augment == ctc.DEFAULT_AUGMENT != AugmentConfig()


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_read_and_round_trip(name, tmp_path):
    recipe = ctc.read_recipe(RECIPES / f"{name}.yaml")
    schema.write_yaml(recipe, tmp_path / "again.yaml")
    assert ctc.read_recipe(tmp_path / "again.yaml") == recipe


def test_shipped_recipes_cover_every_method():
    recipes = {name: ctc.read_recipe(RECIPES / f"{name}.yaml") for name in SHIPPED}
    assert [recipes[name].method for name in SHIPPED[:5]] == ["head", "bottleneck", "lora", "top-6", "full"]
    assert recipes["top-layers"].top_n == 6
    assert recipes["new-language"].vocabulary == recipes["head"].vocabulary == "new"
    assert recipes["continue"].data.replay
    assert all(recipe.data.replay == () for recipe in recipes.values() if recipe.vocabulary == "new")
    assert recipes["streaming"].streaming.chunk_s
    assert not recipes["streaming"].batch.packing
    causal = {"chat-lora", "chat-cpu", "chat-small-gpu", "chat-big-gpu", "continue-text"}  # see test_causal
    assert not {path.stem for path in RECIPES.glob("*.yaml")} - {*SHIPPED, *causal}


@pytest.mark.parametrize(
    ("method", "top_n"), [("full", None), ("head", None), ("top-1", 1), ("top-12", 12)], ids=lambda value: str(value)
)
def test_top_n(method, top_n):
    assert CTCRecipe(model="m", data=parse().data, method=method).top_n == top_n
