"""Make a speech corpus from sentences with a text-to-speech program: recordings and manifests.

A recording's file name is a hash of all its inputs, so a run that was interrupted, or that gets more sentences, makes
only the missing recordings. `mowa.data.tts.plan` chooses voices, `mowa.data.tts.speaker` runs the program.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mowa import hardware
from mowa.data.tts.engines import open_engine
from mowa.data.tts.plan import Clip, plan_clips
from mowa.data.tts.speaker import Failure, Recording, Speaker, run_parallel
from mowa.errors import DataError
from mowa.io.atomic import atomic_write

MAX_FAILURES_AT_START = 20  # the run stops if this many recordings fail before the first success


@dataclass(frozen=True, slots=True)
class SplitSummary:
    """Recordings in a manifest, their total length in seconds, and how many voices they have."""

    manifest: Path
    recordings: int
    duration_s: float
    voices: int


@dataclass(frozen=True, slots=True)
class SynthesisReport:
    """What a run wrote.

    Attributes:
        splits: "train" and, if it is not empty, "dev".
        reused: recordings that were there before.
        failures: recordings that were skipped, in the order of the sentences.
        unlisted: files in `audio/` that no manifest names, left by runs with other options.
    """

    splits: dict[str, SplitSummary]
    reused: int
    failures: tuple[Failure, ...]
    unlisted: int


def synthesize(
    sentences: Iterable[str],
    out: str | Path,
    *,
    language: str,
    engine: str = "espeak-ng",
    voices: Sequence[str] = (),
    rates: Sequence[float] = (),
    pitches: Sequence[float] = (),
    command: str = "",
    encoding: str = "",
    clips: int | None = None,
    dev: float = 0.05,
    sample_rate_hz: int = 16_000,
    seed: int = 0,
    processes: int | None = None,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
    on_failure: Callable[[Failure], object] = lambda failure: None,
) -> SynthesisReport:
    """Speak sentences with a text-to-speech program and write `out/audio/*.flac`, `train.jsonl` and `dev.jsonl`.

    A manifest row has `id`, `audio` (relative to the manifest), `text`, `duration_s`, `speaker`, `language`, `engine`
    and, where they were chosen, `rate` and `pitch`. Recordings are mono 16-bit FLAC. The same call continues an
    interrupted run. Manifests are written last, and atomically.

    Args:
        sentences: one sentence each; blank ones and repetitions are skipped.
        out: folder to write to, created if missing.
        language, engine, voices, rates, pitches, command, encoding: as in `mowa.data.tts.engines.open_engine`.
        clips: number of recordings; by default one per sentence. If larger, sentences are spoken again by other
            voices; if smaller, sentences are drawn.
        dev: share of the sentences that go to `dev.jsonl`, 0 ≤ dev < 1. With three voices or more, the same share of
            the voices (at least one) speaks only these.
        sample_rate_hz: of the recordings.
        seed: of the choice of sentences, voices, rates and pitches. Which sentences are in dev does not depend on it.
        processes: number of engine processes that run in parallel; by default one per processor.
        on_progress: called with (recordings finished or skipped, recordings in all).
        on_failure: called with each recording that is skipped.

    Raises:
        DataError: no sentences, options that do not fit, more recordings than there are combinations of voice, rate
            and pitch, nothing that the engine could speak, or a folder that cannot be written or is in use.
        MissingDependency: the engine is not installed.
    """
    if not 0 <= dev < 1:
        raise DataError(f"dev is {dev:g}; it is a share of the sentences, from 0 to less than 1")
    out = Path(out)
    options: dict[str, Any] = {"voices": voices, "rates": rates, "pitches": pitches}
    tts = open_engine(engine, language, **options, command=command, encoding=encoding)
    plan = plan_clips(sentences, tts, language, clips=clips, dev=dev, seed=seed, sample_rate_hz=sample_rate_hz)
    try:
        with _locked(out), _working_folder(out) as work:
            speaker = Speaker(tts, out / "audio", work, sample_rate_hz)
            with closing(run_parallel(speaker, plan, processes or hardware.cpu_count())) as results:
                spoken, failures = _collect(results, len(plan), on_progress, on_failure)
            durations = {plan[index].id: recording.duration_s for index, recording in spoken.items()}
            splits = _write_manifests(out, plan, durations, language, engine)
            present = sum(file.suffix == ".flac" for file in (out / "audio").iterdir())
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror or error}") from None
    reused = sum(recording.is_reused for recording in spoken.values())
    ordered = tuple(failures[index] for index in sorted(failures))
    return SynthesisReport(splits, reused, ordered, unlisted=present - len(durations))


def _collect(
    results: Iterable[tuple[int, Recording | Failure]],
    total: int,
    on_progress: Callable[[int, int], object],
    on_failure: Callable[[Failure], object],
) -> tuple[dict[int, Recording], dict[int, Failure]]:
    """Return the recordings and the failures by index. Raises DataError if the first `MAX_FAILURES_AT_START` fail."""
    spoken: dict[int, Recording] = {}
    failures: dict[int, Failure] = {}
    for index, result in results:
        if isinstance(result, Failure):
            failures[index] = result
            on_failure(result)
            if not spoken and len(failures) == min(MAX_FAILURES_AT_START, total):
                first = f"all of the first {len(failures)} recordings failed"
                raise DataError(f"{first}. Line {result.line}: {result.reason}")
        else:
            spoken[index] = result
        on_progress(len(spoken) + len(failures), total)
    return spoken, failures


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Create `out` and `out/audio`, and keep other runs out of them."""
    (out / "audio").mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"{out} is in use by another `mowa data synthesize`; wait for it, or stop it") from None
        yield


@contextmanager
def _working_folder(out: Path) -> Iterator[Path]:
    """Yield a folder for the engines' WAV files, after deleting unfinished files of killed runs."""
    for left in out.glob(".work-*"):
        shutil.rmtree(left, ignore_errors=True)
    for left in (out / "audio").glob(".*.tmp"):
        left.unlink(missing_ok=True)
    with TemporaryDirectory(dir=out, prefix=".work-", ignore_cleanup_errors=True) as work:
        yield Path(work)


def _write_manifests(
    out: Path, plan: Sequence[Clip], durations: Mapping[str, float], language: str, engine: str
) -> dict[str, SplitSummary]:
    """Write a manifest for each split that has recordings, and delete an old one of a split that has none."""
    splits: dict[str, SplitSummary] = {}
    for split in ("train", "dev"):
        manifest = out / f"{split}.jsonl"
        clips = [clip for clip in plan if clip.split == split and clip.id in durations]
        if not clips:
            manifest.unlink(missing_ok=True)
            continue
        rows = []
        for clip in clips:
            row = {
                "id": clip.id,
                "audio": f"audio/{clip.id}.flac",
                "text": clip.text,
                "duration_s": round(durations[clip.id], 4),
                "speaker": clip.voice.name,
                "language": language,
                "engine": engine,
                "rate": clip.voice.rate,
                "pitch": clip.voice.pitch,
            }
            rows.append(json.dumps({key: value for key, value in row.items() if value is not None}, ensure_ascii=False))
        atomic_write(manifest, "\n".join(rows) + "\n")
        total_s = sum(durations[clip.id] for clip in clips)
        splits[split] = SplitSummary(manifest, len(clips), total_s, len({clip.voice.name for clip in clips}))
    return splits
