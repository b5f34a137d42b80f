"""YAML to dataclasses and back, on classes of this test: errors with their paths, defaults, round trips."""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mowa.errors import RecipeError
from mowa.training.config import schema
from mowa.training.config.schema import option


@dataclass(frozen=True, slots=True)
class Oven:
    heat: float = option(180.0, "degrees", minimum=0.0, maximum=300.0)
    fan: bool = option(False, "circulate the air")
    trays: tuple[str, ...] = option((), "which", choices=("upper", "lower"))


@dataclass(frozen=True, slots=True)
class Layer:
    of: str
    grams: int = 100


@dataclass(frozen=True, slots=True)
class Cake:
    name: str
    layers: tuple[Layer, ...]
    oven: Oven = field(default_factory=lambda: Oven(heat=200.0, fan=True))
    size_cm: tuple[float, float] = option((20.0, 5.0), "diameter and height", minimum=1.0)
    swaps: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    sugar: str | None = None
    pauses_s: tuple[float, ...] = option((), "pauses", unlimited=True)


LAYERS = {"layers": [{"of": "plum"}]}


def bake(tree):
    return schema.from_dict(Cake, {"name": "x", **LAYERS, **tree}, "cake")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"oven": {"heta": 1}}, "cake: oven: unknown key heta; did you mean heat?"),
        ({"ovne": {}}, "cake: unknown key ovne; did you mean oven?"),
        ({"heat": 1}, "cake: unknown key heat; did you mean oven: heat?"),
        ({"quite other": 1}, "cake: unknown key quite other; known: name, layers, oven"),
        ({None: 1}, "cake: unknown key None"),
        ({"layers": [{"of": "a"}, {"off": "b"}]}, "cake: layers[1]: unknown key off; did you mean of?"),
        ({"layers": [{"grams": 1}]}, "cake: layers[0]: of is missing"),
        ({"layers": []}, "cake: layers: empty; at least one is required"),
        ({"oven": {"heat": -1}}, "cake: oven: heat is -1.0; it must be at least 0.0"),
        ({"oven": {"heat": 301}}, "cake: oven: heat is 301.0; it must be at most 300.0"),
        ({"oven": {"heat": "nan"}}, "cake: oven: heat: expected float, found nan"),
        ({"oven": {"heat": "full"}}, "cake: oven: heat: expected a finite number, found full"),
        ({"oven": {"heat": True}}, "cake: oven: heat: expected float, found True"),
        ({"oven": {"heat": "hot"}}, "cake: oven: heat: expected float, found 'hot'"),
        ({"oven": {"trays": ["uper"]}}, "cake: oven: trays: 'uper' is not a valid choice; did you mean upper?"),
        ({"oven": {"trays": ["zzz"]}}, "cake: oven: trays: 'zzz' is not a valid choice; known: upper, lower"),
        ({"oven": {"trays": "upper"}}, "cake: oven: trays: expected tuple, found 'upper'; write it as a list: [ ]"),
        ({"oven": [1]}, "cake: oven: expected keys and values, found [1]"),
        ({"size_cm": [20]}, "cake: size_cm: expected tuple, found [20]"),
        ({"size_cm": [20, 0.5]}, "cake: size_cm is 0.5; it must be at least 1.0"),
        ({"swaps": {"a": 1}}, "cake: swaps: a: expected str, found 1; put it in quotes"),
        ({"swaps": {1: "a"}}, "cake: swaps: expected str, found 1; put it in quotes"),
        ({"name": False}, "cake: name: expected str, found False; put it in quotes"),
        ({"layers": [{"of": "a", "grams": True}]}, "cake: layers[0]: grams: expected int, found True"),
        ({"layers": [{"of": "a", "grams": 1.5}]}, "cake: layers[0]: grams: expected int, found 1.5"),
    ],
)
def test_errors_name_the_path(tree, message):
    with pytest.raises(RecipeError) as error:
        bake(tree)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_omitted_keys_of_a_section_keep_its_defaults():
    assert bake({"oven": {"heat": 150}}).oven == Oven(heat=150.0, fan=True)
    assert bake({"oven": None}).oven == bake({}).oven == Oven(heat=200.0, fan=True)
    assert [leaf.default for leaf in schema.iter_options(Cake) if leaf.path[0] == "oven"] == [200.0, True, ()]


