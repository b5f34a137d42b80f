"""Fine-tune models and distill them: `mowa.train` and `mowa.distill`, which return a `Run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mowa.adapters.checkpoint import MERGED_SUFFIX
from mowa.api.models import Run
from mowa.errors import ModelError, RecipeError
from mowa.io.hub import reject_gguf
from mowa.training.config import dispatch
from mowa.training.config.dispatch import SECTIONS, Recipe
from mowa.types import AnyModel, Model

__all__ = ["Run", "distill", "read_recipe", "train"]

Data = str | Path | Mapping[str, Any] | Sequence[str | Path | Mapping[str, Any]]


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    out: str | Path | None = None,
    *,
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
        method: speech: full, encoder, top-N, head, bottleneck or lora; language models: lora, top-N or full
            (docs/recipes.md).
        threads: CPU threads; None: all cores.
        options: other recipe keys by their last part (learning_rate=1e-4), or sections (optimizer={"max_steps": 20}).

    Raises:
        RecipeError: a key or value is wrong, or `out` holds another run.
        DataError: nothing is left to train or evaluate on.
        ModelError: the model is unknown, damaged or does not support the method.
        TrainingStopped: a monitor found that the run cannot succeed.
        MissingDependency: a package for training is not installed.
    """
    if out is None:
        raise RecipeError("train: name the folder of the run, out=FOLDER")
    loaded = model if isinstance(model, Model) else None
    name = model if loaded is None else _load_name(loaded)
    named = {"model": name, "data.train": data, "data.dev": dev, "data.test": test, "method": method}
    if loaded is not None and loaded.origin.target_lang:
        named["target_lang"] = loaded.origin.target_lang
    overrides = {key: value for key, value in named.items() if value is not None}
    found = read_recipe(recipe, **overrides, **options)
    return Run(dispatch.train(found, Path(out), model=loaded, threads=threads))


def read_recipe(recipe: str | Path | Mapping[str, Any] | Recipe | None = None, **options: Any) -> Recipe:
    """Return the complete recipe that `train` would follow. Raises RecipeError as `train`."""
    return dispatch.resolve_recipe(recipe, _flatten(options))


def distill(teacher: str | Path, student_layers: int, *, out: str | Path, data: Data, dev: Data, **options: Any) -> Run:
    """Distill a speech model into one with fewer layers.

    The student is trained to match the teacher's logits and hidden states.

    Args:
        teacher: alias, folder or Hub id.
        student_layers: layers of the student, taken evenly from the teacher's.
        out: folder of the run.
        data: recordings; they need no transcripts.
        dev: recordings with transcripts, to evaluate on.
        options: as in `train`.

    Raises: as `train`.
    """
    tree = {"task": "ctc", "distillation": {"student_layers": student_layers}}
    return train(tree, model=teacher, out=out, data=data, dev=dev, **options)


def _flatten(options: Mapping[str, Any]) -> dict[str, Any]:
    """{"optimizer": {"max_steps": 20}} → {"optimizer.max_steps": 20}; the value of a key may be a mapping."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        if key in SECTIONS and isinstance(value, Mapping):
            flat |= {f"{key}.{name}": _plain(inner) for name, inner in value.items()}
        else:
            flat[key] = _plain(value)
    return flat


def _plain(value: Any) -> Any:
    """Replace paths by strings, as in a recipe file."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _load_name(model: AnyModel) -> str:
    reject_gguf(model.origin.source)
    if (adapter := str(getattr(model.net, "mowa_adapter", "") or "")).endswith(MERGED_SUFFIX):
        raise ModelError(
            f"{model.origin.name} was merged in memory, and a run starts from files: write it with mowa.merge("
            f"{adapter.removesuffix(MERGED_SUFFIX)!r}, out=FOLDER), and train FOLDER"
        )
    if adapter:
        raise ModelError(
            f"{model.origin.name} has an adapter: merge it first (mowa.merge), or start from its base model"
        )
    origin = model.origin
    return f"{origin.source}@{origin.revision}" if origin.revision else origin.name
