"""What a corpus run has finished, on disk: JSON lines that only grow, so that a run broken off anywhere can go on.

    {"journal": 1, "model": {…}, "settings": {…}, "versions": {…}, "shard": "1/4"}
    {"id": "clip-1", "file": "1.mp3", "text": "dzień dobry", "duration_s": 1.9, "confidence": 0.98, "segments": […]}
    {"id": "clip-2", "file": "clips/2.mp3", "error": "clips/2.mp3: is empty (0 bytes). Copy the file again."}

Every line is written in one piece and is on its way to the disk when `add` returns; a torn last line, as a power cut
leaves it, is cut off when the journal is opened again. One process holds a journal at a time. What is transcribed, and
in which order, is not known here.
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

from mowa.decode import captions
from mowa.engines.pipeline import Failure
from mowa.errors import DataError
from mowa.types import Example, Transcript

FORMAT_VERSION = 1
SYNC_INTERVAL_S = 2.0  # what a power cut may take
_MARKS = 4096  # notes of what was begun, until those of what was finished since are dropped
_BEGIN = b'{"journal": '
_LINE = 2**20  # bytes read at a time, to find the last line's end


class ResultsFile:
    """A journal that is open for writing. Make one with `open`; close it, or use it in a `with`.

    done: ids that need not be transcribed again. `failed` of them are errors. suspects: ids that a run had begun when
    it was killed; one of them may be what killed it.
    """

    def __init__(self, file: Any, path: Path, header: Mapping[str, Any]) -> None:
        self._file, self.path, self.header = file, path, header
        self.done_ids: set[str] = set()
        self.num_failed = 0
        self.suspect_ids: frozenset[str] = frozenset()
        self._open: set[str] = set()
        self._marked = 0
        self._synced = time.monotonic()

    @classmethod
    def open(cls, path: Path, header: Mapping[str, Any], *, retry_failed: bool = False) -> ResultsFile:
        """The journal at `path`, made where there is none, and mended where its last line is torn.

        header: what may not change within a journal, under "model", "settings" and "shard"; "versions" may. With
        `retry_failed` the lines of errors are taken out, so that what failed is done again.

        DataError: another process has it, it is of another model, other settings or another shard, or no journal.
        """
        header = {"journal": FORMAT_VERSION, **json.loads(json.dumps(header, default=str))}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("ab+")
        except OSError as wrong:
            raise DataError(f"{path}: cannot be written ({wrong.strerror}). Choose another place.") from None
        try:
            _lock(file, path)
            journal = cls(file, path, header)
            _validate_prefix(file, path)
            whole = _truncate_torn_line(file)
            if not whole:
                journal._write(header)
                journal._sync()
                return journal
            validate_same_run(read_header(path), header, path)
            journal._read(retry_failed)
            journal.suspect_ids = frozenset(journal._begun() - journal.done_ids)
        except BaseException:
            file.close()
            raise
        return journal

    def _read(self, retry_failed: bool) -> None:
        errors = 0
        for row in read_records(self.path):
            if "error" in row:
                errors += 1
                if retry_failed:
                    continue
            self.done_ids.add(row["id"])
        self.num_failed = 0 if retry_failed else errors
        if errors and retry_failed:
            self._drop_errors()

    def _drop_errors(self) -> None:
        """The journal without its errors takes the place of the old one; both are locked while that happens."""
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
    def _marks(self) -> Path:
        return self.path.with_name(f".{self.path.name}.begun")

    def _begun(self) -> set[str]:
        try:
            lines = self._marks.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return set()
        return {str(json.loads(line)) for line in lines if line.endswith(b'"')}

    def mark_started(self, id_: str) -> None:
        """Note that an id is about to be decoded, in a file beside the journal that a run takes with it when it ends.

        Nothing waits for the disk: the note is there for a run that dies, not for a machine that does.
        """
        self._open.add(id_)
        anew = self._marked % _MARKS == 0
        with suppress(OSError), self._marks.open("w" if anew else "a", encoding="utf-8") as file:  # `add` will say so
            names = self.suspect_ids | self._open if anew else {id_}
            file.writelines(json.dumps(name) + "\n" for name in sorted(names))
        self._marked += 1

    def add(self, example: Example, outcome: Transcript | Failure) -> None:
        """Write down how it went. DataError where the disk is full: all lines before it are whole then."""
        self.add_record(to_record(example, outcome))

    def add_record(self, record: Mapping[str, Any]) -> None:
        """Write down a line as `line` gives it."""
        self._write(record)
        self._open.discard(record["id"])
        self.done_ids.add(record["id"])
        self.num_failed += "error" in record
        if time.monotonic() - self._synced > SYNC_INTERVAL_S:
            self._sync()

    def _write(self, row: Mapping[str, Any]) -> None:
        data = _encoded(row)
        end = self._file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[os.write(self._file.fileno(), data) :]
        except OSError as wrong:
            os.ftruncate(self._file.fileno(), end)
            raise self._full(wrong) from None

    def _sync(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as wrong:
            raise self._full(wrong) from None
        self._synced = time.monotonic()

    def _full(self, wrong: OSError) -> DataError:
        return DataError(
            f"{self.path}: cannot be written to ({wrong.strerror}). {len(self.done_ids)} are in it and stay there: make "
            "room, and the same command goes on."
        )

    def close(self) -> None:
        if not self._file.closed:
            try:
                self._sync()
            finally:
                self._marks.unlink(missing_ok=True)
                self._file.close()

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, wrong: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def to_record(example: Example, outcome: Transcript | Failure) -> dict[str, Any]:
    """The line that says how a recording went."""
    row: dict[str, Any] = {"id": example.id, "file": example.audio}
    if example.is_excerpt:
        row["begin_s"] = round(example.offset_s, 3)
    if isinstance(outcome, Failure):
        return row | {"error": str(outcome.error)}
    said = captions.transcript_to_dict(outcome)
    return row | {key: said[key] for key in ("text", "duration_s", "confidence", "segments")}


def read_header(path: Path) -> dict[str, Any]:
    """The first line of a journal. DataError where it is none, or of another format."""
    try:
        with path.open("rb") as file:
            first = json.loads(file.readline() or "null")
    except OSError as wrong:
        raise DataError(f"{path}: cannot be read ({wrong.strerror}).") from None
    except ValueError:
        first = None
    if not isinstance(first, dict) or "journal" not in first:
        raise DataError(f"{path}: is there already, and is no journal. Choose another name for the journal.")
    if first["journal"] != FORMAT_VERSION:
        raise DataError(
            f"{path}: is a journal of format {first['journal']}, this mowa writes {FORMAT_VERSION}. Update mowa."
        )
    return first


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Every line but the header, in order; a torn last one is left out. DataError where one in the midst is damaged."""
    read_header(path)
    with path.open("rb") as file:
        file.readline()
        for number, data in enumerate(file, 2):
            if not data.endswith(b"\n"):
                return
            try:
                row = json.loads(data)
                row["id"]
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{path}:{number}: is damaged. Delete that line; what it held is done again.") from None
            yield row


