from pathlib import Path

import pytest

from mowa.errors import RecipeError
from mowa.train import recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_read_and_round_trip(path, tmp_path):
    read = recipe.read(path)
    recipe.write(read, tmp_path / "again.yaml")
    assert recipe.read(tmp_path / "again.yaml") == read


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: x\noptimise: {setps: 1}", "optimise: setps is no key here; did you mean steps?"),
        ("name: x\noptimise: {steps: many}", "optimise: steps: expected int, found 'many'"),
        ("name: x\noptimise: {steps: true}", "optimise: steps: expected int, found True"),
        ("name: x\naugment: {how: {snr_db: [3]}}", "augment: how: snr_db: expected tuple, found [3]"),
        ("language: pl", "name is missing"),
        ("[1, 2]", "expected keys and values"),
        ("a: [", "not YAML"),
    ],
)
def test_wrong_recipes_are_named_by_path(tmp_path, text, says):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError) as wrong:
        recipe.read(tmp_path / "r.yaml")
    assert says in str(wrong.value)
    assert "\n" not in str(wrong.value)
