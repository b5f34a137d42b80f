"""Transcribe files with a model given by name: what `mowa.transcribe` and `mowa transcribe` share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from mowa import loading
from mowa.adapters.loading import is_adapter, read_base_name
from mowa.data.audio import AudioBytes
from mowa.engines import pipeline, selection
from mowa.engines.protocol import Engine
from mowa.engines.registry import ENGINES
from mowa.engines.selection import EngineChoice
from mowa.engines.settings import EngineSpec, TranscriptionSettings
from mowa.errors import ModelError
from mowa.io.hub import MODEL_ALIASES
from mowa.io.manifest import find_manifest
from mowa.loading.gguf import is_gguf
from mowa.tasks.verbs import require_ctc
from mowa.types import CTCModel, Example, Failure, Model, Transcript

DEFAULT_MODEL = "pl-tiny"


def open_engine(model: str | Path | CTCModel | Engine | None, spec: EngineSpec) -> Engine:
    """Return the engine for `model`: a name, a loaded model, or an engine, whose adapter the spec then selects.

    None is the adapter's base model, or pl-tiny. The engine of a name or model is selected as `mowa transcribe` does.
    Raises as `load` and `select_engine` do.
    """
    if model is None or isinstance(model, str | Path):
        return load_engine(replace(spec, model=str(model or ""))).engine
    if isinstance(model, Model):
        options: Any = {"device": spec.device, "dtype": spec.dtype, "threads": spec.threads, "adapter": spec.adapter}
        return selection.select_engine(require_ctc(model, "transcribe"), name=spec.engine, **options).engine
    if not (hasattr(model, "emissions") and hasattr(model, "preprocessing")):
        raise ModelError(
            f"a value of type {type(model).__name__} is no speech model: pass its name or folder, what mowa.load"
            " returned, or an engine of mowa.open_engine"
        )
    given = [
        name for name in ("dtype", "threads", "revision", "target_lang") if getattr(spec, name) not in ("auto", None)
    ]
    if given:
        raise ModelError(f"the {model.name} engine is open already: give {', '.join(given)} where it is opened")
    if spec.adapter is None:
        return model
    info = ENGINES.find(model.name)
    if info is None or "adapters" not in info.capabilities:
        raise ModelError(f"the {model.name} engine takes no adapter: open the model with the adapter instead")
    adapted: Engine = cast(Any, model).with_adapter(spec.adapter)
    return adapted


def load_engine(spec: EngineSpec) -> EngineChoice:
    """Load the model, export or adapter of a spec and select its engine. Raises as `load` and `select_engine` do.

    An empty model is the adapter's base model, or pl-tiny.
    """
    spec = resolve_spec(spec)
    options: Any = {"device": spec.device, "dtype": spec.dtype, "threads": spec.threads, "adapter": spec.adapter}
    if (folder := resolve_artifact(spec.model)) is not None:
        if spec.target_lang is not None:
            raise ModelError(f"{folder} is an export and takes no target_lang: omit {spec.target_lang!r}")
        return selection.open_artifact(folder, name=spec.engine, **options)
    model = loading.load(
        spec.model, task="ctc", revision=spec.revision, offline=spec.offline, target_lang=spec.target_lang
    )
    has_files = not is_gguf(spec.model)  # whose checksums stand for the weights
    return selection.select_engine(model, name=spec.engine, **options, from_disk=has_files)


def resolve_spec(spec: EngineSpec) -> EngineSpec:
    """Return `spec` with its model named; where it is none, or an adapter's folder: pl-tiny, or the base model."""
    if is_adapter(Path(spec.model)) and spec.model not in MODEL_ALIASES and spec.adapter is None:
        spec = replace(spec, model="", adapter=spec.model)
    return replace(spec, model=spec.model or resolve_base_model(spec.adapter))


def resolve_artifact(name: str) -> Path | None:
    """Return the folder `name` if it holds an export that `mowa.load` does not open, else None.

    Raises ModelError as `find_manifest`.
    """
    manifest = None if name in MODEL_ALIASES else find_manifest(Path(name))
    return Path(name) if manifest is not None and manifest.artifact == "export" else None


def resolve_base_model(adapter: str | Path | None) -> str:
    """Return the name of the base model of an adapter's folder; pl-tiny for None."""
    return DEFAULT_MODEL if adapter is None else read_base_name(Path(adapter))


def iter_transcripts(
    sources: Iterable[str | Path | AudioBytes | Failure],
    engine: Engine,
    settings: TranscriptionSettings | None = None,
    *,
    on_progress: Callable[[float], object] = lambda seconds: None,
) -> Iterator[Transcript | Failure]:
    """Yield one outcome per recording, in order: its transcript, or a Failure if it cannot be read to its end.

    A Failure among the sources is yielded in its place. `on_progress` is called with the seconds of each batch.
    """
    failures: dict[str, Failure] = {}

    def examples() -> Iterator[Example]:
        for number, source in enumerate(sources):
            if isinstance(source, Failure):
                failures[str(number)] = source
                yield Example(str(number), source.file, "", 0.0)
            elif isinstance(source, AudioBytes):
                yield Example(str(number), source.name, "", 0.0, audio_bytes=source.data)
            else:
                yield Example(str(number), str(source), "", 0.0)

    for _, outcome in pipeline.transcribe_examples(
        examples(),
        engine,
        settings or TranscriptionSettings(),
        before_decode=lambda example: failures[example.id].error if example.id in failures else None,
        on_progress=on_progress,
    ):
        yield outcome
