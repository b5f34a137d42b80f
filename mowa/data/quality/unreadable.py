"""Find the recordings of a data set that cannot be read to their end, so that they can be left out before a run.

A recording is decoded as training decodes it, which finds files that are cut off, empty or too short, and samples that
are not numbers. The outcome for a large set is cached until one of its files changes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mowa import hardware
from mowa.data import audio
from mowa.data.manifests.examples import read_examples
from mowa.errors import AudioError, DataError
from mowa.io.atomic import atomic_write, exclusive_lock, read_json_cache
from mowa.types import Example

log = logging.getLogger("mowa")

ALWAYS_ALLOWED = 3  # unreadable recordings of a data set that never end a run, however small the set is
MAX_LISTED = 5  # errors in a summary
MIN_CACHED_S = 600.0  # less audio is decoded in about a second, and its outcome is not cached

RecordingKey = tuple[str, float, float]  # path; offset and duration of an excerpt, else zeros


def recording_key(example: Example) -> RecordingKey:
    """Return the file of an example, and the part of it that is decoded."""
    return (example.audio, example.offset_s, example.duration_s) if example.is_excerpt else (example.audio, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class UnreadableRecordings:
    """The recordings of one data set that cannot be read.

    name    name of the data set
    total   recordings that were checked
    errors  (id, path, error) of each
    """

    name: str
    total: int
    errors: tuple[tuple[str, str, str], ...] = ()

    def add(self, decoded: Sequence[Example], found: Mapping[RecordingKey, str]) -> UnreadableRecordings:
        """Return these together with those that `find_unreadable` found among `decoded`; no others were checked."""
        errors = [
            (example.id, example.audio, error) for example in decoded if (error := found.get(recording_key(example)))
        ]
        return UnreadableRecordings(self.name, len(self.errors) + len(decoded), (*self.errors, *errors))

    def require_few(self, max_share: float, num_left: int) -> None:
        """Raise DataError if these are too many: more than `max_share` of the recordings, and than a few, or all.

        With a share of 0, none may be unreadable. `num_left` is the number of recordings that the set still has.
        """
        count = len(self.errors)
        allowed = max(ALWAYS_ALLOWED, int(max_share * self.total)) if max_share else 0
        if count > allowed or (count and not num_left):
            limit = f"more than max_unreadable: {max_share:g} allows" if num_left else "and none is left"
            advice = "Repair them, delete their rows, or raise max_unreadable" if num_left else "Repair them"
            raise DataError(
                f"{self.name}: {count} of {self.total} recordings cannot be read, {limit}. {advice}."
                f"\n{self._list_errors()}"
            )

    def summary(self) -> str:
        """Return a line with the number, and one for each of the first errors."""
        count = len(self.errors)
        plural = "s" if self.total > 1 else ""
        return f"left out, cannot be read: {count} of {self.total} recording{plural}\n{self._list_errors()}"

    def _list_errors(self) -> str:
        lines = [f"  {error}" for _, _, error in self.errors[:MAX_LISTED]]
        more = len(self.errors) - MAX_LISTED
        return "\n".join([*lines, *([f"  and {more} more"] if more > 0 else [])])


def find_unreadable(
    examples: Iterable[Example],
    rate_hz: int,
    *,
    threads: int = 1,
    on_progress: Callable[[float], object] = lambda seconds: None,
) -> Mapping[RecordingKey, str]:
    """Decode the recordings of `examples`, each once, and return the errors of those that cannot be read.

    If nothing has changed since they were decoded before, the errors come from the cache. Of several processes with the
    same recordings one decodes, and the others wait for it. `on_progress` is called with the seconds of each recording.
    """
    unique = {recording_key(example): example for example in examples}
    keys = sorted(unique)
    recordings = [unique[key] for key in keys]
    if sum(example.duration_s for example in recordings) < MIN_CACHED_S:
        return {keys[index]: error for index, error in _decode_all(recordings, rate_hz, threads, on_progress).items()}
    file = hardware.cache_folder() / "unreadable" / f"{_digest(keys, rate_hz)}.json"
    with exclusive_lock(file.with_suffix(".lock")):
        known = read_json_cache(file).get("errors")
        if isinstance(known, dict):
            return {keys[int(index)]: error for index, error in known.items()}
        found = _decode_all(recordings, rate_hz, threads, on_progress)
        with suppress(OSError):
            atomic_write(file, json.dumps({"errors": found}))
    return {keys[index]: error for index, error in found.items()}


def drop_unreadable(examples: Sequence[Example], rate_hz: int = 16_000) -> list[Example]:
    """Return `examples` without those that cannot be read to their end, which are logged as a warning."""
    found = find_unreadable(examples, rate_hz, threads=hardware.cpu_count())
    if found:
        log.warning("%s", UnreadableRecordings("", 0).add(examples, found).summary())
    return [example for example in examples if recording_key(example) not in found]


def read_available(
    source: str | Path, split: str = "", *, name: str = "", **options: Any
) -> tuple[list[Example], UnreadableRecordings]:
    """Read examples, and those that are missing or whose headers cannot be read; `options` are of `read_examples`."""
    errors: list[tuple[str, str, str]] = []
    examples = list(
        read_examples(
            source,
            split,
            on_unreadable=lambda example, error: errors.append((example.id, example.audio, str(error))),
            **options,
        )
    )
    return examples, UnreadableRecordings(name or str(source), len(examples) + len(errors), tuple(errors))


def read_measurable(source: str, split: str = "") -> list[Example]:
    """Read examples, with or without texts, and log a warning about those that are missing or have no valid header.

    Raises DataError if no other is left, and as `read_examples`.
    """
    examples, unreadable = read_available(source, split, require_text=False)
    unreadable.require_few(1.0, len(examples))
    if unreadable.errors:
        log.warning("%s", unreadable.summary())
    return examples


def _digest(keys: Sequence[RecordingKey], rate_hz: int) -> str:
    """Return a hash of the recordings and the states of their files."""
    digest = hashlib.blake2b(f"{hardware.installed_version('mowa')} {rate_hz}".encode(), digest_size=16)
    for key in keys:
        state: tuple[int, ...] = ()
        with suppress(OSError):
            status = os.stat(key[0])
            state = (status.st_size, status.st_mtime_ns, status.st_ino)
        digest.update(repr((key, state)).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _decode_all(
    examples: Sequence[Example], rate_hz: int, threads: int, on_progress: Callable[[float], object]
) -> dict[int, str]:
    """Return index → error."""

    def decode(example: Example) -> str:
        part: Any = {"offset_s": example.offset_s, "duration_s": example.duration_s} if example.is_excerpt else {}
        try:
            for _ in audio.stream_audio(example.audio, rate_hz, resample="fast", **part):
                pass
        except AudioError as error:
            return str(error)
        return ""

    errors: dict[int, str] = {}
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for index, (example, error) in enumerate(zip(examples, pool.map(decode, examples), strict=True)):
            on_progress(example.duration_s)
            if error:
                errors[index] = error
    return errors
