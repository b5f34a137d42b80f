"""Transcribe files with a model given by name: what `mowa.transcribe` and `mowa transcribe` share."""

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
from mowa.types import CTCModel, Example, Transcript

DEFAULT_MODEL = "pl-tiny"


@overload
def transcribe(files: str | Path, model: str | CTCModel | PyTorchEngine | None = ..., **options: Any) -> Transcript: ...
@overload
def transcribe(
    files: Sequence[str | Path], model: str | CTCModel | PyTorchEngine | None = ..., **options: Any
) -> list[Transcript]: ...
def transcribe(
    files: str | Path | Sequence[str | Path],
    model: str | CTCModel | PyTorchEngine | None = None,
    *,
    adapter: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    **settings: Any,
) -> Transcript | list[Transcript]:
    """Transcribe a recording, or a list of recordings and folders.

    Args:
        files: a file, or a list of files and folders.
        model: an alias, a folder, a Hub id, a `Model`, or an engine; None is the adapter's base model, or pl-tiny.
        adapter: an adapter's folder, or the name of one that the engine was opened with.
        device, dtype, threads: as `open_engine`; ignored where `model` is an engine.
        settings: the fields of `TranscriptionSettings`.

    Returns a Transcript for a single file, and a list in order for a list. Raises the MowaError of the first recording
    that fails; `iter_transcripts` continues instead.
    """
    transcription_settings = TranscriptionSettings(**settings)
    engine: Engine
    options: Any = {"device": device, "dtype": dtype, "threads": threads}
    if isinstance(model, str) and (folder := resolve_artifact(model)) is not None:
        engine = selection.open_artifact(folder, adapter=adapter, **options).engine
    else:
        if not isinstance(model, PyTorchEngine):
            loaded = load(model or resolve_base_model(adapter)) if model is None or isinstance(model, str) else model
            model = pytorch.open_engine(loaded, **options)
        engine = model.with_adapter(adapter)
    single = isinstance(files, str | Path)
    if single and Path(str(files)).is_dir():
        raise AudioError(
            f"{files}: is a folder. Pass it in a list, transcribe([folder]), to get a list of transcripts."
        )
    found = audio.find_audio_files([files] if isinstance(files, str | Path) else files)
    transcripts = []
    for outcome in iter_transcripts(found, engine, transcription_settings):
        if isinstance(outcome, Failure):
            raise outcome.error
        transcripts.append(outcome)
    return transcripts[0] if single else transcripts


def load_engine(spec: EngineSpec) -> EngineChoice:
    """Load the model or export of a spec and select its engine. Raises as `load` and `select_engine` do."""
    options: Any = {"device": spec.device, "dtype": spec.dtype, "threads": spec.threads, "adapter": spec.adapter}
    if (folder := resolve_artifact(spec.model)) is not None:
        return selection.open_artifact(folder, name=spec.engine, **options)
    model = load(spec.model, revision=spec.revision, offline=spec.offline)
    return selection.select_engine(model, name=spec.engine, **options)


def resolve_artifact(name: str) -> Path | None:
    """Return the folder `name` if it holds an export that an engine other than PyTorch runs, else None."""
    folder = Path(name)
    if name in MODEL_ALIASES or not is_export(folder) or read_artifact(folder).format == "safetensors":
        return None
    return folder


def resolve_base_model(adapter: str | Path | None) -> str:
    """Return the name of the base model of an adapter's folder; pl-tiny for None."""
    return DEFAULT_MODEL if adapter is None else checkpoint.read_adapter(adapter).base.load_name


def iter_transcripts(
    files: Iterable[str | Path],
    engine: Engine,
    settings: TranscriptionSettings | None = None,
    *,
    on_progress: Callable[[float], object] = lambda seconds: None,
) -> Iterator[Transcript | Failure]:
    """Yield one outcome per file, in order: its transcript, or a Failure for a file that cannot be read to its end.

    `on_progress` is called with the seconds of audio of each batch.
    """
    examples = (Example(str(file), str(file), "", 0.0) for file in files)
    for _, outcome in pipeline.transcribe_examples(
        examples, engine, settings or TranscriptionSettings(), on_progress=on_progress
    ):
        yield outcome
