"""Transcribe speech, and fine-tune, quantize and export open pretrained speech and language models.

    import mowa

    transcript = mowa.transcribe("talk.mp3")
    for word in transcript.words:
        print(word.start_s, word.text)

    run = mowa.train(model="polish", data="train.jsonl", method="lora", out="medical")

Functions are imported on first use: `import mowa` alone imports neither torch nor transformers. docs/python.md shows
each of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mowa.api.artifacts import export as export
    from mowa.api.artifacts import merge as merge
    from mowa.api.artifacts import quantize as quantize
    from mowa.api.corpus import transcribe_corpus as transcribe_corpus
    from mowa.api.measuring import Evaluation as Evaluation
    from mowa.api.measuring import bench as bench
    from mowa.api.measuring import evaluate as evaluate
    from mowa.api.models import Run as Run
    from mowa.api.models import accelerate as accelerate
    from mowa.api.models import explain as explain
    from mowa.api.models import load as load
    from mowa.api.models import restore as restore
    from mowa.api.reports import compare_schemes as compare_schemes
    from mowa.api.speech import stream as stream
    from mowa.api.speech import transcribe as transcribe
    from mowa.api.text import generate as generate
    from mowa.api.training import distill as distill
    from mowa.api.training import train as train
    from mowa.decode.stream import EndpointConfig as EndpointConfig
    from mowa.engines.pytorch import open_engine as open_engine
    from mowa.errors import AudioError as AudioError
    from mowa.errors import DataError as DataError
    from mowa.errors import HubUnreachable as HubUnreachable
    from mowa.errors import MissingDependency as MissingDependency
    from mowa.errors import ModelError as ModelError
    from mowa.errors import MowaError as MowaError
    from mowa.errors import RecipeError as RecipeError
    from mowa.errors import TrainingStopped as TrainingStopped
    from mowa.errors import UnknownModel as UnknownModel
    from mowa.types import Artifact as Artifact
    from mowa.types import Failure as Failure
    from mowa.types import Generation as Generation
    from mowa.types import Model as Model
    from mowa.types import Segment as Segment
    from mowa.types import Transcript as Transcript
    from mowa.types import Word as Word

__version__ = "0.1.0"

_ERRORS = ("AudioError", "DataError", "HubUnreachable", "MissingDependency", "ModelError", "MowaError", "RecipeError")
_NAMES = {
    "mowa.api.artifacts": ("export", "merge", "quantize"),
    "mowa.api.corpus": ("transcribe_corpus",),
    "mowa.api.measuring": ("Evaluation", "bench", "evaluate"),
    "mowa.api.models": ("Run", "accelerate", "explain", "load", "restore"),
    "mowa.api.reports": ("compare_schemes",),
    "mowa.api.speech": ("stream", "transcribe"),
    "mowa.api.text": ("generate",),
    "mowa.api.training": ("distill", "train"),
    "mowa.decode.stream": ("EndpointConfig",),
    "mowa.engines.pytorch": ("open_engine",),
    "mowa.errors": (*_ERRORS, "TrainingStopped", "UnknownModel"),
    "mowa.types": ("Artifact", "Failure", "Generation", "Model", "Segment", "Transcript", "Word"),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'mowa' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
