"""A corpus, transcribed into a journal: a job that always ends, and can always be gone on with.

It knows what of a run may not change halfway; it refuses to know where recordings are listed, and how they are heard.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mowa import hardware
from mowa.adapters import checkpoint
from mowa.data.manifests import examples as sources
from mowa.engines import pipeline
from mowa.engines.pipeline import Failure
from mowa.engines.protocol import Engine
from mowa.engines.results import ResultsFile
from mowa.engines.settings import TranscriptionSettings
from mowa.errors import AudioError
from mowa.types import Example

DECODE_TIMEOUT_S = 600.0  # no recording takes that long to decode
COST_ONLY_SETTINGS = {"batch_s"}  # settings that cost time or memory, and no letter
VERSIONED_PACKAGES = ("mowa", "torch", "transformers", "onnxruntime", "soundfile", "av", "soxr")


@dataclass(frozen=True, slots=True)
class CorpusSource:
    """What a run listens to: names as `sources.entries` takes them, or (`shard`, of `of`) a part of it."""

    sources: tuple[str, ...]
    split: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    shard: tuple[int, int] | None = None

    def examples(self) -> Iterator[Example]:
        found = sources.list_examples(self.sources, self.split, columns=self.columns)
        return shard(found, *self.shard) if self.shard else found


def build_header(
    engine: Engine, settings: TranscriptionSettings, *, adapter: Path | None = None, shard: str = ""
) -> dict[str, Any]:
    """What the first line of a journal says: which model and settings, and by which versions."""
    origin = engine.origin
    model: dict[str, Any] = {"name": origin.name, "source": origin.source, "revision": origin.revision}
    if origin.revision is None:
        model["sha256"] = checkpoint.hash_weights(origin.folder)
    if adapter is not None:
        model["adapter"] = checkpoint.read_adapter(adapter).sha256
    fixed = {key: value for key, value in asdict(settings).items() if key not in COST_ONLY_SETTINGS}
    return {
        "model": model,
        "settings": fixed | {"engine": engine.name, "dtype": engine.dtype},
        "versions": {name: found for name in VERSIONED_PACKAGES if (found := checkpoint.installed_version(name))},
        "shard": shard or None,
    }


def try_decode_in_subprocess(example: Example) -> AudioError | None:
    """Decode a recording in a process of its own. → what to say where that dies or does not end; None otherwise.

    A decoder's fault ends its process, be it the one that transcribes: what a killed run had begun is tried like this.
    """
    code = (
        "import sys; from mowa.data import audio, decoders; from mowa.errors import MowaError\n"
        "source = decoders.Blob('-', sys.stdin.buffer.read()) if sys.argv[1] == '-' else sys.argv[1]\n"
        "try: sum(map(len, audio.stream(source)))\nexcept MowaError: pass\n"
    )
    command = [sys.executable, "-c", code, example.audio if example.audio_bytes is None else "-"]
    try:
        done = subprocess.run(
            command, input=example.audio_bytes, capture_output=True, timeout=DECODE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return AudioError(f"{example.audio}: its decoding does not end. Convert it with ffmpeg, or leave it out.")
    if done.returncode < 0:
        signal = -done.returncode
        return AudioError(f"{example.audio}: crashes its decoder (signal {signal}). Convert it with ffmpeg.")
    return None


def shard(examples: Iterable[Example], index: int, count: int) -> Iterator[Example]:
    """Every `count`-th one, from the `index`-th (of 1 to `count`) on."""
    return (example for number, example in enumerate(examples) if number % count == index - 1)


def transcribe_corpus(
    examples: Iterable[Example],
    engine: Engine,
    settings: TranscriptionSettings,
    results: ResultsFile,
    *,
    decode_threads: int | None = None,
    allow_remote: bool = False,
    on_progress: Callable[[float], object] = lambda seconds: None,
    on_failure: Callable[[Failure], object] = lambda failure: None,
) -> Mapping[str, int]:
    """Transcribe what is not in `journal` yet, and write it there, one line each. → how many were done, and failed.

    What comes first is written first. An id that comes twice is done once. Raises as `pipeline.outcomes` and
    `Journal.add` do; all that was done until then is in the journal.
    """
    asked: set[str] = set()

    def new() -> Iterator[Example]:
        for example in examples:
            if example.id not in results.done_ids and example.id not in asked:
                asked.add(example.id)
                yield example

    counts = {"done": 0, "failed": 0}
    threads = decode_threads or max(1, hardware.cpu_count() // 2)

    def begun(example: Example) -> AudioError | None:
        results.mark_started(example.id)
        return try_decode_in_subprocess(example) if example.id in results.suspect_ids else None

    how: Any = {"decoders": threads, "begun": begun, "ordered": False, "remote": allow_remote, "heard": on_progress}
    for example, outcome in pipeline.transcribe_examples(new(), engine, settings, **how):
        results.add(example, outcome)
        asked.discard(example.id)
        counts["failed" if isinstance(outcome, Failure) else "done"] += 1
        if isinstance(outcome, Failure):
            on_failure(outcome)
    return counts