def test_numbers_as_yaml_1_1_leaves_them():
    assert bake({"oven": {"heat": "1e2"}}).oven.heat == 100.0
    assert type(bake({"oven": {"heat": 100}}).oven.heat) is float
    assert bake({"sugar": None}).sugar is None
    assert bake({"notes": {"a": [1, None]}}).notes == {"a": [1, None]}


def test_a_list_of_numbers_may_be_one_number_and_full_is_infinite():
    assert bake({"pauses_s": 1.5}).pauses_s == (1.5,)
    assert bake({"pauses_s": [1, "full"]}).pauses_s == (1.0, math.inf)
    assert bake({"pauses_s": "full"}).pauses_s == (math.inf,)
    assert yaml.safe_load(schema.to_yaml(bake({"pauses_s": [1, "full"]})))["pauses_s"] == [1.0, "full"]
    with pytest.raises(RecipeError, match=r"^cake: pauses_s: expected tuple, found True"):
        bake({"pauses_s": True})


words = st.text(st.characters(exclude_categories=["Cs"]))


@settings(max_examples=50, deadline=None)
@given(
    st.builds(
        Cake,
        name=words,
        layers=st.lists(st.builds(Layer, of=words, grams=st.integers()), min_size=1).map(tuple),
        swaps=st.dictionaries(words, words),
        sugar=st.none() | words,
    )
)
@example(Cake("no", (Layer("a\x85b"),), swaps={"\u2028": "\x85", "=": "~", "'": '"'}, sugar="1e-4"))
def test_round_trip(tmp_path_factory, cake):
    path = tmp_path_factory.mktemp("cake") / "cake.yaml"
    schema.write_yaml(cake, path)
    assert schema.from_dict(Cake, schema.read_yaml(path), "again") == cake
    assert schema.from_dict(Cake, yaml.safe_load(schema.to_yaml(cake)), "again") == cake  # by the stock loader too
    assert list(path.parent.iterdir()) == [path]  # no temporary file is left


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "duplicate key a (line 3); keep one"),
        ("a: {b: 1, b: 1}", "duplicate key b (line 1); keep one"),
        ("a: [", "invalid YAML"),
        ("a: \x00", "invalid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "invalid YAML"),
        ("a: 2020-13-45", "invalid YAML (month must be in 1..12)"),
        ("a: " + "[" * 3000, "invalid YAML"),
        ("? [a, b]\n: 1", "a key is a list or mapping (line 1)"),
    ],
)
def test_invalid_yaml(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError) as error:
        schema.read_yaml(tmp_path / "r.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_other_encodings_and_missing_files(tmp_path):
    (tmp_path / "r.yaml").write_bytes("a: ż".encode("iso-8859-2"))
    with pytest.raises(RecipeError, match="invalid YAML"):
        schema.read_yaml(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="no such recipe file"):
        schema.read_yaml(tmp_path / "lost.yaml")


def test_merged_keys_may_be_overridden(tmp_path):
    (tmp_path / "r.yaml").write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}")
    assert schema.read_yaml(tmp_path / "r.yaml")["b"] == {"x": 3, "y": 2}


def test_overrides_do_not_change_the_tree():
    tree = {"a": {"b": 1, "c": 2}, "d": None}
    assert schema.apply_overrides(tree, {"a.b": 5, "d.e.f": 6, "g": 7}) == {
        "a": {"b": 5, "c": 2},
        "d": {"e": {"f": 6}},
        "g": 7,
    }
    assert tree == {"a": {"b": 1, "c": 2}, "d": None}
    with pytest.raises(RecipeError, match=r"^a: expected keys and values, found 'b'$"):
        schema.apply_overrides({"a": "b"}, {"a.c": 1})
