"""Transcribe a corpus into a results log that can be resumed: `mowa.transcribe_corpus`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from mowa.api.options import TranscribeOptions, split_options
from mowa.engines import batch, ray_data, transcription
from mowa.engines.batch import CorpusSource
from mowa.engines.results import ResultsFile
from mowa.engines.selection import EngineChoice
from mowa.engines.settings import TranscriptionSettings, WorkerPool
from mowa.types import Failure

__all__ = ["CorpusSummary", "WorkerPool", "transcribe_corpus"]


@dataclass(frozen=True, slots=True)
class CorpusSummary:
    """A results log after a run: how many recordings it holds, and how many of them failed."""

    results: Path
    recordings: int
    failed: int


def transcribe_corpus(
    sources: str | Path | Sequence[str | Path],
    results: str | Path,
    model: str | None = None,
    *,
    split: str = "",
    columns: Mapping[str, str] | None = None,
    shard: tuple[int, int] | None = None,
    retry_failed: bool = False,
    decode_threads: int | None = None,
    allow_remote: bool = False,
    ray: str = "",
    workers: WorkerPool | None = None,
    on_open: Callable[[EngineChoice, ResultsFile], object] = lambda choice, log: None,
    on_progress: Callable[[float], object] = lambda seconds: None,
    on_failure: Callable[[Failure], object] = lambda failure: None,
    **options: Unpack[TranscribeOptions],
) -> CorpusSummary:
    """Transcribe a corpus into a results log, one JSON line per recording; called again, it resumes.

    Args:
        sources: files, folders, patterns, manifests, corpora or archives, as in docs/corpora.md.
        results: the log (JSON Lines).
        model: as in `mowa.transcribe`, by name.
        split: split of the corpus; empty: train, or the only one.
        columns: role (audio, id, duration, offset) → column of a table.
        shard: (index from 1, count): every count-th recording only.
        retry_failed: transcribe again what failed.
        decode_threads: threads that decode audio ahead; None: half the cores.
        allow_remote: open remote URLs that a manifest lists.
        ray: address of a Ray cluster, or auto; empty: this process.
        workers: number of Ray workers and resources of each; None: as many as fit.
        on_open: called with the engine's choice and the opened log, before the first recording.
        on_progress, on_failure: called with seconds of audio, and with every failed recording.
        options: as in `mowa.transcribe`.

    Raises:
        MowaError: the model cannot be loaded, the log is of another model or settings, or a source cannot be listed.
            What was finished until then is in the log.
    """
    spec, settings = split_options("transcribe_corpus", TranscriptionSettings, options)
    spec = transcription.resolve_spec(replace(spec, model=model or ""))
    names = (sources,) if isinstance(sources, str | Path) else sources
    source = CorpusSource(tuple(map(str, names)), split, columns or {}, shard)
    choice = transcription.load_engine(spec)
    opened = choice.engine
    part = "/".join(map(str, shard)) if shard else ""
    header = batch.build_header(opened, settings, adapter=spec.adapter, shard=part)
    common: Any = {"allow_remote": allow_remote, "on_progress": on_progress, "on_failure": on_failure}
    with ResultsFile.open(Path(results), header, retry_failed=retry_failed) as log:
        on_open(choice, log)
        if ray:
            spec = replace(spec, engine=opened.name, dtype=opened.dtype)
            ray_data.transcribe_on_ray(source, spec, settings, log, address=ray, workers=workers, **common)
        else:
            batch.transcribe_corpus(source.examples(), opened, settings, log, decode_threads=decode_threads, **common)
        return CorpusSummary(Path(results), len(log.done_ids), log.num_failed)
