"""Transcribe a corpus into a results log: a batch job that tolerates bad files and can be resumed at any point."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mowa import hardware
from mowa.adapters.loading import adapter_sha256
from mowa.data.manifests.examples import list_examples
from mowa.engines import pipeline
from mowa.engines.protocol import Engine
from mowa.engines.results import ResultsFile
from mowa.engines.settings import TranscriptionSettings
from mowa.errors import AudioError, ModelError
from mowa.hardware import installed_version
from mowa.io.hashing import hash_weights
from mowa.io.manifest import find_manifest
from mowa.types import Example, Failure

DECODE_TIMEOUT_S = 600.0  # of one recording
COST_ONLY_SETTINGS = {"batch_s"}  # settings that do not change transcripts
VERSIONED_PACKAGES = ("mowa", "torch", "transformers", "onnxruntime", "soundfile", "av", "soxr")


@dataclass(frozen=True, slots=True)
class CorpusSource:
    """Sources of a batch job, as `list_examples` takes them; with `shard` (index, count), a part of their examples."""

    sources: tuple[str, ...]
    split: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    shard: tuple[int, int] | None = None

    def examples(self) -> Iterator[Example]:
        found = list_examples(self.sources, self.split, columns=self.columns)
        return shard(found, *self.shard) if self.shard else found


def build_header(
    engine: Engine, settings: TranscriptionSettings, *, adapter: str | Path | None = None, shard: str = ""
) -> dict[str, Any]:
    """Return the header of a results log: model, settings, package versions and shard."""
    origin = engine.origin
    model: dict[str, Any] = {"name": origin.name, "source": origin.source, "revision": origin.revision}
    if origin.revision is None:
        model["sha256"] = _hash_model(origin.folder)
    if origin.target_lang is not None:
        model["target_lang"] = origin.target_lang
    if adapter is not None:
        model["adapter"] = adapter_sha256(Path(adapter))
    result_settings = {key: value for key, value in asdict(settings).items() if key not in COST_ONLY_SETTINGS}
    return {
        "model": model,
        "settings": result_settings | {"engine": engine.name, "dtype": engine.dtype},
        "versions": {name: found for name in VERSIONED_PACKAGES if (found := installed_version(name))},
        "shard": shard or None,
    }


def _hash_model(folder: Path) -> str:
    """Return the SHA-256 (hex) of a checkpoint's weights; of the list of an export's files, where it has none.

    Raises ModelError as `hash_weights`.
    """
    try:
        return hash_weights(folder)
    except ModelError:
        manifest = find_manifest(folder)
        if manifest is None or manifest.artifact != "export":
            raise
        return hashlib.sha256(
            "".join(f"{sum_}  {name}\n" for name, sum_ in manifest.files.items()).encode()
        ).hexdigest()


def try_decode_in_subprocess(example: Example) -> AudioError | None:
    """Decode a recording in a child process; return an error if that process crashes or does not end, else None.

    For recordings that an earlier, killed run had started: a decoder that crashes takes its process with it.
    """
    code = (
        "import sys; from mowa.data import audio; from mowa.data.audio.decoders import AudioBytes\n"
        "from mowa.errors import MowaError\n"
        "source = AudioBytes('-', sys.stdin.buffer.read()) if sys.argv[1] == '-' else sys.argv[1]\n"
        "try: sum(map(len, audio.stream_audio(source)))\nexcept MowaError: pass\n"
    )
    command = [sys.executable, "-c", code, example.audio if example.audio_bytes is None else "-"]
    try:
        done = subprocess.run(
            command, input=example.audio_bytes, capture_output=True, timeout=DECODE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return AudioError(
            f"{example.audio}: decoding did not end after {DECODE_TIMEOUT_S:.0f} s. Convert it with ffmpeg."
        )
    if done.returncode < 0:
        signal = -done.returncode
        return AudioError(
            f"{example.audio}: crashed its decoder (signal {signal}). Convert it with ffmpeg, or leave it out."
        )
    return None


def shard(examples: Iterable[Example], index: int, count: int) -> Iterator[Example]:
    """Return every `count`-th example, starting at the `index`-th (1 to `count`)."""
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
    """Transcribe the examples that are not in `results` yet and add a record of each.

    Records are added as they are finished, not in order; an id that occurs twice is transcribed once. `on_progress` is
    called with seconds of audio, `on_failure` with every failed recording. Return the number of examples "done" and
    "failed". Raises as `transcribe_examples` and `ResultsFile.add` do; what was finished until then is in the log.
    """
    pending: set[str] = set()

    def new() -> Iterator[Example]:
        for example in examples:
            if example.id not in results.done_ids and example.id not in pending:
                pending.add(example.id)
                yield example

    counts = {"done": 0, "failed": 0}
    threads = decode_threads or max(1, hardware.cpu_count() // 2)

    def before_decode(example: Example) -> AudioError | None:
        results.mark_started(example.id)
        return try_decode_in_subprocess(example) if example.id in results.suspect_ids else None

    outcomes = pipeline.transcribe_examples(
        new(),
        engine,
        settings,
        decode_threads=threads,
        ordered=False,
        allow_remote=allow_remote,
        before_decode=before_decode,
        on_progress=on_progress,
    )
    for example, outcome in outcomes:
        results.add(example, outcome)
        pending.discard(example.id)
        counts["failed" if isinstance(outcome, Failure) else "done"] += 1
        if isinstance(outcome, Failure):
            on_failure(outcome)
    return counts
