"""`mowa.train` and `mowa.distill`, and the run that they return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from mowa import loading
from mowa.api.models import load
from mowa.errors import ModelError, RecipeError
from mowa.io.atomic import read_json
from mowa.io.hub import fetch_config
from mowa.loading.checkpoint import read_family
from mowa.training.config import dispatch, schema
from mowa.training.config.causal import CausalRecipe
from mowa.training.config.dispatch import Recipe
from mowa.training.distributed import launch
from mowa.training.distributed.process import is_worker_process
from mowa.types import AnyModel, Model

__all__ = ["Run", "distill", "train"]

Data = str | Path | Mapping[str, Any] | Sequence[str | Path | Mapping[str, Any]]


@dataclass(frozen=True)
class Run:
    """A finished training run: the folder with its checkpoint or adapter."""

    folder: Path

    @cached_property
    def report(self) -> dict[str, Any]:
        """The content of report.json: metrics of every data set, numbers of parameters, versions."""
        return read_json(self.folder / "report.json")

    @property
    def metrics(self) -> dict[str, Any]:
        """Metrics of every dev and test set, by name."""
        metrics: dict[str, Any] = self.report["metrics"]
        return metrics

    @cached_property
    def model(self) -> AnyModel:
        """The trained model, loaded from the folder; an adapter over its base model."""
        return load(self.folder)


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    *,
    out: str | Path,
    model: str | Path | AnyModel | None = None,
    data: Data | None = None,
    dev: Data | None = None,
    test: Data | None = None,
    method: str | None = None,
    threads: int | None = None,
    **options: Any,
) -> Run:
    """Fine-tune a speech or language model.

        run = mowa.train(model="polish", data="train.jsonl", method="lora", out="medical", epochs=3)

    Args:
        recipe: a recipe file (YAML), its content, or a recipe object; the other arguments override its keys.
        out: folder of the run. Called again with the same recipe, an interrupted run resumes and a finished one
            returns at once.
        model: name of the model, as in `mowa.load`; or a loaded one, whose net is then trained in place.
        data, dev, test: manifests, corpora or files of conversations (`data.train`, `data.dev`, `data.test`).
        method: full, encoder, top-N, head, bottleneck, lora or qlora; see docs/recipes.md.
        threads: CPU threads; None: all cores.
        options: other recipe keys by their last part (learning_rate=1e-4), or sections (optimizer={"max_steps": 20}).

    Raises:
        RecipeError: a key or value is wrong, or `out` holds another run.
        DataError: nothing is left to train or evaluate on.
        ModelError: the model is unknown, damaged or does not support the method.
        TrainingStopped: a monitor found that the run cannot succeed.
        MissingDependency: a package for training is not installed.
    """
    loaded = model if isinstance(model, Model) else None
    named = {"data.train": data, "data.dev": dev, "data.test": test, "method": method}
    overrides = {key: _plain(value) for key, value in named.items() if value is not None}
    if model is not None:
        overrides["model"] = _load_name(loaded) if loaded is not None else str(model)
    found = _read_recipe(recipe, overrides | _flatten(options))
    folder = Path(out)
    if launch.needs_launcher(found) and not is_worker_process():
        launch.launch_workers(found, folder, threads=threads)
    else:
        dispatch.train(found, loaded or _load_for(found), folder, threads=threads)
    return Run(folder)


def distill(teacher: str | Path, student_layers: int, *, out: str | Path, data: Data, dev: Data, **options: Any) -> Run:
    """Distill a speech model into one with fewer layers, which learns to give the teacher's outputs.

    Args:
        teacher: alias, folder or Hub id.
        student_layers: layers of the student, taken evenly from the teacher's.
        out: folder of the run.
        data: recordings; they need no transcripts.
        dev: recordings with transcripts, to evaluate on.
        options: as in `train`.

    Raises: as `train`.
    """
    distillation = {"distillation": {"student_layers": student_layers}}
    return train({"task": "ctc"} | distillation, model=teacher, out=out, data=data, dev=dev, **options)


def _read_recipe(recipe: Any, overrides: dict[str, Any]) -> Recipe:
    if isinstance(recipe, str | Path):
        return dispatch.read_recipe(Path(recipe), overrides)
    if is_dataclass(recipe) and not isinstance(recipe, type):
        if not overrides:
            return cast(Recipe, recipe)
        import yaml

        recipe = yaml.safe_load(schema.to_yaml(recipe))
    tree = schema.apply_overrides(dict(recipe or {}), dispatch.expand_leaf_names(overrides))
    if "model" not in tree:
        raise RecipeError("train: name a model, or a recipe")
    if "task" not in tree:
        tree["task"] = read_family(fetch_config(str(tree["model"])), str(tree["model"])).task
    return dispatch.parse(tree, "train")


def _flatten(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optimizer": {"max_steps": 20}} → {"optimizer.max_steps": 20}"""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = _plain(value)
    return flat


def _plain(value: Any) -> Any:
    """Replace paths by strings, as in a recipe file."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _load_name(model: AnyModel) -> str:
    if getattr(model.net, "mowa_adapter", None):
        raise ModelError(
            f"{model.origin.name} has an adapter: merge it first (mowa.merge), or start from its base model"
        )
    origin = model.origin
    return f"{origin.source}@{origin.revision}" if origin.revision else origin.name


def _load_for(recipe: Recipe) -> AnyModel:
    """Load the recipe's model in the dtype in which it is trained, without a head where a new one is trained."""
    if not isinstance(recipe, CausalRecipe):
        return loading.load(recipe.model, task="ctc", require_head=recipe.vocabulary != "new")
    from mowa.training.causal.setup import resolve_base_dtype

    return loading.load(recipe.model, task="causal", dtype=resolve_base_dtype(recipe, fetch_config(recipe.model)))
