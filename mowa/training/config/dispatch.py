"""Read a recipe of any task, and run it: recipes and trainers are registered here by the name of their task."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mowa.errors import ModelError, RecipeError
from mowa.tasks.verbs import TASK_LABELS
from mowa.training.config import causal, ctc, schema
from mowa.training.config.causal import CausalRecipe
from mowa.training.config.ctc import CTCRecipe
from mowa.training.distributed.process import is_worker_process
from mowa.types import AnyModel

if TYPE_CHECKING:
    from mowa.training.loop import Task

Recipe = CTCRecipe | CausalRecipe
RECIPES: dict[str, type[Recipe]] = {"ctc": CTCRecipe, "causal": CausalRecipe}  # the first is the default task
CONFIG_MODULES = {"ctc": ctc, "causal": causal}
TASK_MODULES = {"ctc": "mowa.training.ctc.trainer", "causal": "mowa.training.causal.trainer"}  # each has a TASK
SECTIONS = {field.name for kind in RECIPES.values() for field in dataclasses.fields(kind)}  # and keys beside them
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
    dotted: dict[str, set[str]] = {}
    for leaf in (leaf for kind in RECIPES.values() for leaf in schema.iter_options(kind)):
        if leaf.dotted not in NO_LEAF_NAME:
            dotted.setdefault(leaf.path[-1], set()).add(leaf.dotted)
    unique = {name: found.pop() for name, found in dotted.items() if len(found) == 1 and name not in SECTIONS}
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


def resolve_recipe(recipe: str | Path | Mapping[str, Any] | Recipe | None, overrides: dict[str, Any]) -> Recipe:
    """Return the recipe in a file, in its content, or in a recipe object, with `overrides` applied as in `read_recipe`.

    Without a task, content is of the task of its model.

    Raises:
        RecipeError: as `read_recipe`; no model is named; or epochs are overridden in a file that sets max_steps.
    """
    if isinstance(recipe, str | Path):
        found = read_recipe(Path(recipe), overrides)
        steps = found.optimizer.max_steps
        if "optimizer.epochs" in (keys := expand_leaf_names(overrides)) and steps and "optimizer.max_steps" not in keys:
            raise RecipeError(f"{recipe} sets max_steps, so epochs would have no effect: set max_steps to 0 as well")
        return found
    if isinstance(recipe, CTCRecipe | CausalRecipe):
        recipe = schema.to_tree(recipe)
    tree = schema.apply_overrides(dict(recipe or {}), expand_leaf_names(overrides))
    if not tree.get("model"):
        raise RecipeError("train: name a model, or a recipe")
    if "task" not in tree:
        from mowa.loading import read_task

        with suppress(ModelError):  # loading the model reports it
            tree["task"] = read_task(str(tree["model"]))
    return parse(tree, "train")


def train(recipe: Recipe, output_dir: str | Path, *, model: AnyModel | None = None, threads: int | None = None) -> Path:
    """Fine-tune the recipe's model and return `output_dir`, which then holds the checkpoint or adapter.

    A recipe that needs worker processes is given to them, on all devices of this machine.

    Args:
        recipe: the recipe.
        model: the recipe's model, if it is loaded; its net is changed in place.
        output_dir: folder of the run. Called again with the same recipe, an interrupted run resumes.
        threads: CPU threads; None: all cores.

    Raises:
        RecipeError: the recipe is for another kind of model; and as `mowa.training.loop.train`.
    """
    from mowa.loading import read_task
    from mowa.training import loop
    from mowa.training.distributed import launch

    output_dir = Path(output_dir)
    if launch.needs_launcher(recipe) and not is_worker_process():
        launch.launch_workers(recipe, output_dir, threads=threads)
        return output_dir
    found = read_task(recipe.model) if model is None else model.task
    if found != recipe.task:
        raise RecipeError(f"{recipe.model} is {TASK_LABELS[found]}; set task: {found}")
    task = load_task(recipe.task)
    return loop.train(task, recipe, model or task.load(recipe), output_dir, threads=threads)


def load_task(name: str) -> Task[Any, Any, Any]:
    """Return the training task of that name; imports its trainer."""
    task: Task[Any, Any, Any] = importlib.import_module(TASK_MODULES[name]).TASK
    return task
