"""Recordings, manifests, folders, archives and data sets of every usual shape → Examples, one at a time.

This room makes Examples of rows; it refuses to know what is learnt from them (`sift` says which can be), where tables
and recordings are kept (`layouts`) and how they are read (`rows`, `archives`, `kaldi`, `cuts`). `entries` lists and
opens no recording; `read` sees to it that each is a file that is there. The hub is reached only for a source named
`hub:`.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mowa.data import audio
from mowa.data.manifests import archives, kaldi, lhotse
from mowa.data.manifests.discover import (
    SUPPORTED_DATASETS,
    SUPPORTED_SOURCES,
    SourceLayout,
    choose_split,
    detect_layout,
    expand_pattern,
    filter_split,
    walk_audio_files,
)
from mowa.data.manifests.tables import (
    COLUMN_ALIASES,
    READERS,
    TableRow,
    full_suffix,
    guess_columns,
    import_optional,
    list_hub_splits,
    read_saved_dataset,
    stream_hub_dataset,
)
from mowa.errors import AudioError, DataError
from mowa.hardware import cache_folder
from mowa.io.atomic import atomic_write
from mowa.types import Example

__all__ = [
    "SUPPORTED_DATASETS",
    "SUPPORTED_SOURCES",
    "SourceLayout",
    "choose_split",
    "detect_layout",
    "filter_split",
    "list_examples",
    "list_splits",
    "read_examples",
]

_TAGS = ("speaker", "gender", "age", "accent", "voice", "language")
_MAGIC = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"ID3": ".mp3", b"\xff\xfb": ".mp3"}
_DOUBTFUL_S = 300.0  # longer than this, a duration is compared with the recording: it may be in milliseconds
_MUTE = 100  # so many rows without a text, and the column has none


def list_examples(
    sources: str | Path | Sequence[str | Path],
    split: str = "",
    *,
    columns: Mapping[str, str] | None = None,
    require_text: bool = False,
) -> Iterator[Example]:
    """What is at `names` (`LISTED` says what that may be), one after the other, listed and not opened.

    `split` names one of several; "" is train, or the only one there is; dev and validation are the same. In a single
    table it picks rows by their column `split`. `columns` (role → column) overrides what is guessed from names
    (`rows.ROLES`). With `texts` every source must have some.

    An Example's audio is absolute, whether it is there or not: what is relative is looked for beside the table, in
    `clips` beside it, and in the working directory. Bytes in tables and archives come in `sound`, undecoded;
    addresses (s3://…) stay addresses, but for what a hub: source lists, which is fetched. Durations are those stated,
    else 0. A row with `offset` and a duration is that part of its recording. Ids are the row's, else the file's stem;
    of bare recordings the path without its suffix, as given or below the named folder; a second one of the same name
    becomes name-2. Tags, where given: speaker, gender, age, accent, voice, language. Texts are left as they are.

    Memory: the ids given, the names in one directory, the table of one split of an archive; no corpus. DataError, with
    file and line, for what cannot be listed, after all before it was given; MissingPart without `datasets`;
    HubUnreachable.
    """
    listed = [sources] if isinstance(sources, str | Path) else list(sources)
    for found in _found(listed, split, columns or {}, texts=require_text, recordings=True):
        example = found.example
        if found.remote and "://" in example.audio:
            with suppress(Exception):  # every protocol has its own; whoever opens the address will meet them
                example = replace(example, audio_bytes=_fetched(example.audio))
        yield example


def read_examples(
    path: str | Path, split: str = "", *, cache_dir: Path | None = None, require_text: bool = True
) -> Iterator[Example]:
    """The recordings and texts at one place, in order, lazily, each recording a file that is there.

    As `entries`, and: durations are the row's, else the header's, and bytes become files under `cache` (default: mowa's
    own), named after their sha256. With `texts=False` rows need none (it is then ""), and bare recordings will do.

    Raises DataError, with file and line, for what cannot be used: no such split, no column for recording or text,
    no text in any row, broken JSON, not UTF-8, no rows, no such recording, a part of a recording (`offset`); AudioError
    for a recording whose length has to be read and cannot be; MissingPart without `datasets`; HubUnreachable.
    """
    cache_dir = cache_dir or cache_folder() / "audio"
    for found in _found([path], split, {}, texts=require_text, recordings=not require_text):
        example = found.example
        if example.offset_s:
            raise DataError(f"{found.where}: is a part of a recording (offset). Cut the recordings into files first.")
        file = _file(found, cache_dir)
        length_s = _duration(found.where, example.duration_s, file)
        yield replace(example, audio=str(file), duration_s=length_s, is_excerpt=False, audio_bytes=None)


def list_splits(source: str | Path) -> list[str]:
    """The splits that `entries` can tell apart at a place, sorted; none where there is but one, or it has no name.

    Of a single table they are the values of its column `split`. Errors as `entries`.
    """
    if str(source).startswith("hub:"):
        return list_hub_splits(str(source))
    here = detect_layout(source, allow_audio=True)
    if set(here.splits) != {""}:
        return sorted(here.splits)
    (first, *others) = here.splits[""]
    if here.kind == "archive":
        return archives.list_splits(first)
    if others or full_suffix(first) not in READERS:
        return []
    found: set[str] = set()
    for _, _, fields in READERS[full_suffix(first)](first):
        column = _guessed(fields, {}).get("split")
        if column is None:
            return []
        found.add(str(fields[column]))
    return sorted(found)


# --- rows, and what they say ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Found:
    """An example, where it was listed, the folder its path starts from, its name there, and whether off the hub."""

    example: Example
    where: str
    folder: Path
    name: str
    remote: bool


def _found(
    names: Sequence[str | Path], split: str, named: Mapping[str, str], *, texts: bool, recordings: bool
) -> Iterator[_Found]:
    if unknown := next((role for role in named if role not in COLUMN_ALIASES), None):
        raise DataError(f"there is no role {unknown} for a column. Roles are {', '.join(COLUMN_ALIASES)}.")
    taken: set[str] = set()
    again: Counter[str] = Counter()
    for name in (place for listed in names for place in expand_pattern(str(listed))):
        remote, number, spoken, column = name.startswith("hub:"), 0, False, dict[str, str]()
        for number, (where, folder, fields) in enumerate(_rows(name, split, named, recordings), 1):
            if lhotse.is_cut(fields):
                fields = lhotse.parse_cut(where, fields)
            column = _guessed(fields, named)
            for role, asked in named.items() if number == 1 else ():
                if role not in column:
                    raise _no_column(where, role, fields, asked)
            for role in ("audio", "text") if texts else ("audio",):
                if role not in column:
                    raise _no_column(where, role, fields, named.get(role))
            example, called = _example(where, folder, fields, column, str(number))
            spoken = spoken or bool(example.text.strip())
            if texts and not spoken and number == _MUTE:
                break
            example = replace(example, id=_unique(example.id, taken, again))
            yield _Found(example, where, folder, called, remote)
        if not number:
            raise DataError(f"{name}: is empty, there is no row to read. Check that it was written to its end.")
        if texts and not spoken:
            told = column.get("text", "text")
            raise DataError(f"{name}: {told} is empty in all {number} rows read. Name a source with texts.")


def _rows(name: str, split: str, named: Mapping[str, str], recordings: bool) -> Iterator[TableRow]:
    choose = partial(choose_split, split, name)
    if name.startswith("hub:"):
        yield from stream_hub_dataset(name, choose, named.values())
        return
    here = detect_layout(name, allow_audio=recordings)
    if set(here.splits) != {""}:
        for child in here.splits[choose(here.splits)]:
            yield from _rows(str(child), "", named, recordings)
        return
    for file in here.splits[""]:
        if here.kind in ("recording", "folder of recordings"):
            if split:
                raise DataError(f"{name}: has no split {split}, but bare recordings. Leave the split out.")
            yield from _bare(name, file)
        elif archives.is_archive(file):
            yield from archives.read_archive(file, split, choose, named)
        else:
            rows = READERS[full_suffix(file)](file, named.values()) if file.is_file() else _directory(here, file, named)
            yield from filter_split(rows, split, name, named.get("split")) if split else rows


def _directory(here: SourceLayout, folder: Path, named: Mapping[str, str]) -> Iterator[TableRow]:
    return kaldi.read_kaldi(folder) if here.kind == "Kaldi directory" else read_saved_dataset(folder, named.values())


def _bare(name: str, place: Path) -> Iterator[TableRow]:
    """A recording, called as it was given, or those under a folder, called as they are below it."""
    if not place.is_dir():
        yield name, Path(), {"audio": str(place), "id": os.path.splitext(name)[0]}
        return
    for file in walk_audio_files(place):
        yield str(file), Path(), {"audio": str(file), "id": str(file.relative_to(place).with_suffix(""))}


def _guessed(fields: Mapping[str, Any], named: Mapping[str, str]) -> dict[str, str]:
    """Role → column, those that were named first; of the others, none that was named for another role."""
    there = {role: name for role, name in named.items() if name in fields}
    guessed = {role: name for role, name in guess_columns(tuple(fields)).items() if role not in named}
    return {role: name for role, name in guessed.items() if name not in there.values()} | there


def _example(
    where: str, folder: Path, fields: Mapping[str, Any], column: Mapping[str, str], number: str
) -> tuple[Example, str]:
    """The Example of one row, and what the row calls its recording."""
    text = fields[column["text"]] if "text" in column else ""
    if not isinstance(text, str | None):
        raise DataError(f"{where}: {column['text']} is {text!r}, which is no text. Write it in quotes.")
    place, name, sound = _recording(where, folder, fields[column["audio"]])
    named, offset = fields.get(column.get("id", "")), fields.get(column.get("offset", ""))
    length_s, begin_s = _number(fields.get(column.get("duration", ""))), _number(offset)
    if begin_s < 0 or (begin_s and length_s <= 0):
        raise DataError(
            f"{where}: is a part of a recording (offset {offset}) without a duration. Give both, in seconds."
        )
    return Example(
        id=str(named) if named not in (None, "") else Path(name).stem or number,
        audio=place,
        text=text or "",
        duration_s=max(0.0, length_s),
        tags={tag: str(value) for tag in _TAGS if (value := fields.get(column.get(tag, ""))) not in (None, "")},
        offset_s=begin_s,
        is_excerpt=offset not in (None, "") and length_s > 0,
        audio_bytes=sound,
    ), name


def _no_column(where: str, role: str, fields: Mapping[str, Any], asked: str | None = None) -> DataError:
    found = ", ".join(repr(str(name)[:40]) for name in fields) or "none"
    if asked is not None:
        return DataError(f"{where}: there is no column {asked}, which is to be the {role}. Found: {found}.")
    what = {"audio": "recording", "text": "text"}[role]
    return DataError(
        f"{where}: no column holds the {what}. Call one of them {', '.join(COLUMN_ALIASES[role])}; found: {found}."
    )


def _number(value: Any) -> float:
    """A finite number, or 0 where there is none."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return number if math.isfinite(number) else 0.0


def _unique(name: str, taken: set[str], again: Counter[str]) -> str:
    free = name
    while free in taken:
        again[name] += 1
        free = f"{name}-{again[name] + 1}"
    taken.add(free)
    return free


def _recording(where: str, folder: Path, value: Any) -> tuple[str, str, bytes | None]:
    """What stands in the audio column → its place, the name it has there, and its bytes where it is no file."""
    data, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if isinstance(data, bytes):
        return name or where, name or "", data
    name = name or data
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: names no recording. Fill in its path, or delete the row.")
    if "://" in name:
        return name, name, None
    bases = (folder, folder / "clips", Path())
    place = next((there for base in bases if os.path.isfile(there := os.path.join(base, name))), None)
    return os.path.abspath(place or os.path.join(folder, name)), name, None


# --- files that are there ---------------------------------------------------------------------------------------------


def _file(found: _Found, cache: Path) -> Path:
    example = found.example
    if example.audio_bytes is not None:
        return _kept(example.audio_bytes, found.name, cache)
    if "://" in example.audio:
        if not found.remote:
            told = f"{example.audio} is an address, and none is opened from a manifest. Download it first."
            raise DataError(f"{found.where}: {told}")
        return _kept(_fetched(example.audio), example.audio, cache)
    if os.path.isfile(example.audio):
        return Path(example.audio)
    looked = " or ".join(map(str, dict.fromkeys((found.folder.absolute(), Path.cwd()))))
    raise DataError(f"{found.where}: there is no recording {found.name} in {looked}. Mend the path, or delete the row.")


def _fetched(address: str) -> bytes:
    with import_optional("fsspec").open(address, "rb") as file:
        data: bytes = file.read()
    return data


def _kept(data: bytes, name: str, cache: Path) -> Path:
    """The file under `cache` that holds these bytes; by its first bytes, else its name, it gets its suffix."""
    suffix = next((suffix for magic, suffix in _MAGIC.items() if data.startswith(magic)), Path(name).suffix.lower())
    digest = hashlib.sha256(data).hexdigest()[:32]
    file = cache / digest[:2] / f"{digest}{suffix if suffix in audio.AUDIO_SUFFIXES else '.audio'}"
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(file, data)
        except OSError as wrong:
            raise DataError(f"{cache}: recordings cannot be kept there ({wrong.strerror}). Name another.") from None
    return Path(os.path.abspath(file))


def _duration(where: str, stated_s: float, file: Path) -> float:
    """The row's, if it can be right; else the header's; else, where that is silent, decoded and counted."""
    if 0 < stated_s <= _DOUBTFUL_S:
        return stated_s
    try:
        length_s = audio.probe_audio(file).duration_s
        if length_s is None:
            length_s = sum(map(len, audio.stream_audio(file, 16_000))) / 16_000
    except AudioError as wrong:
        raise AudioError(f"{where}: {wrong}") from None
    if stated_s > 20 * length_s:
        raise DataError(f"{where}: duration {stated_s:g}, and the recording has {length_s:.2f} s. Give it in seconds.")
    return stated_s if stated_s > 0 else length_s