def parse_transcript(record: Mapping[str, Any], header: Mapping[str, Any]) -> Transcript:
    """The transcript that a line without an error holds."""
    return captions.transcript_from_dict({**record, "model": header["model"]["name"], "settings": header["settings"]})


def merge_results(paths: Iterable[Path]) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
    """Several journals of one job (shards, machines) as one: its header, and every id once, what succeeded first.

    An id that failed in one and not in another did not fail. DataError where they differ in model or settings.
    """
    paths = list(paths)
    header = {key: value for key, value in read_header(paths[0]).items() if key != "shard"}
    for path in paths[1:]:
        validate_same_run(read_header(path) | {"shard": None}, header | {"shard": None}, path)

    def every() -> Iterator[dict[str, Any]]:
        seen: set[str] = set()
        for errors in (False, True):
            for path in paths:
                for row in read_records(path):
                    if ("error" in row) == errors and row["id"] not in seen:
                        seen.add(row["id"])
                        yield row

    return header, every()


def validate_same_run(existing: Mapping[str, Any], header: Mapping[str, Any], path: Path) -> None:
    """DataError that says what of a journal's header is another's."""
    different = []
    for part in ("model", "settings"):
        old, new = existing.get(part) or {}, header.get(part) or {}
        different += [f"{key}: {old.get(key)} → {new.get(key)}" for key in new if old.get(key) != new[key]]
    if existing.get("shard") != header.get("shard"):
        different.append(f"shard: {existing.get('shard') or 'none'} → {header.get('shard') or 'none'}")
    if different:
        raise DataError(
            f"{path}: was written with other settings ({', '.join(different)}). Take another journal, or the same "
            "settings."
        )


def _lock(file: Any, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise DataError(f"{path}: another process is writing to it. Wait for that, or take another journal.") from None


def _encoded(row: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except UnicodeEncodeError:  # a file's name that is no UTF-8
        return (json.dumps(row, allow_nan=False) + "\n").encode()


def _validate_prefix(file: Any, path: Path) -> None:
    """DataError where there is something that no journal begins with, be it torn."""
    file.seek(0)
    begin, ours = file.read(len(_BEGIN)), _BEGIN
    if begin != ours[: len(begin)]:
        raise DataError(f"{path}: is there already, and is no journal. Choose another name for the journal.")


def _truncate_torn_line(file: Any) -> int:
    """Cut off what comes after the last line break. → bytes left."""
    end = file.seek(0, os.SEEK_END)
    at = end
    while at:
        start = max(0, at - _LINE)
        file.seek(start)
        found = file.read(at - start).rfind(b"\n")
        if found >= 0:
            at = start + found + 1
            break
        at = start
    if at < end:
        file.truncate(at)
    return int(at)


@contextmanager
def rewrite_results(path: Path, header: Mapping[str, Any]) -> Iterator[Any]:
    """A journal with `header` to be written anew: what yields takes lines; it is `path` when all went well."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with fresh.open("wb") as file:
            file.write(_encoded(header))
            yield lambda row: file.write(_encoded(row))
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
