"""Results log of a batch transcription: an append-only JSON Lines file that survives interruption at any point.

    {"results": 2, "model": {…}, "settings": {…}, "versions": {…}, "shard": "1/4"}
    {"id": "clip-1", "file": "1.mp3", "text": "dzień dobry", "duration_s": 1.9, "confidence": 0.98, "segments": […]}
    {"id": "clip-2", "file": "clips/2.mp3", "error": "clips/2.mp3: is empty (0 bytes). Copy the file again."}

The first line is the header; its "results" is the format version. Each record is handed to the operating system before
`add` returns; an incomplete last line, as a power failure leaves it, is removed when the log is opened again. One
process at a time can hold a log open for writing.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from mowa.data.manifests.discover import RESULTS_PREFIX
from mowa.decode import captions
from mowa.errors import DataError
from mowa.io.atomic import dump_json, replace_atomically
from mowa.types import Example, Failure, Transcript

FORMAT_VERSION = 2
SYNC_INTERVAL_S = 2.0  # between calls of fsync; at most this much work is lost in a power failure
_REWRITE_STARTED_EVERY = 4096  # started ids, after which the file of started ids is rewritten without finished ones
_OLD_PREFIX = b'{"journal": '  # format 1
_READ_BYTES = 2**20  # per read when searching the last line break


class ResultsFile:
    """A results log open for writing. Create it with `open`; close it, or use it as a context manager.

    done_ids     ids with a record, transcript or error
    num_failed   number of them that are errors
    suspect_ids  ids that an earlier run had started but not finished when it was killed; one may have crashed it
    """

    def __init__(self, file: Any, path: Path, header: Mapping[str, Any]) -> None:
        self._file, self.path, self.header = file, path, header
        self.done_ids: set[str] = set()
        self.num_failed = 0
        self.suspect_ids: frozenset[str] = frozenset()
        self._unfinished: set[str] = set()
        self._num_started = 0
        self._synced = time.monotonic()

    @classmethod
    def open(cls, path: Path, header: Mapping[str, Any], *, retry_failed: bool = False) -> ResultsFile:
        """Open the results log at `path`, creating it if needed and removing an incomplete last line.

        `header` holds "model", "settings" and "shard", which must not change within a log, and "versions", which may.
        With `retry_failed`, records of errors are removed, so that those recordings are transcribed again.

        Raises DataError if another process holds the log, if it is from another model, shard or settings, if it is not
        a results log, or if it cannot be written.
        """
        header = {"results": FORMAT_VERSION, **json.loads(json.dumps(header, default=str))}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("ab+")
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror}). Choose another file.") from None
        try:
            _lock(file, path)
            results = cls(file, path, header)
            _validate_prefix(file, path)
            if not _truncate_torn_line(file):
                results._write(header)
                results._sync()
                return results
            validate_same_run(read_header(path), header, path)
            results._read(retry_failed)
            results.suspect_ids = frozenset(results._read_started() - results.done_ids)
        except BaseException:
            file.close()
            raise
        return results

    def _read(self, retry_failed: bool) -> None:
        errors = 0
        for record in read_records(self.path):
            if "error" in record:
                errors += 1
                if retry_failed:
                    continue
            self.done_ids.add(record["id"])
        self.num_failed = 0 if retry_failed else errors
        if errors and retry_failed:
            self._drop_errors()

    def _drop_errors(self) -> None:
        """Replace the log by a copy without error records; both are locked meanwhile."""
        fresh = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        file = fresh.open("ab+")
        try:
            _lock(file, self.path)
            with self.path.open("rb") as old:
                file.writelines(line for line in old if "error" not in json.loads(line))
            file.flush()
            os.fsync(file.fileno())
            fresh.replace(self.path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            file.close()
            raise
        self._file.close()
        self._file = file

    @property
    def _started_path(self) -> Path:
        return self.path.with_name(f".{self.path.name}.started")

    def _read_started(self) -> set[str]:
        try:
            lines = self._started_path.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return set()
        return {str(json.loads(line)) for line in lines if line.endswith(b'"')}

    def mark_started(self, id_: str) -> None:
        """Record in a file beside the log that an id is about to be decoded; `close` deletes that file.

        It is not synced: it identifies the recording that crashed a process, not one that a power failure interrupted.
        """
        self._unfinished.add(id_)
        rewrite = self._num_started % _REWRITE_STARTED_EVERY == 0
        with suppress(OSError), self._started_path.open("w" if rewrite else "a", encoding="utf-8") as file:
            ids = self.suspect_ids | self._unfinished if rewrite else {id_}
            file.writelines(json.dumps(one) + "\n" for one in sorted(ids))
        self._num_started += 1

    def add(self, example: Example, outcome: Transcript | Failure) -> None:
        """Append the outcome of a recording. Raises DataError if the disk is full; earlier records stay intact."""
        self.add_record(to_record(example, outcome))

    def add_record(self, record: Mapping[str, Any]) -> None:
        """Append a record as `to_record` returns it."""
        self._write(record)
        self._unfinished.discard(record["id"])
        self.done_ids.add(record["id"])
        self.num_failed += "error" in record
        if time.monotonic() - self._synced > SYNC_INTERVAL_S:
            self._sync()

    def _write(self, record: Mapping[str, Any]) -> None:
        data = _encode(record)
        end = self._file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[os.write(self._file.fileno(), data) :]
        except OSError as error:
            os.ftruncate(self._file.fileno(), end)
            raise self._write_error(error) from None

    def _sync(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._write_error(error) from None
        self._synced = time.monotonic()

    def _write_error(self, error: OSError) -> DataError:
        return DataError(
            f"{self.path}: cannot be written to ({error.strerror}). {len(self.done_ids)} recordings are in it. Free"
            " some disk space, then rerun the command to resume."
        )

    def close(self) -> None:
        if not self._file.closed:
            try:
                self._sync()
            finally:
                self._started_path.unlink(missing_ok=True)
                self._file.close()

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def to_record(example: Example, outcome: Transcript | Failure) -> dict[str, Any]:
    """Return the record of a recording's outcome; an excerpt also has "offset_s", its start in the file."""
    record: dict[str, Any] = {"id": example.id, "file": example.audio}
    if example.is_excerpt:
        record["offset_s"] = round(example.offset_s, 3)
    if isinstance(outcome, Failure):
        return record | {"error": str(outcome.error)}
    transcript = captions.transcript_to_dict(outcome)
    return record | {key: transcript[key] for key in ("text", "duration_s", "confidence", "segments")}


