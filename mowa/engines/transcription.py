"""Recordings → transcripts, as the command line and `mowa.transcribe` share it: names in, `pipeline` between.

It knows files and names of models; how recordings go through the net is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from mowa.adapters import checkpoint
from mowa.data import audio
from mowa.engines import pipeline, pytorch, selection
from mowa.engines.pipeline import Failure
from mowa.engines.protocol import Engine
from mowa.engines.pytorch import PyTorchEngine
from mowa.engines.selection import EngineChoice
from mowa.engines.settings import EngineSpec, TranscriptionSettings
from mowa.errors import AudioError
from mowa.exporters import is_export, read_artifact
from mowa.io.hub import MODEL_ALIASES
from mowa.loading.ctc import load
from mowa.types import Example, Model, Transcript

DEFAULT_MODEL = "pl-tiny"


@overload
def transcribe(files: str | Path, model: str | Model | PyTorchEngine | None = ..., **options: Any) -> Transcript: ...
@overload
def transcribe(
    files: Sequence[str | Path], model: str | Model | PyTorchEngine | None = ..., **options: Any
) -> list[Transcript]: ...
def transcribe(
    files: str | Path | Sequence[str | Path],
    model: str | Model | PyTorchEngine | None = None,
    *,
    adapter: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    **settings: Any,
) -> Transcript | list[Transcript]:
    """One recording → its Transcript; a list of recordings and folders → a list, in order.

    `model` is an alias, a folder, a hub id, or what `load` or `engine` gave; None is the adapter's base, or pl-tiny.
    `adapter` is an adapter's folder, or the name of one that `engine` was given. `settings` are the fields of
    `Settings`. The first bad recording raises its MowaError; `transcripts` goes on past it.
    """
    chosen = TranscriptionSettings(**settings)
    engine: Engine
    how: Any = {"device": device, "dtype": dtype, "threads": threads}
    if isinstance(model, str) and (folder := resolve_artifact(model)) is not None:
        engine = selection.open_artifact(folder, adapter=adapter, **how).engine
    else:
        if not isinstance(model, PyTorchEngine):
            loaded = load(model or resolve_base_model(adapter)) if model is None or isinstance(model, str) else model
            model = pytorch.open_engine(loaded, **how)
        engine = model.with_adapter(adapter)
    alone = isinstance(files, str | Path)
    if alone and Path(str(files)).is_dir():
        raise AudioError(f"{files}: is a folder. Give it in a list, transcribe([folder]), for a list of transcripts.")
    done = []
    for outcome in iter_transcripts(
        audio.find_audio_files([files] if isinstance(files, str | Path) else files), engine, chosen
    ):
        if isinstance(outcome, Failure):
            raise outcome.error
        done.append(outcome)
    return done[0] if alone else done


def load_engine(spec: EngineSpec) -> EngineChoice:
    """The engine that was asked for, loaded, and why it is this one. Raises as `load` and `choose.engine` do."""
    how: Any = {"device": spec.device, "dtype": spec.dtype, "threads": spec.threads, "adapter": spec.adapter}
    if (folder := resolve_artifact(spec.model)) is not None:
        return selection.open_artifact(folder, name=spec.engine, **how)
    model = load(spec.model, revision=spec.revision, offline=spec.offline)
    return selection.select_engine(model, name=spec.engine, **how)


def resolve_artifact(name: str) -> Path | None:
    """The folder that `name` is, where it holds an export that another program than PyTorch runs."""
    folder = Path(name)
    return (
        folder
        if name not in MODEL_ALIASES and is_export(folder) and read_artifact(folder).format != "safetensors"
        else None
    )


def resolve_base_model(adapter: str | Path | None) -> str:
    """By which name the model loads that `adapter` (a folder) was made over; pl-tiny without one."""
    return DEFAULT_MODEL if adapter is None else checkpoint.read_adapter(adapter).base.load_name


def iter_transcripts(
    files: Iterable[str | Path],
    engine: Engine,
    settings: TranscriptionSettings | None = None,
    *,
    on_progress: Callable[[float], object] = lambda seconds: None,
) -> Iterator[Transcript | Failure]:
    """One outcome a file, in the order given. A bad file is a Failure and the others go on.

    `heard` is called with the seconds of audio each batch brought, for progress. Cut-off recordings are refused whole.
    """
    examples = (Example(str(file), str(file), "", 0.0) for file in files)
    for _, outcome in pipeline.transcribe_examples(
        examples, engine, settings or TranscriptionSettings(), on_progress=on_progress
    ):
        yield outcome
