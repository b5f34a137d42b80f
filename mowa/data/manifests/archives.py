"""Read tar archives of recordings sequentially: Common Voice as Mozilla distributes it, WebDataset shards, and others.

Archives are not unpacked. Memory: about 250 bytes per row of the table of one split.
"""

from __future__ import annotations

import gzip
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from mowa.data.audio import is_audio_file
from mowa.data.manifests.rows import COLUMN_ALIASES, BadRow, NumberedRow, TableRow, guess_columns
from mowa.data.manifests.text_tables import decode_lines, parse_table
from mowa.errors import DataError

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz")
NON_SPLIT_TABLES = frozenset(  # tables of Common Voice that are not splits
    {"clip_durations", "reported", "times", "unvalidated_sentences", "validated_sentences"}
)

_REPORTED, _SPONTANEOUS = "ss-reported-audios-", "ss-corpus-"  # tables of Common Voice's spontaneous speech
_AUDIO_FOLDERS = ("clips", "audios")  # of Common Voice, and of its spontaneous speech
_TEXT_SUFFIXES = {".txt", ".text", ".lab", ".transcript"}  # of the transcript next to a recording
_READ_ERRORS = (tarfile.TarError, EOFError, zlib.error, OSError, ValueError, OverflowError)
_READ_BYTES = 2**20  # per read: a damaged header may state more than there is memory

SplitChooser = Callable[[Iterable[str]], str]
_Place = tuple[str, int, int]  # of a table in an archive: its folder, offset and size in bytes


def is_archive(path: Path) -> bool:
    """Return whether the name ends in one of `ARCHIVE_SUFFIXES`."""
    return path.name.lower().endswith(ARCHIVE_SUFFIXES)


def is_split_table(stem: str) -> bool:
    """Return whether a table of this name, without suffix, lists the recordings of a split or of all splits."""
    return stem not in NON_SPLIT_TABLES and not stem.startswith(_REPORTED)


def is_spontaneous(stem: str) -> bool:
    """Return whether it is the table of Common Voice's spontaneous speech, which has a column `split`."""
    return stem.startswith(_SPONTANEOUS)


def read_archive(path: Path, split: str, choose_split: SplitChooser, columns: Mapping[str, str]) -> Iterator[TableRow]:
    """Yield the recordings of an archive in its order, their bytes under "audio".

    If the archive has tables ({split}.tsv beside the recordings or beside `clips`, before or after them), the rows are
    those of the split that `choose_split` returns; rows whose recording is missing come last, without bytes. Otherwise
    every recording is yielded, with the .txt and .json of the same name.

    `columns` overrides role → column. Raises DataError if the archive has no recordings or no such split, or is damaged
    or cut off, after yielding the recordings before the damage.
    """
    table = _read_split_table(path, split, choose_split, columns)
    if table is not None:
        yield from _read_listed(path, table)
        return
    if split:
        raise DataError(f"{path}: split {split} was requested, but the archive has no tables. Omit the split.")
    count = 0
    for count, sample in enumerate(_read_samples(path), 1):  # noqa: B007
        yield sample["audio"]["path"], path.parent, sample
    if not count:
        raise DataError(f"{path}: contains no recordings. They are recognized by suffix: .wav, .flac, .mp3, .opus, ….")


def list_splits(path: Path) -> list[str]:
    """Return the names of the tables in an archive, if it has any. Raises DataError if it is damaged."""
    tables, is_corpus = _find_tables(path, "")
    if spontaneous := next(filter(is_spontaneous, tables), ""):
        return _list_column_splits(_read_table(path, spontaneous, tables[spontaneous]))
    return sorted(tables) if is_corpus else []


# --- members ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Archive:
    """An open archive. `members` can be iterated once; read a member before advancing to the next."""

    path: Path
    raw: IO[bytes]
    tar: tarfile.TarFile

    def members(self) -> Iterator[tarfile.TarInfo]:
        """Yield the files that are not hidden.

        tarfile's own iteration keeps all members in memory and takes a damaged header for the end.
        """
        member = self.tar.next()
        while member is not None:
            self.tar.members.clear()  # type: ignore[attr-defined]
            name = PurePosixPath(member.name).name
            if member.isreg() and not name.startswith("."):
                yield member
            self.raw.seek(self.tar.offset)
            try:
                member = tarfile.TarInfo.fromtarfile(self.tar)
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
                return

    def read(self, member: tarfile.TarInfo) -> bytes:
        try:
            if member.issparse():
                opened = self.tar.extractfile(member)
                return opened.read() if opened else b""
            self.raw.seek(member.offset_data)
            return b"".join(self._read_pieces(member))
        except _READ_ERRORS as error:
            raise _damaged_error(self.path, error) from None

    def _read_pieces(self, member: tarfile.TarInfo) -> Iterator[bytes]:
        left = member.size
        while left > 0:
            piece = self.raw.read(min(left, _READ_BYTES))
            if not piece:
                raise EOFError(f"it ends inside {member.name}")
            left -= len(piece)
            yield piece

    def lines(self, offset: int, size: int) -> Iterator[bytes]:
        """Yield the lines of the member whose `size` bytes begin at `offset`."""
        self.raw.seek(offset)
        while size > 0:
            line = self.raw.readline(size)
            if not line:
                raise EOFError("it ends inside a table")
            size -= len(line)
            yield line