def read_header(path: Path) -> dict[str, Any]:
    """Return the header of a results log. Raises DataError if there is none or its format version is another one."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.readline() or "null")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    except ValueError:
        header = None
    if isinstance(header, dict) and "journal" in header:
        raise _old_format(path)
    if not isinstance(header, dict) or "results" not in header:
        raise _not_a_log(path)
    version = header["results"]
    if type(version) is not int or version < FORMAT_VERSION:
        raise _not_a_log(path)
    if version > FORMAT_VERSION:
        raise DataError(f"{path}: is a results log of format {version}, this mowa reads {FORMAT_VERSION}. Update mowa.")
    if not all(isinstance(header.get(key), dict) for key in ("model", "settings", "versions")):
        raise DataError(f"{path}: its first line is damaged. Transcribe again into a new file.")
    return header


def _not_a_log(path: Path) -> DataError:
    return DataError(f"{path}: is not a results log. Name one that `mowa transcribe --results` wrote, or a new file.")


def _old_format(path: Path) -> DataError:
    return DataError(
        f"{path}: was written by an older mowa (format 1, this version reads {FORMAT_VERSION}): transcribe again into a"
        " new file"
    )


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records in order, without an incomplete last one. Raises DataError for a damaged line."""
    read_header(path)
    with path.open("rb") as file:
        file.readline()
        for number, data in enumerate(file, 2):
            if not data.endswith(b"\n"):
                return
            try:
                record = json.loads(data)
                record["id"]
            except (ValueError, KeyError, TypeError):
                raise DataError(
                    f"{path}:{number}: is damaged. Delete the line; its recording is then transcribed again."
                ) from None
            yield record


def parse_transcript(record: Mapping[str, Any], header: Mapping[str, Any]) -> Transcript:
    """Return the transcript in a record without an error."""
    return captions.transcript_from_dict({**record, "model": header["model"]["name"], "settings": header["settings"]})


def merge_results(paths: Iterable[Path]) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
    """Merge the results logs of one job: return the header, and an iterator of records with every id once.

    Transcripts come before errors; an id with a transcript in any log has no error record. Raises DataError if the logs
    differ in model or settings.
    """
    paths = list(paths)
    header = {key: value for key, value in read_header(paths[0]).items() if key != "shard"}
    for path in paths[1:]:
        validate_same_run(read_header(path) | {"shard": None}, header | {"shard": None}, path)

    def records() -> Iterator[dict[str, Any]]:
        seen: set[str] = set()
        for errors in (False, True):
            for path in paths:
                for record in read_records(path):
                    if ("error" in record) == errors and record["id"] not in seen:
                        seen.add(record["id"])
                        yield record

    return header, records()


def validate_same_run(existing: Mapping[str, Any], header: Mapping[str, Any], path: Path) -> None:
    """Raise DataError, with every difference, if two headers differ in model, settings or shard."""
    different = []
    for part in ("model", "settings"):
        old, new = existing.get(part) or {}, header.get(part) or {}
        different += [f"{key}: {old.get(key)} → {new.get(key)}" for key in new if old.get(key) != new[key]]
    if existing.get("shard") != header.get("shard"):
        different.append(f"shard: {existing.get('shard') or 'none'} → {header.get('shard') or 'none'}")
    if different:
        raise DataError(
            f"{path}: was written with other settings ({', '.join(different)}). Use the same settings, or another file."
        )


def _lock(file: Any, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise DataError(f"{path}: another process is writing to it. Wait until it ends, or use another file.") from None


def _encode(record: Mapping[str, Any]) -> bytes:
    return (dump_json(record, allow_nan=False) + "\n").encode()


def _validate_prefix(file: Any, path: Path) -> None:
    """Raise DataError unless the file is empty or begins as a results log, even an incomplete one."""
    file.seek(0)
    begin = file.read(len(RESULTS_PREFIX))
    if begin and begin == _OLD_PREFIX[: len(begin)] and begin != RESULTS_PREFIX[: len(begin)]:
        raise _old_format(path)
    if begin != RESULTS_PREFIX[: len(begin)]:
        raise _not_a_log(path)


def _truncate_torn_line(file: Any) -> int:
    """Truncate the file after its last line break; return its size in bytes."""
    end = file.seek(0, os.SEEK_END)
    size = end
    while size:
        start = max(0, size - _READ_BYTES)
        file.seek(start)
        found = file.read(size - start).rfind(b"\n")
        if found >= 0:
            size = start + found + 1
            break
        size = start
    if size < end:
        file.truncate(size)
    return int(size)


@contextmanager
def rewrite_results(path: Path, header: Mapping[str, Any]) -> Iterator[Any]:
    """Yield a function that writes records to a new log; it replaces `path` if no exception is raised."""
    with replace_atomically(path) as unfinished, unfinished.open("wb") as file:
        file.write(_encode(header))
        yield lambda record: file.write(_encode(record))
