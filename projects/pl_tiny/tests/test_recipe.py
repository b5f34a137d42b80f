from pathlib import Path

import pytest

from mowa.errors import RecipeError
from projects.pl_tiny import recipe

STAGE = "name: x\nstages: [{name: y, sources: [{manifest: a}], dev: [{name: d, manifest: b}]"
FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = [FOLDER / "pl-tiny.yaml", FOLDER / "micro.yaml"]  # the others fine-tune: test_tuning.py


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_read_and_round_trip(path, tmp_path):
    read = recipe.read(path)
    recipe.write(read, tmp_path / "again.yaml")
    assert recipe.read(tmp_path / "again.yaml") == read


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"{STAGE}, optimise: {{setps: 1}}}}]", "stages[0]: optimise: setps is no key here; did you mean steps?"),
        (f"{STAGE}, optimise: {{steps: many}}}}]", "stages[0]: optimise: steps: expected int, found 'many'"),
        (f"{STAGE}, optimise: {{steps: true}}}}]", "stages[0]: optimise: steps: expected int, found True"),
        (f"{STAGE}, augment: {{how: {{snr_db: [3]}}}}}}]", "augment: how: snr_db: expected tuple, found [3]"),
        ("name: x\nstages: [{name: y}]", "stages[0]: sources, dev is missing"),
        ("name: x\nstages: []", "stages: at least one is needed, found none"),
        ("name: x\nstages: {name: y}", "stages: expected tuple"),
        ("language: pl", "name, stages is missing"),
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
