"""Whatever a recipe may be for: read as what its keys say it is, and followed by the part that knows how."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mowa.errors import RecipeError
from mowa.training.config import causal, ctc, schema
from mowa.training.config.causal import CausalRecipe
from mowa.training.config.ctc import CTCRecipe
from mowa.types import LanguageModel, Model
from projects.pl_tiny import recipe
from projects.pl_tiny.recipe import Recipe

Plan = Recipe | CTCRecipe | CausalRecipe
CONFIG_MODULES = {"ctc": ctc, "causal": causal}


def is_staged_recipe(tree: Any) -> bool:
    """Recipes from nothing have stages, others a model; of one with neither, whose keys it has more of."""
    if not isinstance(tree, dict) or "model" in tree or "stages" in tree:
        return isinstance(tree, dict) and "stages" in tree
    fresh, tuned = ({field.name for field in dataclasses.fields(kind)} & set(tree) for kind in (Recipe, CTCRecipe))
    return len(fresh) > len(tuned)


def parse(tree: Any, where: str) -> CTCRecipe | CausalRecipe:
    """A tree of plain values → the plan that its `task` is (ctc, which is the default, or causal)."""
    task = tree.get("task", "ctc") if isinstance(tree, dict) else "ctc"
    if task not in CONFIG_MODULES:
        raise RecipeError(f"{where}: task: {task!r} is none of {', '.join(CONFIG_MODULES)}")
    plan: CTCRecipe | CausalRecipe = CONFIG_MODULES[task].checked(tree, where)
    return plan


def read_recipe(path: Path, overrides: dict[str, Any] | None = None) -> Plan:
    """A recipe file → the plan it is, with `settings` (dotted paths) turned. RecipeError names the wrong key's path."""
    found = schema.read_yaml(path)
    if is_staged_recipe(found):
        return recipe.read(path)
    return parse(schema.apply_overrides(found, overrides or {}) if isinstance(found, dict) else found, str(path))


def train(recipe: CTCRecipe | CausalRecipe, model: Any, output_dir: Path, *, threads: int | None = None) -> Path:
    """Tune `model`, a `Model` that hears or a `LanguageModel`, as `plan` says, into the folder `out`. → out.

    Raises as `tune.tune` and `sft.instruct` do; RecipeError where the plan is for another kind of model.
    """
    if isinstance(recipe, CausalRecipe):
        if not isinstance(model, LanguageModel):
            raise RecipeError(f"task: causal: {recipe.model} is no language model")
        from mowa.training.causal.trainer import train_causal as follow

        return follow(recipe, model, output_dir, threads=threads)
    if not isinstance(model, Model):
        raise RecipeError(f"task: ctc: {recipe.model} is a language model; say task: causal")
    from mowa.training.ctc.trainer import train_ctc as adapt

    return adapt(recipe, model, output_dir, threads=threads)
