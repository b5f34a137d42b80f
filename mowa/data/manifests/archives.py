"""Tar archives of recordings, read front to back as they lie: Common Voice as Mozilla ships it, WebDataset shards, any.

Nothing is unpacked and nothing but the table of one split is held. Memory: about 250 bytes a row of that table.
This room refuses to know what stands in the sound it passes on, and what columns mean beyond their names (`rows`).
"""

from __future__ import annotations

import gzip
import json
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from mowa.data.audio import AUDIO_SUFFIXES
from mowa.data.manifests.tables import COLUMN_ALIASES, TableRow, decode_lines, guess_columns, parse_table
from mowa.errors import DataError

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz")

_NO_SPLITS = {"clip_durations", "reported", "times", "unvalidated_sentences", "validated_sentences"}
_WORDS = {".txt", ".text", ".lab", ".transcript"}  # what stands beside a recording and is its text
_BROKEN = (tarfile.TarError, EOFError, zlib.error, OSError, ValueError, OverflowError)
_PIECE = 2**20  # bytes read at once: a damaged header may promise more than there is memory

SplitChooser = Callable[[Iterable[str]], str]


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith(ARCHIVE_SUFFIXES)


def read_archive(path: Path, split: str, choose_split: SplitChooser, columns: Mapping[str, str]) -> Iterator[TableRow]:
    """Every recording of an archive, in the archive's order, its bytes under "audio".

    Where the archive has tables ({split}.tsv beside the recordings or beside `clips`, before or after them), those of
    the split that `choose` picks: with what the table says, and at the end, without bytes, those that the table lists
    and the archive has not. Else all, with the .txt and .json of the same name that stand next to them.

    named: role → column, where that is not to be guessed. DataError for an archive that is damaged or cut off (after
    everything before that was given), has no recordings, or no such split.
    """
    found = _table(path, split, choose_split, columns)
    if found is not None:
        yield from _listed(path, found)
        return
    if split:
        raise DataError(f"{path}: split {split} was asked for, and there are no tables in it. Leave the split out.")
    number = 0
    for number, sample in enumerate(_samples(path), 1):  # noqa: B007
        yield sample["audio"]["path"], path.parent, sample
    if not number:
        raise DataError(f"{path}: holds no recording. They are told by their names: .wav, .flac, .mp3, .opus, ….")


def list_splits(path: Path) -> list[str]:
    """The names of the tables of a corpus in an archive; none where it has none. DataError for a damaged one."""
    places, corpus = _places(path, "")
    return sorted(places) if corpus else []


# --- members ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Archive:
    """An opened one. `members` can be gone through once; a member is read before the next is asked for."""

    path: Path
    raw: IO[bytes]
    tar: tarfile.TarFile

    def members(self) -> Iterator[tarfile.TarInfo]:
        """Files that are not hidden. tarfile's own loop keeps all it saw, and takes a damaged header for the end."""
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
                data = opened.read() if opened else b""
            else:
                self.raw.seek(member.offset_data)
                data = b"".join(self._pieces(member))
        except _BROKEN as wrong:
            raise _damaged(self.path, wrong) from None
        return data

    def _pieces(self, member: tarfile.TarInfo) -> Iterator[bytes]:
        left = member.size
        while left > 0:
            piece = self.raw.read(min(left, _PIECE))
            if not piece:
                raise EOFError(f"it ends inside {member.name}")
            left -= len(piece)
            yield piece

    def lines(self, offset: int, size: int) -> Iterator[bytes]:
        """The lines of the member whose bytes begin there."""
        self.raw.seek(offset)
        while size > 0:
            line = self.raw.readline(size)
            if not line:
                raise EOFError("it ends inside a table")
            size -= len(line)
            yield line


def _walk(path: Path) -> Iterator[tuple[_Archive, tarfile.TarInfo]]:
    """Every member with its archive. DataError where that is no archive, damaged or cut off."""
    try:
        with gzip.open(path) if _packed(path) else path.open("rb") as raw:
            tar = tarfile.TarFile(fileobj=raw, mode="r")
            archive = _Archive(path, raw, tar)  # type: ignore[arg-type]
            for member in archive.members():
                yield archive, member
    except _BROKEN as wrong:
        raise _damaged(path, wrong) from None


def _packed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _damaged(path: Path, wrong: Exception) -> DataError:
    reason = str(wrong).strip().rstrip(".") or type(wrong).__name__
    return DataError(f"{path}: is no tar archive, damaged or cut off ({reason}). Copy or download it again.")


def _name(member: tarfile.TarInfo) -> str:
    return member.name.removeprefix("./")


