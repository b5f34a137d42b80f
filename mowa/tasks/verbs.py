"""List what models of each task support, and raise the error for everything else."""

from __future__ import annotations

from typing import Any, cast

from mowa.errors import ModelError
from mowa.types import CausalModel, CTCModel, Model

TASK_LABELS = {
    "ctc": "a speech model",
    "causal": "a language model",
    "embedding": "an embedding model",
    "vision-language": "a vision-language model",
}
VERBS = {
    "ctc": ("transcribe", "stream", "train", "distill", "merge", "quantize", "export", "evaluate", "bench"),
    "causal": ("generate", "train", "merge", "quantize", "export", "evaluate", "bench"),
}


def require_ctc(model: Model[Any], verb: str) -> CTCModel:
    """Return `model` if it is a speech model. Raises ModelError, with what can be done with it, if it is not."""
    _require(model, "ctc", verb)
    return cast(CTCModel, model)


def require_causal(model: Model[Any], verb: str) -> CausalModel:
    """Return `model` if it is a language model. Raises ModelError, with what can be done with it, if it is not."""
    _require(model, "causal", verb)
    return cast(CausalModel, model)


def _require(model: Model[Any], task: str, verb: str) -> None:
    if model.task == task:
        return
    possible = ", ".join(VERBS.get(model.task, ())) or "nothing yet"
    raise ModelError(
        f"{model.origin.name} is {TASK_LABELS[model.task]} ({model.family.name}); {verb} needs {TASK_LABELS[task]}."
        f" Supported for it: {possible}"
    )
