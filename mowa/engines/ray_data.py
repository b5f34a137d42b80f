"""A corpus on several machines: the job of `corpus`, spread by Ray Data; the journal stays on the machine that asks.

Every part of the source is listed, decoded and heard on a worker; what comes back are lines of the journal. A worker
that dies is replaced and its recordings are done again, so a line may come twice; the journal takes the first. Ray must
be the same version everywhere, mowa be installed, and the sources be found by the same names (a shared disk, or
addresses such as s3://… with `remote`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mowa.engines import batch, pipeline
from mowa.engines.batch import CorpusSource
from mowa.engines.results import ResultsFile, to_record
from mowa.engines.settings import EngineSpec, TranscriptionSettings, WorkerPool
from mowa.errors import MissingDependency, ModelError, MowaError
from mowa.types import Example

RECORDINGS_PER_BATCH = 16  # recordings that a worker is given at a time


def transcribe_on_ray(
    source: CorpusSource,
    spec: EngineSpec,
    settings: TranscriptionSettings,
    results: ResultsFile,
    *,
    address: str = "auto",
    workers: WorkerPool | None = None,
    on_progress: Callable[[float], object] = lambda seconds: None,
    on_failure: Callable[[pipeline.Failure], object] = lambda failure: None,
    allow_remote: bool = False,
) -> None:
    """Transcribe what is not in `journal` yet on the cluster at `address` (auto: the one that runs, else this machine).

    MissingPart without Ray. ModelError: no cluster there, or no room in it for one worker. What a worker raises (a
    model that is not there, a broken manifest) is raised here; all that was done until then is in the journal.
    """
    ray = _ray()
    workers = workers or WorkerPool()
    ours = _join(ray, address)
    try:
        data = _planned(ray, source, spec, settings, workers, ray.put(frozenset(results.done_ids)), allow_remote)
        for table in data.iter_batches(batch_size=None, batch_format="pyarrow"):
            for row in map(_row, table.column("line").to_pylist()):
                if row["id"] in results.done_ids:
                    continue
                results.add_record(row)
                on_progress(row.get("duration_s", 0.0))
                if "error" in row:
                    on_failure(pipeline.Failure(row["file"], MowaError(row["error"])))
    except ray.exceptions.RayError as wrong:
        raise _cause(wrong) from wrong
    finally:
        if ours:
            ray.shutdown()


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report home
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.data
    except ImportError:
        raise MissingDependency("transcribing on a cluster needs Ray: pip install 'mowa[ray]'") from None
    return ray


def _join(ray: Any, address: str) -> bool:
    """Connect, unless this process is connected. → whether it was not."""
    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as wrong:
        if address != "auto":
            reason = (str(wrong).splitlines() or [type(wrong).__name__])[0]
            raise ModelError(f"no Ray cluster answers at {address} ({reason}). Start one: ray start --head") from None
        ray.init(include_dashboard=False, **quiet)
    return True


def _planned(
    ray: Any,
    source: CorpusSource,
    wanted: EngineSpec,
    settings: TranscriptionSettings,
    workers: WorkerPool,
    done: Any,
    remote: bool,
) -> Any:
    """The job as a Ray data set of lines. Nothing runs yet."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    room = ray.cluster_resources()
    most = min(workers.max_size or 10**6, _room(room, workers))
    if workers.num_cpus > room.get("CPU", 0) or workers.num_gpus > room.get("GPU", 0):
        there = f"{room.get('CPU', 0):g} processors and {room.get('GPU', 0):g} GPUs"
        raise ModelError(
            f"the cluster has {there}, and a worker wants {workers.num_cpus:g} and {workers.num_gpus:g}: ask for less"
        )
    least = min(workers.min_size, most)
    parts = max(2 * most, 2)

    def listed(numbers: Any) -> Iterator[Any]:
        known = ray.get(done)
        for number in numbers.column("id").to_pylist():
            yield from _tables(batch.shard(source.examples(), number + 1, parts), known)

    return (
        ray.data.range(parts, override_num_blocks=parts)
        .map_batches(listed, batch_size=1, batch_format="pyarrow", num_cpus=0.1)
        .map_batches(
            TranscriptionWorker,
            fn_constructor_kwargs={"wanted": wanted, "settings": settings, "remote": remote},
            batch_size=RECORDINGS_PER_BATCH,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most),
            num_cpus=workers.num_cpus,
            num_gpus=workers.num_gpus or None,
        )
    )


def _room(room: Mapping[str, float], workers: WorkerPool) -> int:
    """How many workers fit, leaving a little of a processor to those that list."""
    by_cpus = int((room.get("CPU", 0) - 0.1) // workers.num_cpus) if workers.num_cpus else 10**6
    by_gpus = int(room.get("GPU", 0) // workers.num_gpus) if workers.num_gpus else 10**6
    return max(min(by_cpus, by_gpus), 1)


def _tables(examples: Iterator[Example], done: frozenset[str]) -> Iterator[Any]:
    """What is not done, in Arrow tables of a few recordings."""
    held: list[Example] = []
    for example in examples:
        if example.id not in done:
            held.append(example)
        if len(held) == RECORDINGS_PER_BATCH:
            yield _table(held)
            held = []
    yield _table(held)


def _table(examples: Sequence[Example]) -> Any:
    import pyarrow

    kinds = {"id": pyarrow.string(), "audio": pyarrow.string(), "duration_s": pyarrow.float64()}
    kinds |= {"begin_s": pyarrow.float64(), "part": pyarrow.bool_(), "sound": pyarrow.binary()}
    rows = [{name: getattr(example, name) for name in kinds} for example in examples]
    return pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(kinds.items()))


class TranscriptionWorker:
    """A worker: the model, loaded once, and the pipeline over what it is given."""

    def __init__(self, spec: EngineSpec, settings: TranscriptionSettings, allow_remote: bool) -> None:
        from mowa.engines.transcription import load_engine

        self.engine, self.settings, self.allow_remote = load_engine(spec).engine, settings, allow_remote

    def __call__(self, table: Any) -> Any:
        import json

        import pyarrow

        examples = [Example(text="", **row) for row in table.to_pylist()]
        found = pipeline.transcribe_examples(examples, self.engine, self.settings, allow_remote=self.allow_remote)
        lines = [json.dumps(to_record(example, outcome)) for example, outcome in found]
        return pyarrow.table({"line": pyarrow.array(lines, pyarrow.string())})


def _row(text: str) -> dict[str, Any]:
    import json

    row: dict[str, Any] = json.loads(text)
    return row


def _cause(wrong: BaseException) -> MowaError:
    """What went wrong on the worker, in a line."""
    seen: BaseException | None = wrong
    while seen is not None:
        if isinstance(seen, MowaError):
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    return ModelError(f"the cluster gave up ({(str(wrong).strip().splitlines() or [type(wrong).__name__])[-1]})")
