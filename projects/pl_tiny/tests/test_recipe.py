from pathlib import Path

import pytest

from mowa.errors import RecipeError
from projects.pl_tiny.recipe import read_recipe, write_recipe

HEAD = "name: x\nlanguage: pl\nalphabet: abc\n"
STAGE = f"{HEAD}stages: [{{name: y, sources: [{{manifest: a}}], dev: [{{name: d, manifest: b}}]"
RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
ROOT = Path(__file__).parents[3]
CHECKPOINTS = {"pl-tiny": ROOT / "mowa" / "assets" / "pl-tiny", "micro": ROOT / "tests" / "assets" / "micro"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_read_and_round_trip(path, tmp_path):
    recipe = read_recipe(path)
    write_recipe(recipe, tmp_path / "again.yaml")
    assert read_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_checkpoints_were_trained_with_these_recipes(path):
    assert read_recipe(CHECKPOINTS[path.stem] / "recipe.yaml") == read_recipe(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{STAGE}, optimizer: {{max_stpes: 1}}}}]", ["stages[0]: optimizer:", "max_stpes", "did you mean max_steps?"]),
        (f"{STAGE}, optimizer: {{max_steps: many}}}}]", ["stages[0]: optimizer: max_steps:", "int", "'many'"]),
        (f"{STAGE}, optimizer: {{max_steps: true}}}}]", ["stages[0]: optimizer: max_steps:", "int", "True"]),
        (f"{STAGE}, augment: {{config: {{snr_db: [3]}}}}}}]", ["stages[0]: augment: config: snr_db:", "[3]"]),
        (f"{HEAD}stages: [{{name: y}}]", ["stages[0]: sources, dev", "missing"]),
        (f"{HEAD}stages: []", ["stages:", "at least one"]),
        (f"{HEAD}stages: {{name: y}}", ["stages:", "{'name': 'y'}"]),
        ("language: pl", ["name, alphabet, stages", "missing"]),
        ("[1, 2]", ["[1, 2]"]),
        ("a: [", ["YAML"]),
    ],
)
def test_errors_name_the_path_of_the_key(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError) as error:
        read_recipe(tmp_path / "r.yaml")
    for part in ("r.yaml", *message):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
