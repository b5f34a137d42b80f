"""Whatever a recipe may be for: read as what its keys say it is, and followed by the part that knows how."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mowa.errors import RecipeError
from mowa.nouns import LanguageModel, Model
from mowa.train import instruct, recipe, schema, tuning
from mowa.train.instruct import Instruction
from mowa.train.recipe import Recipe
from mowa.train.tuning import Tuning

Plan = Recipe | Tuning | Instruction
TASKS = {"ctc": tuning, "causal": instruct}


def of_nothing(tree: Any) -> bool:
    """Recipes from nothing have stages, others a model; of one with neither, whose keys it has more of."""
    if not isinstance(tree, dict) or "model" in tree or "stages" in tree:
        return isinstance(tree, dict) and "stages" in tree
    fresh, tuned = ({field.name for field in dataclasses.fields(kind)} & set(tree) for kind in (Recipe, Tuning))
    return len(fresh) > len(tuned)


def checked(tree: Any, where: str) -> Tuning | Instruction:
    """A tree of plain values → the plan that its `task` is (ctc, which is the default, or causal)."""
    task = tree.get("task", "ctc") if isinstance(tree, dict) else "ctc"
    if task not in TASKS:
        raise RecipeError(f"{where}: task: {task!r} is none of {', '.join(TASKS)}")
    plan: Tuning | Instruction = TASKS[task].checked(tree, where)
    return plan


def read(path: Path, settings: dict[str, Any] | None = None) -> Plan:
    """A recipe file → the plan it is, with `settings` (dotted paths) turned. RecipeError names the wrong key's path."""
    found = schema.tree(path)
    if of_nothing(found):
        return recipe.read(path)
    return checked(schema.turned(found, settings or {}) if isinstance(found, dict) else found, str(path))


def tune(plan: Tuning | Instruction, model: Any, out: Path, *, threads: int | None = None) -> Path:
    """Tune `model`, a `Model` that hears or a `LanguageModel`, as `plan` says, into the folder `out`. → out.

    Raises as `tune.tune` and `sft.instruct` do; RecipeError where the plan is for another kind of model.
    """
    if isinstance(plan, Instruction):
        if not isinstance(model, LanguageModel):
            raise RecipeError(f"task: causal: {plan.model} is no language model")
        from mowa.train.sft import instruct as follow

        return follow(plan, model, out, threads=threads)
    if not isinstance(model, Model):
        raise RecipeError(f"task: ctc: {plan.model} is a language model; say task: causal")
    from mowa.train.tune import tune as adapt

    return adapt(plan, model, out, threads=threads)
