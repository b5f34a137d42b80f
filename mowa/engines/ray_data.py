"""Transcribe a corpus on several machines with Ray Data; the results log stays on the machine that started the job.

Workers list, decode and transcribe parts of the source and return records. A worker that dies is replaced and its
recordings are transcribed again, so a record may arrive twice; the first one is kept. Every machine needs the same
version of Ray, mowa, and access to the sources by the same names (a shared disk, or URLs such as s3://… with
`allow_remote`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mowa.engines import batch, pipeline
from mowa.engines.batch import CorpusSource
from mowa.engines.results import ResultsFile, to_record
from mowa.engines.settings import EngineSpec, TranscriptionSettings, WorkerPool
from mowa.errors import MissingDependency, ModelError, MowaError
from mowa.types import Example

RECORDINGS_PER_BATCH = 16  # sent to a worker in one table


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
    """Transcribe the examples that are not in `results` yet on the Ray cluster at `address`.

    "auto" is the running cluster, else this machine. Raises MissingDependency without Ray, ModelError if there is no
    cluster or it has no resources for one worker, and what a worker raises (an unknown model, a broken manifest); what
    was finished until then is in the log.
    """
    ray = _ray()
    workers = workers or WorkerPool()
    connected = _connect(ray, address)
    try:
        data = _dataset(ray, source, spec, settings, workers, ray.put(frozenset(results.done_ids)), allow_remote)
        for table in data.iter_batches(batch_size=None, batch_format="pyarrow"):
            for record in map(json.loads, table.column("record").to_pylist()):
                if record["id"] in results.done_ids:
                    continue
                results.add_record(record)
                on_progress(record.get("duration_s", 0.0))
                if "error" in record:
                    on_failure(pipeline.Failure(record["file"], MowaError(record["error"])))
    except ray.exceptions.RayError as error:
        raise _cause(error) from error
    finally:
        if connected:
            ray.shutdown()


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.data
    except ImportError:
        raise MissingDependency("transcribing on a cluster needs Ray: pip install 'mowa[ray]'") from None
    return ray


def _connect(ray: Any, address: str) -> bool:
    """Connect to the cluster unless this process is connected already; return whether it connected."""
    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        if address != "auto":
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(f"no Ray cluster answers at {address} ({reason}). Start one: ray start --head") from None
        ray.init(include_dashboard=False, **quiet)
    return True


def _dataset(
    ray: Any,
    source: CorpusSource,
    spec: EngineSpec,
    settings: TranscriptionSettings,
    workers: WorkerPool,
    done_ids: Any,
    allow_remote: bool,
) -> Any:
    """Return the lazy Ray dataset of records."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    resources = ray.cluster_resources()
    if workers.num_cpus > resources.get("CPU", 0) or workers.num_gpus > resources.get("GPU", 0):
        raise ModelError(
            f"the cluster has {resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs; one worker needs"
            f" {workers.num_cpus:g} and {workers.num_gpus:g}: lower --worker-cpus or --worker-gpus"
        )
    max_size = min(workers.max_size or 10**6, _max_workers(resources, workers))
    num_parts = max(2 * max_size, 2)

    def list_part(numbers: Any) -> Iterator[Any]:
        done = ray.get(done_ids)
        for number in numbers.column("id").to_pylist():
            yield from _tables(batch.shard(source.examples(), number + 1, num_parts), done)

    return (
        ray.data.range(num_parts, override_num_blocks=num_parts)
        .map_batches(list_part, batch_size=1, batch_format="pyarrow", num_cpus=0.1)
        .map_batches(
            TranscriptionWorker,
            fn_constructor_kwargs={"spec": spec, "settings": settings, "allow_remote": allow_remote},
            batch_size=RECORDINGS_PER_BATCH,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=min(workers.min_size, max_size), max_size=max_size),
            num_cpus=workers.num_cpus,
            num_gpus=workers.num_gpus or None,
        )
    )


def _max_workers(resources: Mapping[str, float], workers: WorkerPool) -> int:
    """Return how many workers fit, leaving 0.1 CPU for the tasks that list examples."""
    by_cpus = int((resources.get("CPU", 0) - 0.1) // workers.num_cpus) if workers.num_cpus else 10**6
    by_gpus = int(resources.get("GPU", 0) // workers.num_gpus) if workers.num_gpus else 10**6
    return max(min(by_cpus, by_gpus), 1)


def _tables(examples: Iterator[Example], done_ids: frozenset[str]) -> Iterator[Any]:
    """Yield the examples that are not done in Arrow tables of RECORDINGS_PER_BATCH rows."""
    rows: list[Example] = []
    for example in examples:
        if example.id not in done_ids:
            rows.append(example)
        if len(rows) == RECORDINGS_PER_BATCH:
            yield _table(rows)
            rows = []
    yield _table(rows)


def _table(examples: Sequence[Example]) -> Any:
    import pyarrow

    types = {
        "id": pyarrow.binary(),  # names may not be UTF-8
        "audio": pyarrow.binary(),
        "duration_s": pyarrow.float64(),
        "offset_s": pyarrow.float64(),
        "is_excerpt": pyarrow.bool_(),
        "audio_bytes": pyarrow.binary(),
        "error": pyarrow.string(),
    }
    rows = [
        {name: getattr(example, name) for name in types}
        | {"id": _to_bytes(example.id), "audio": _to_bytes(example.audio)}
        | {"error": example.error.encode("utf-8", "backslashreplace").decode()}
        for example in examples
    ]
    return pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(types.items()))


def _to_bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _to_text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


class TranscriptionWorker:
    """A Ray actor that loads the model once and transcribes tables of recordings."""

    def __init__(self, spec: EngineSpec, settings: TranscriptionSettings, allow_remote: bool) -> None:
        from mowa.engines.transcription import load_engine

        self.engine, self.settings, self.allow_remote = load_engine(spec).engine, settings, allow_remote

    def __call__(self, table: Any) -> Any:
        import pyarrow

        rows = ({**row, "id": _to_text(row["id"]), "audio": _to_text(row["audio"])} for row in table.to_pylist())
        examples = [Example(text="", **row) for row in rows]
        outcomes = pipeline.transcribe_examples(examples, self.engine, self.settings, allow_remote=self.allow_remote)
        records = [json.dumps(to_record(example, outcome)) for example, outcome in outcomes]
        return pyarrow.table({"record": pyarrow.array(records, pyarrow.string())})


def _cause(error: BaseException) -> MowaError:
    """Return the MowaError that a worker raised, or a ModelError with Ray's last line."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MowaError):
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    return ModelError(f"the Ray job failed ({(str(error).strip().splitlines() or [type(error).__name__])[-1]})")