def _walk(path: Path) -> Iterator[tuple[_Archive, tarfile.TarInfo]]:
    """Yield every member with its archive. Raises DataError if the file is not a tar archive, damaged or cut off."""
    try:
        with gzip.open(path) if _is_gzip(path) else path.open("rb") as raw:
            tar = tarfile.TarFile(fileobj=raw, mode="r")
            archive = _Archive(path, raw, tar)  # type: ignore[arg-type]
            for member in archive.members():
                yield archive, member
    except _READ_ERRORS as error:
        raise _damaged_error(path, error) from None


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _damaged_error(path: Path, error: Exception) -> DataError:
    if isinstance(error, PermissionError):
        return DataError(f"{path}: cannot be read ({error.strerror}). Check its permissions.")
    reason = str(error).strip().rstrip(".") or type(error).__name__
    return DataError(f"{path}: is not a tar archive, damaged or cut off ({reason}). Copy or download it again.")


def _member_name(member: tarfile.TarInfo) -> str:
    return member.name.removeprefix("./")


# --- archives with tables, as Common Voice ----------------------------------------------------------------------------


@dataclass(slots=True)
class _SplitTable:
    """The table of one split, compressed: columns that repeat (speaker, accent, …) are stored once per combination.

    own_columns, shared_columns  columns stored per row, and per combination
    bad_rows      rows that cannot be used, with their positions
    lines         recording → index of the combination and the own columns, separated by tabs; a line for each row
    combinations  distinct values of the shared columns
    """

    name: str
    folder: str
    audio_column: str = ""
    own_columns: list[str] = field(default_factory=list)
    shared_columns: list[str] = field(default_factory=list)
    bad_rows: list[tuple[str, BadRow]] = field(default_factory=list)
    lines: dict[bytes, bytes] = field(default_factory=dict)
    combinations: list[tuple[str, ...]] = field(default_factory=list)

    def take_rows(self, clip: bytes) -> Iterator[dict[str, Any]]:
        """Yield the columns of the rows of a recording, and forget them."""
        for line in self.lines.pop(clip).decode().split("\n"):
            index, *own = line.split("\t")
            shared = dict(zip(self.shared_columns, self.combinations[int(index)], strict=True))
            yield shared | dict(zip(self.own_columns, own, strict=True))


def _read_split_table(
    path: Path, split: str, choose_split: SplitChooser, columns: Mapping[str, str]
) -> _SplitTable | None:
    """Return the table of the split, or None if the archive has no tables."""
    tables, is_corpus = _find_tables(path, split or "train")
    if not is_corpus:
        return None
    name = next(filter(is_spontaneous, tables), "") or choose_split(tables)
    rows = _read_table(path, name, tables[name])
    available = _list_column_splits(_read_table(path, name, tables[name])) if is_spontaneous(name) else []
    if is_spontaneous(name) and (available or split):
        chosen = choose_split(available)
        rows = ((where, row) for where, row in rows if isinstance(row, BadRow) or row.get("split") == chosen)
    return _parse_split_table(_table_name(path, name, tables[name]), tables[name][0], rows, columns)


def _list_column_splits(rows: Iterator[NumberedRow]) -> list[str]:
    return sorted({str(row["split"]) for _, row in rows if not isinstance(row, BadRow) and "split" in row})


def _table_name(path: Path, name: str, place: _Place) -> str:
    return "/".join(filter(None, (str(path), place[0], f"{name}.tsv")))


def _read_table(path: Path, name: str, place: _Place) -> Iterator[NumberedRow]:
    """Yield the rows of a table in an archive. Raises DataError if the archive is damaged."""
    _, offset, size = place
    full_name = _table_name(path, name, place)
    try:
        with gzip.open(path) if _is_gzip(path) else path.open("rb") as raw:
            lines = _Archive(path, raw, None).lines(offset, size)  # type: ignore[arg-type]
            yield from parse_table(decode_lines(lines, full_name), full_name, tab_separated=True)
    except _READ_ERRORS as error:
        raise _damaged_error(path, error) from None


def _find_tables(path: Path, wanted: str) -> tuple[dict[str, _Place], bool]:
    """Return split → place of its table, and whether the archive is a corpus with tables.

    Stops at the table of `wanted`, or of all splits, if it comes before the recordings.
    """
    tables: dict[str, _Place] = {}
    for _, member in _walk(path):
        folder, _, name = _member_name(member).rpartition("/")
        if name.endswith(".tsv") and is_split_table(stem := name.removesuffix(".tsv")):
            tables.setdefault(stem, (folder, member.offset_data, member.size))
            if stem == wanted or is_spontaneous(stem):
                return tables, True
        elif is_audio_file(name) and folder.rpartition("/")[2] not in _AUDIO_FOLDERS and not tables:
            return {}, False
    return tables, bool(tables)


