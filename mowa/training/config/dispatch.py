"""Read a recipe of any task, and run it: recipes and trainers are registered here by the name of their task."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mowa.errors import RecipeError
from mowa.tasks.verbs import TASK_LABELS
from mowa.training.config import causal, ctc, schema
from mowa.training.config.causal import CausalRecipe
from mowa.training.config.ctc import CTCRecipe
from mowa.types import AnyModel

if TYPE_CHECKING:
    from mowa.training.loop import Task

Recipe = CTCRecipe | CausalRecipe
CONFIG_MODULES = {"ctc": ctc, "causal": causal}
TASK_MODULES = {"ctc": "mowa.training.ctc.trainer", "causal": "mowa.training.causal.trainer"}  # each has a TASK
NO_LEAF_NAME = {"data.train"}  # keys whose last part does not stand alone: `train` reads like a switch


def parse(tree: Any, where: str) -> Recipe:
    """Build the recipe of the tree's `task` (ctc, the default, or causal). RecipeError names the path of a bad key."""
    task = tree.get("task", "ctc") if isinstance(tree, dict) else "ctc"
    if not isinstance(task, str) or task not in CONFIG_MODULES:
        raise RecipeError(f"{where}: task: {task!r} is not one of {', '.join(CONFIG_MODULES)}")
    recipe: Recipe = CONFIG_MODULES[task].parse(tree, where)
    return recipe


def expand_leaf_names(overrides: dict[str, Any]) -> dict[str, Any]:
    """Return `overrides` with keys in full: `mask_time_prob` → `spec_augment.mask_time_prob`, where it is unique."""
    sections = {field.name for kind in (CTCRecipe, CausalRecipe) for field in dataclasses.fields(kind)}
    dotted: dict[str, set[str]] = {}
    for leaf in (leaf for kind in (CTCRecipe, CausalRecipe) for leaf in schema.iter_options(kind)):
        if leaf.dotted not in NO_LEAF_NAME:
            dotted.setdefault(leaf.path[-1], set()).add(leaf.dotted)
    unique = {name: found.pop() for name, found in dotted.items() if len(found) == 1 and name not in sections}
    return {unique.get(key, key): value for key, value in overrides.items()}


def read_recipe(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe file of any task and apply `overrides` (key → value).

    A key is a dotted path, or its last part where that is unique.

    Raises:
        RecipeError: the file is not YAML, a key or value is wrong, or it is a staged recipe of projects/pl_tiny.
    """
    tree = schema.read_yaml(path)
    if isinstance(tree, dict):
        if "stages" in tree and "model" not in tree:
            command = f"python -m projects.pl_tiny train {path}"
            raise RecipeError(f"{path}: stages are not supported by mowa train; run `{command} -o FOLDER`")
        tree = schema.apply_overrides(tree, expand_leaf_names(overrides or {}))
    return parse(tree, str(path))


def train(recipe: Recipe, model: AnyModel, output_dir: Path, *, threads: int | None = None) -> Path:
    """Fine-tune `model` by `recipe` and return `output_dir`, which then holds the checkpoint or adapter.

    Args:
        recipe: the recipe.
        model: a model of the recipe's task; its net is changed in place.
        output_dir: folder of the run. Called again with the same recipe, an interrupted run resumes.
        threads: CPU threads; None: all cores.

    Raises:
        RecipeError: the recipe is for another kind of model; and as `mowa.training.loop.train`.
    """
    from mowa.training import loop

    if model.task != recipe.task:
        raise RecipeError(f"{recipe.model} is {TASK_LABELS[model.task]}; set task: {model.task}")
    return loop.train(load_task(recipe.task), recipe, model, output_dir, threads=threads)


def load_task(name: str) -> Task[Any, Any, Any]:
    """Return the training task of that name; imports its trainer."""
    task: Task[Any, Any, Any] = importlib.import_module(TASK_MODULES[name]).TASK
    return task