def _is_recording(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in AUDIO_SUFFIXES


# --- with tables, as Common Voice -------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Table:
    """The rows of one split by what they call their recording. What many rows share (speaker, accent, …) is kept once,
    and what is their own as the bytes of a line."""

    name: str
    folder: str
    audio: str = ""
    own: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    lines: dict[bytes, bytes] = field(default_factory=dict)
    kinds: list[tuple[str, ...]] = field(default_factory=list)

    def fields(self, line: bytes) -> dict[str, Any]:
        kind, *own = line.decode().split("\t")
        return dict(zip(self.shared, self.kinds[int(kind)], strict=True)) | dict(zip(self.own, own, strict=True))


def _table(path: Path, split: str, choose: SplitChooser, named: Mapping[str, str]) -> _Table | None:
    """The table of the split; None where the archive is no corpus with tables."""
    places, corpus = _places(path, split or "train")
    if not corpus:
        return None
    name = choose(places)
    folder, offset, size = places[name]
    try:
        with gzip.open(path) if _packed(path) else path.open("rb") as raw:
            archive = _Archive(path, raw, None)  # type: ignore[arg-type]
            return _read(
                "/".join(filter(None, (str(path), folder, f"{name}.tsv"))), folder, archive.lines(offset, size), named
            )
    except _BROKEN as wrong:
        raise _damaged(path, wrong) from None


def _places(path: Path, wanted: str) -> tuple[dict[str, tuple[str, int, int]], bool]:
    """Split → folder, first byte and size of its table; and whether this is a corpus with tables.

    Where the table of `wanted` stands before the recordings, no more than that is looked at.
    """
    places: dict[str, tuple[str, int, int]] = {}
    for _, member in _walk(path):
        folder, _, name = _name(member).rpartition("/")
        if name.endswith(".tsv") and (stem := name.removesuffix(".tsv")) not in _NO_SPLITS:
            places.setdefault(stem, (folder, member.offset_data, member.size))
            if stem == wanted:
                return places, True
        elif _is_recording(name) and folder.rpartition("/")[2] != "clips" and not places:
            return {}, False
    return places, bool(places)


def _read(name: str, folder: str, lines: Iterator[bytes], named: Mapping[str, str]) -> _Table:
    read = _Table(name, folder)
    known = {known for names in COLUMN_ALIASES.values() for known in names}
    index: dict[tuple[str, ...], int] = {}
    for where, fields in parse_table(decode_lines(lines, name), name, tab_separated=True):
        if not read.lines:
            roles = guess_columns(tuple(fields)) | {role: column for role, column in named.items() if column in fields}
            if "audio" not in roles:
                raise DataError(f"{where}: no column holds the recording. Say which: --column audio=NAME.")
            read.audio = roles["audio"]
            kept = [key for key in fields if key.strip().lower() in known or key in named.values()]
            read.own = [key for key in kept if key in {roles.get("text"), roles.get("id")}]
            read.shared = [key for key in kept if key not in (*read.own, read.audio)]
        kind = tuple(fields.get(key, "") for key in read.shared)
        if kind not in index:
            index[kind] = len(read.kinds)
            read.kinds.append(kind)
        own = (str(index[kind]), *(fields.get(key, "") for key in read.own))
        if read.audio in fields:
            read.lines[fields[read.audio].encode()] = "\t".join(own).encode()
    if not read.lines:
        raise DataError(f"{name}: is empty, there is no row to read. Check that it was written to its end.")
    return read


def _listed(path: Path, found: _Table) -> Iterator[TableRow]:
    given = 0
    for archive, member in _walk(path):
        name = _name(member)
        if not _is_recording(name):
            continue
        inside = name.removeprefix(f"{found.folder}/") if found.folder else name
        if found.folder and inside == name and "/clips/" in name:
            raise DataError(f"{path}: holds more corpora than {found.folder}: {name}. Unpack it, and name one of them.")
        clip = next((key for key in (inside, inside.removeprefix("clips/")) if key.encode() in found.lines), None)
        if clip is not None:
            given += 1
            yield _row(path, found, clip.encode(), {"bytes": archive.read(member), "path": f"{path}/{name}"})
    if not given:
        raise DataError(f"{found.name}: none of its {len(found.lines)} recordings is in {path}. Check its column path.")
    for clip_name in list(found.lines):
        missing = "/".join(part for part in (str(path), found.folder, "clips", clip_name.decode()) if part)
        yield _row(path, found, clip_name, missing)


def _row(path: Path, found: _Table, clip: bytes, audio: Any) -> TableRow:
    fields = found.fields(found.lines.pop(clip)) | {found.audio: audio}
    return f"{found.name}: {clip.decode()}", path.parent, fields


# --- without tables, as WebDataset ------------------------------------------------------------------------------------


def _samples(path: Path) -> Iterator[dict[str, Any]]:
    """Recordings with what stands next to them under the same name but for the last suffix."""
    key, beside, sounds = "", dict[str, Any](), list[dict[str, Any]]()

    def finished() -> Iterator[dict[str, Any]]:
        for sound in sounds:
            yield {**beside, "id": key, "audio": sound}

    try:
        for archive, member in _walk(path):
            name = _name(member)
            ending = PurePosixPath(name).suffix
            if name.removesuffix(ending) != key:
                yield from finished()
                key, beside, sounds = name.removesuffix(ending), {}, []
            ending = ending.lower()
            if ending in AUDIO_SUFFIXES:
                sounds.append({"bytes": archive.read(member), "path": f"{path}/{name}"})
            elif ending in _WORDS:
                beside["text"] = "".join(decode_lines([archive.read(member)], f"{path}/{name}")).strip()
            elif ending == ".json":
                beside = _described(archive.read(member), f"{path}/{name}") | beside
    except DataError:
        yield from finished()  # whole recordings before the damage
        raise
    yield from finished()


def _described(data: bytes, name: str) -> dict[str, Any]:
    """What a .json says of the recording beside it. Where that was once, and where in a longer one, is not asked."""
    try:
        fields = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError) as wrong:
        raise DataError(f"{name}: broken JSON ({wrong}). Write one whole object.") from None
    aside = {*COLUMN_ALIASES["audio"], *COLUMN_ALIASES["id"], *COLUMN_ALIASES["offset"]}
    return {key: value for key, value in fields.items() if key.lower() not in aside} if isinstance(fields, dict) else {}
