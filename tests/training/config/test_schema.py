"""YAML ⇄ dataclasses, on classes of the test's own: what is refused and where, what stands otherwise."""

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
    fan: bool = option(False, "blown about")
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
    size_cm: tuple[float, float] = option((20.0, 5.0), "across and high", minimum=1.0)
    swaps: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    sugar: str | None = None


LAYERS = {"layers": [{"of": "plum"}]}


def bake(tree):
    return schema.from_dict(Cake, {"name": "x", **LAYERS, **tree}, "cake")


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"oven": {"heta": 1}}, "cake: oven: heta is no key here; did you mean heat?"),
        ({"ovne": {}}, "cake: ovne is no key here; did you mean oven?"),
        ({"heat": 1}, "cake: heat is no key here; did you mean oven: heat?"),
        ({"quite other": 1}, "cake: quite other is no key here; known: name, layers, oven"),
        ({None: 1}, "cake: None is no key here"),
        ({"layers": [{"of": "a"}, {"off": "b"}]}, "cake: layers[1]: off is no key here; did you mean of?"),
        ({"layers": [{"grams": 1}]}, "cake: layers[0]: of is missing"),
        ({"layers": []}, "cake: layers: at least one is needed, found none"),
        ({"oven": {"heat": -1}}, "cake: oven: heat is -1.0; it must be at least 0.0"),
        ({"oven": {"heat": 301}}, "cake: oven: heat is 301.0; it must be at most 300.0"),
        ({"oven": {"heat": "nan"}}, "cake: oven: heat: expected float, found nan"),
        ({"oven": {"heat": True}}, "cake: oven: heat: expected float, found True"),
        ({"oven": {"heat": "hot"}}, "cake: oven: heat: expected float, found 'hot'"),
        ({"oven": {"trays": ["uper"]}}, "cake: oven: trays: 'uper' is none of them; did you mean upper?"),
        ({"oven": {"trays": ["zzz"]}}, "cake: oven: trays: 'zzz' is none of them; known: upper, lower"),
        ({"oven": {"trays": "upper"}}, "cake: oven: trays: expected tuple, found 'upper'; write it as a list: [ ]"),
        ({"oven": [1]}, "cake: oven: expected keys and values, found [1]"),
        ({"size_cm": [20]}, "cake: size_cm: expected tuple, found [20]"),
        ({"size_cm": [20, 0.5]}, "cake: size_cm is 0.5; it must be at least 1.0"),
        ({"swaps": {"a": 1}}, "cake: swaps: a: expected str, found 1; write it in quotes"),
        ({"swaps": {1: "a"}}, "cake: swaps: expected str, found 1; write it in quotes"),
        ({"name": False}, "cake: name: expected str, found False; write it in quotes"),
        ({"layers": [{"of": "a", "grams": True}]}, "cake: layers[0]: grams: expected int, found True"),
        ({"layers": [{"of": "a", "grams": 1.5}]}, "cake: layers[0]: grams: expected int, found 1.5"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(tree, says):
    with pytest.raises(RecipeError) as wrong:
        bake(tree)
    assert str(wrong.value).startswith(says)
    assert "\n" not in str(wrong.value)


def test_what_is_left_out_of_a_group_stands_as_it_stood():
    assert bake({"oven": {"heat": 150}}).oven == Oven(heat=150.0, fan=True)
    assert bake({"oven": None}).oven == bake({}).oven == Oven(heat=200.0, fan=True)
    assert [leaf.default for leaf in schema.iter_options(Cake) if leaf.path[0] == "oven"] == [200.0, True, ()]


def test_numbers_as_yaml_1_1_leaves_them():
    assert bake({"oven": {"heat": "1e2"}}).oven.heat == 100.0
    assert type(bake({"oven": {"heat": 100}}).oven.heat) is float
    assert bake({"sugar": None}).sugar is None
    assert bake({"notes": {"a": [1, None]}}).notes == {"a": [1, None]}


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
def test_what_is_written_is_read_back(tmp_path_factory, cake):
    path = tmp_path_factory.mktemp("cake") / "cake.yaml"
    schema.write_yaml(cake, path)
    assert schema.from_dict(Cake, schema.read_yaml(path), "again") == cake
    assert schema.from_dict(Cake, yaml.safe_load(schema.to_yaml(cake)), "again") == cake  # by pyyaml's own reader too
    assert list(path.parent.iterdir()) == [path]  # nothing is left of the unfinished one


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3", "a stands twice (line 3): keep one"),
        ("a: {b: 1, b: 1}", "b stands twice (line 1): keep one"),
        ("a: [", "not YAML"),
        ("a: \x00", "not YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_yaml_that_cannot_be_meant(tmp_path, text, says):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError) as wrong:
        schema.read_yaml(tmp_path / "r.yaml")
    assert says in str(wrong.value)
    assert "\n" not in str(wrong.value)


def test_yaml_in_another_encoding_and_no_yaml_at_all(tmp_path):
    (tmp_path / "r.yaml").write_bytes("a: ż".encode("iso-8859-2"))
    with pytest.raises(RecipeError, match="not YAML"):
        schema.read_yaml(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="no such recipe"):
        schema.read_yaml(tmp_path / "lost.yaml")


def test_merged_keys_may_be_given_anew(tmp_path):
    (tmp_path / "r.yaml").write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}")
    assert schema.read_yaml(tmp_path / "r.yaml")["b"] == {"x": 3, "y": 2}


def test_turning_leaves_the_tree_as_it_was():
    tree = {"a": {"b": 1, "c": 2}, "d": None}
    assert schema.apply_overrides(tree, {"a.b": 5, "d.e.f": 6, "g": 7}) == {
        "a": {"b": 5, "c": 2},
        "d": {"e": {"f": 6}},
        "g": 7,
    }
    assert tree == {"a": {"b": 1, "c": 2}, "d": None}
    with pytest.raises(RecipeError, match=r"^a: expected keys and values, found 'b'$"):
        schema.apply_overrides({"a": "b"}, {"a.c": 1})