def _parse_split_table(name: str, folder: str, rows: Iterator[NumberedRow], columns: Mapping[str, str]) -> _SplitTable:
    table = _SplitTable(name, folder)
    aliases = {alias for names in COLUMN_ALIASES.values() for alias in names}
    index: dict[tuple[str, ...], int] = {}
    for where, fields in rows:
        if isinstance(fields, BadRow):
            table.bad_rows.append((where, fields))
            continue
        if not table.lines:
            roles = guess_columns(tuple(fields)) | {
                role: column for role, column in columns.items() if column in fields
            }
            if "audio" not in roles:
                raise DataError(f"{where}: no column of recordings. Specify it with --column audio=NAME.")
            table.audio_column = roles["audio"]
            kept = [key for key in fields if key.strip().lower() in aliases or key in columns.values()]
            table.own_columns = [key for key in kept if key in {roles.get(role) for role in ("text", "id", "duration")}]
            table.shared_columns = [key for key in kept if key not in (*table.own_columns, table.audio_column)]
        combination = tuple(fields.get(key, "") for key in table.shared_columns)
        if combination not in index:
            index[combination] = len(table.combinations)
            table.combinations.append(combination)
        own = (str(index[combination]), *(fields.get(key, "") for key in table.own_columns))
        if not fields.get(table.audio_column):
            table.bad_rows.append((where, BadRow(f"{where}: has no recording. Add its path, or delete the row.")))
            continue
        clip, line = fields[table.audio_column].replace("\\", "/").encode(), "\t".join(own).encode()
        table.lines[clip] = table.lines[clip] + b"\n" + line if clip in table.lines else line
    if not table.lines:
        raise DataError(f"{name}: is empty: it has no rows. Check that it was written completely.")
    return table


def _read_listed(path: Path, table: _SplitTable) -> Iterator[TableRow]:
    found = 0
    yield from ((where, path.parent, row) for where, row in table.bad_rows)
    for archive, member in _walk(path):
        name = _member_name(member)
        if not is_audio_file(name):
            continue
        inside = name.removeprefix(f"{table.folder}/") if table.folder else name
        if table.folder and inside == name and any(f"/{part}/" in name for part in _AUDIO_FOLDERS):
            raise DataError(f"{path}: contains other corpora than {table.folder}: {name}. Unpack it and pass one.")
        keys = (inside, *(inside.removeprefix(f"{part}/") for part in _AUDIO_FOLDERS))
        clip = next((key for key in map(os.fsencode, keys) if key in table.lines), None)
        if clip is not None:
            found += 1
            yield from _to_rows(path, table, clip, {"bytes": archive.read(member), "path": f"{path}/{name}"})
    if not found:
        raise DataError(f"{table.name}: none of its {len(table.lines)} recordings is in {path}. Check its column path.")
    audio_folder = "audios" if is_spontaneous(PurePosixPath(table.name).stem) else "clips"
    for clip_name in list(table.lines):
        missing = "/".join(part for part in (str(path), table.folder, audio_folder, clip_name.decode()) if part)
        yield from _to_rows(path, table, clip_name, missing)


def _to_rows(path: Path, table: _SplitTable, clip: bytes, audio: Any) -> Iterator[TableRow]:
    for fields in table.take_rows(clip):
        yield f"{table.name}: {clip.decode()}", path.parent, fields | {table.audio_column: audio}


# --- archives without tables, as WebDataset ---------------------------------------------------------------------------


def _read_samples(path: Path) -> Iterator[dict[str, Any]]:
    """Yield recordings with the text and JSON members next to them that differ only in the last suffix."""
    key, fields, recordings = "", dict[str, Any](), list[dict[str, Any]]()

    def complete() -> Iterator[dict[str, Any]]:
        for recording in recordings:
            yield {**fields, "id": key, "audio": recording}

    try:
        for archive, member in _walk(path):
            name = _member_name(member)
            suffix = PurePosixPath(name).suffix
            if name.removesuffix(suffix) != key:
                yield from complete()
                key, fields, recordings = name.removesuffix(suffix), {}, []
            suffix = suffix.lower()
            if is_audio_file(name):
                recordings.append({"bytes": archive.read(member), "path": f"{path}/{name}"})
            elif suffix in _TEXT_SUFFIXES:
                fields["text"] = "".join(decode_lines([archive.read(member)], f"{path}/{name}")).strip()
            elif suffix == ".json":
                fields = _parse_sample_json(archive.read(member), f"{path}/{name}") | fields
    except DataError:
        yield from complete()  # recordings before the damage
        raise
    yield from complete()


def _parse_sample_json(data: bytes, name: str) -> dict[str, Any]:
    """Parse the .json of a recording, without the path, id and offset that the recording once had elsewhere."""
    try:
        fields = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{name}: broken JSON ({error}). Write one JSON object.") from None
    ignored = {name for role in ("audio", "id", "offset", "end") for name in COLUMN_ALIASES[role]}
    return (
        {key: value for key, value in fields.items() if key.lower() not in ignored} if isinstance(fields, dict) else {}
    )
