"""Turn recordings, manifests, folders, archives and Hub data sets into Examples, one at a time.

`list_examples` lists without opening recordings; `read_examples` ensures that each recording is an existing file with a
duration. `discover` detects layouts, which `tables`, `archives`, `kaldi` and `lhotse` read. The Hub is contacted only
for sources that begin with `hub:`.
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

_TAGS = ("speaker", "gender", "age", "accent", "voice", "language")
_MAGIC_SUFFIXES = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"ID3": ".mp3", b"\xff\xfb": ".mp3"}
_DOUBTFUL_S = 300.0  # longer stated durations are compared with the recording: they may be milliseconds
_EMPTY_TEXTS = 100  # rows without text before the column is considered empty


def list_examples(
    sources: str | Path | Sequence[str | Path],
    split: str = "",
    *,
    columns: Mapping[str, str] | None = None,
    require_text: bool = False,
) -> Iterator[Example]:
    """Yield the Examples of `sources` (see `discover.SUPPORTED_SOURCES`) in order, without opening recordings.

    split    one of several splits; "" is train or the only one; dev and validation are the same. In a single table it
             selects rows by their column `split`
    columns  role → column, overriding what is guessed from the names (`tables.COLUMN_ALIASES`)
    require_text  raise DataError if a source has no texts

    Example.audio is an absolute path, whether the file exists or not. Relative paths are searched beside the table, in
    `clips` beside it, and in the working directory. Audio stored in tables and archives is in Example.audio_bytes,
    encoded; URLs (s3://…) stay URLs, except those listed by a `hub:` source, which are fetched. Durations are those
    stated, else 0. A row with `offset` and a duration is an excerpt. Ids are those of the rows, else the stem of the
    file; of recordings without a table, the path without suffix, as given or relative to the given folder. A repeated
    id gets a suffix: name-2. Texts are not changed.

    Memory: the ids, the names in one directory, the table of one split of an archive. Raises DataError with file and
    line for what cannot be listed, after the Examples before it; MissingDependency without `datasets`; HubUnreachable.
    """
    listed = [sources] if isinstance(sources, str | Path) else list(sources)
    for entry in _list_entries(listed, split, columns or {}, require_text=require_text, allow_audio=True):
        example = entry.example
        if entry.on_hub and "://" in example.audio:
            with suppress(Exception):  # protocols raise various errors; opening the URL later will report them
                example = replace(example, audio_bytes=_fetch(example.audio))
        yield example


def read_examples(
    path: str | Path,
    split: str = "",
    *,
    columns: Mapping[str, str] | None = None,
    cache_dir: Path | None = None,
    require_text: bool = True,
) -> Iterator[Example]:
    """Yield the Examples of one source, in order and lazily; each recording is an existing file with a duration.

    As `list_examples`, and: durations are those of the rows, else of the headers; bytes are written to files under
    `cache_dir` (default: mowa's cache), named after their SHA-256. Without `require_text` texts may be missing (""),
    and recordings without a table are allowed.

    Raises DataError with file and line for what cannot be used: no such split, no column of recordings or texts, no
    text in any row, broken JSON, not UTF-8, no rows, no such recording, an excerpt (`offset`); AudioError if a duration
    is needed and cannot be read; MissingDependency without `datasets`; HubUnreachable.
    """
    cache_dir = cache_dir or cache_folder() / "audio"
    for entry in _list_entries([path], split, columns or {}, require_text=require_text, allow_audio=not require_text):
        example = entry.example
        if example.offset_s:
            raise DataError(
                f"{entry.where}: is an excerpt of a recording (offset). Cut the recording into files first."
            )
        file = _audio_file(entry, cache_dir)
        duration_s = _read_duration(entry.where, example.duration_s, file)
        yield replace(example, audio=str(file), duration_s=duration_s, is_excerpt=False, audio_bytes=None)


def list_splits(source: str | Path) -> list[str]:
    """Return the splits of a source, sorted; none if it has only one, or one without a name.

    For a single table they are the values of its column `split`. Errors as `list_examples`.
    """
    if str(source).startswith("hub:"):
        return list_hub_splits(str(source))
    layout = detect_layout(source, allow_audio=True)
    if set(layout.splits) != {""}:
        return sorted(layout.splits)
    (first, *others) = layout.splits[""]
    if layout.kind == "archive":
        return archives.list_splits(first)
    if others or full_suffix(first) not in READERS:
        return []
    found: set[str] = set()
    for _, _, fields in READERS[full_suffix(first)](first):
        column = _assign_columns(fields, {}).get("split")
        if column is None:
            return []
        found.add(str(fields[column]))
    return sorted(found)


# --- rows to Examples -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Entry:
    """An Example, its position for error messages, the folder of relative paths, its path there, whether on the Hub."""

    example: Example
    where: str
    folder: Path
    name: str
    on_hub: bool


def _list_entries(
    sources: Sequence[str | Path], split: str, columns: Mapping[str, str], *, require_text: bool, allow_audio: bool
) -> Iterator[_Entry]:
    if unknown := next((role for role in columns if role not in COLUMN_ALIASES), None):
        raise DataError(f"unknown column role {unknown}. Roles: {', '.join(COLUMN_ALIASES)}.")
    taken: set[str] = set()
    repeats: Counter[str] = Counter()
    for source in (expanded for listed in sources for expanded in expand_pattern(str(listed))):
        on_hub, number, has_text, column = source.startswith("hub:"), 0, False, dict[str, str]()
        for number, (where, folder, fields) in enumerate(_read_rows(source, split, columns, allow_audio), 1):
            if lhotse.is_cut(fields):
                fields = lhotse.parse_cut(where, fields)
            column = _assign_columns(fields, columns)
            for role, requested in columns.items() if number == 1 else ():
                if role not in column:
                    raise _missing_column_error(where, role, fields, requested)
            for role in ("audio", "text") if require_text else ("audio",):
                if role not in column:
                    raise _missing_column_error(where, role, fields, columns.get(role))
            example, name = _to_example(where, folder, fields, column, str(number))
            has_text = has_text or bool(example.text.strip())
            if require_text and not has_text and number == _EMPTY_TEXTS:
                break
            example = replace(example, id=_unique_id(example.id, taken, repeats))
            yield _Entry(example, where, folder, name, on_hub)
        if not number:
            raise DataError(f"{source}: is empty: it has no rows. Check that it was written completely.")
        if require_text and not has_text:
            name = column.get("text", "text")
            raise DataError(f"{source}: {name} is empty in all {number} rows read. Pass a source with texts.")


def _read_rows(source: str, split: str, columns: Mapping[str, str], allow_audio: bool) -> Iterator[TableRow]:
    choose = partial(choose_split, split, source)
    if source.startswith("hub:"):
        yield from stream_hub_dataset(source, choose, columns.values())
        return
    layout = detect_layout(source, allow_audio=allow_audio)
    if set(layout.splits) != {""}:
        for child in layout.splits[choose(layout.splits)]:
            yield from _read_rows(str(child), "", columns, allow_audio)
        return
    for file in layout.splits[""]:
        if layout.kind in ("audio file", "audio folder"):
            if split:
                raise DataError(
                    f"{source}: has no split {split}: recordings without a table have none. Omit the split."
                )
            yield from _read_recordings(source, file)
        elif archives.is_archive(file):
            yield from archives.read_archive(file, split, choose, columns)
        else:
            rows = (
                READERS[full_suffix(file)](file, columns.values())
                if file.is_file()
                else _read_directory(layout, file, columns)
            )
            yield from filter_split(rows, split, source, columns.get("split")) if split else rows


def _read_directory(layout: SourceLayout, folder: Path, columns: Mapping[str, str]) -> Iterator[TableRow]:
    if layout.kind == "Kaldi directory":
        return kaldi.read_kaldi(folder)
    return read_saved_dataset(folder, columns.values())


def _read_recordings(source: str, path: Path) -> Iterator[TableRow]:
    """Yield a recording, whose id is its path as given, or those under a folder, with paths relative to it."""
    if not path.is_dir():
        yield source, Path(), {"audio": str(path), "id": os.path.splitext(source)[0]}
        return
    for file in walk_audio_files(path):
        yield str(file), Path(), {"audio": str(file), "id": str(file.relative_to(path).with_suffix(""))}


def _assign_columns(fields: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    """Return role → column: first those of `columns`, then guessed ones that `columns` does not use."""
    assigned = {role: name for role, name in columns.items() if name in fields}
    guessed = {role: name for role, name in guess_columns(tuple(fields)).items() if role not in columns}
    return {role: name for role, name in guessed.items() if name not in assigned.values()} | assigned


def _to_example(
    where: str, folder: Path, fields: Mapping[str, Any], column: Mapping[str, str], number: str
) -> tuple[Example, str]:
    """Return the Example of a row, and its recording as named in the row."""
    text = fields[column["text"]] if "text" in column else ""
    if not isinstance(text, str | None):
        raise DataError(f"{where}: {column['text']} is {text!r}, not a string. Write it in quotes.")
    path, name, audio_bytes = _locate_audio(where, folder, fields[column["audio"]])
    given_id, offset = fields.get(column.get("id", "")), fields.get(column.get("offset", ""))
    duration_s, offset_s = _to_number(fields.get(column.get("duration", ""))), _to_number(offset)
    if offset_s < 0 or (offset_s and duration_s <= 0):
        raise DataError(f"{where}: has an offset ({offset}) without a duration. Write both, in seconds.")
    return Example(
        id=str(given_id) if given_id not in (None, "") else Path(name).stem or number,
        audio=path,
        text=text or "",
        duration_s=max(0.0, duration_s),
        tags={tag: str(value) for tag in _TAGS if (value := fields.get(column.get(tag, ""))) not in (None, "")},
        offset_s=offset_s,
        is_excerpt=offset not in (None, "") and duration_s > 0,
        audio_bytes=audio_bytes,
    ), name


def _missing_column_error(where: str, role: str, fields: Mapping[str, Any], requested: str | None = None) -> DataError:
    found = ", ".join(repr(str(name)[:40]) for name in fields) or "none"
    if requested is not None:
        return DataError(f"{where}: there is no column {requested}, requested as {role}. Columns: {found}.")
    names = ", ".join(COLUMN_ALIASES[role])
    return DataError(f"{where}: no column for {role}. Recognized names: {names}. Columns: {found}.")


def _to_number(value: Any) -> float:
    """Convert to a finite float, or 0."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return number if math.isfinite(number) else 0.0


def _unique_id(name: str, taken: set[str], repeats: Counter[str]) -> str:
    unique = name
    while unique in taken:
        repeats[name] += 1
        unique = f"{name}-{repeats[name] + 1}"
    taken.add(unique)
    return unique


def _locate_audio(where: str, folder: Path, value: Any) -> tuple[str, str, bytes | None]:
    """Return the path of the recording in an audio column, its name in the row, and its bytes if it is not a file."""
    data, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if isinstance(data, bytes):
        return name or where, name or "", data
    name = name or data
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: has no recording. Add its path, or delete the row.")
    if "://" in name:
        return name, name, None
    candidates = (os.path.join(base, name) for base in (folder, folder / "clips", Path()))
    path = next((candidate for candidate in candidates if os.path.isfile(candidate)), None)
    return os.path.abspath(path or os.path.join(folder, name)), name, None


# --- audio files and durations ----------------------------------------------------------------------------------------


def _audio_file(entry: _Entry, cache_dir: Path) -> Path:
    example = entry.example
    if example.audio_bytes is not None:
        return _cache_audio(example.audio_bytes, entry.name, cache_dir)
    if "://" in example.audio:
        if not entry.on_hub:
            raise DataError(
                f"{entry.where}: {example.audio} is a URL, and URLs in manifests are not read. Download it."
            )
        return _cache_audio(_fetch(example.audio), example.audio, cache_dir)
    if os.path.isfile(example.audio):
        return Path(example.audio)
    folders = " or ".join(map(str, dict.fromkeys((entry.folder.absolute(), Path.cwd()))))
    raise DataError(f"{entry.where}: no recording {entry.name} in {folders}. Correct the path, or delete the row.")


def _fetch(url: str) -> bytes:
    with import_optional("fsspec").open(url, "rb") as file:
        data: bytes = file.read()
    return data


def _cache_audio(data: bytes, name: str, cache_dir: Path) -> Path:
    """Write bytes to a file under `cache_dir`; its suffix follows from the first bytes, else from `name`."""
    suffixes = (suffix for magic, suffix in _MAGIC_SUFFIXES.items() if data.startswith(magic))
    suffix = next(suffixes, Path(name).suffix.lower())
    digest = hashlib.sha256(data).hexdigest()[:32]
    file = cache_dir / digest[:2] / f"{digest}{suffix if suffix in audio.AUDIO_SUFFIXES else '.audio'}"
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(file, data)
        except OSError as error:
            raise DataError(
                f"{cache_dir}: cannot be written ({error.strerror}). Choose another cache folder."
            ) from None
    return Path(os.path.abspath(file))


def _read_duration(where: str, stated_s: float, file: Path) -> float:
    """Return the stated duration if plausible, else that of the header, else that of the decoded audio."""
    if 0 < stated_s <= _DOUBTFUL_S:
        return stated_s
    try:
        duration_s = audio.probe_audio(file).duration_s
        if duration_s is None:
            duration_s = sum(map(len, audio.stream_audio(file, 16_000))) / 16_000
    except AudioError as error:
        raise AudioError(f"{where}: {error}") from None
    if stated_s > 20 * duration_s:
        raise DataError(
            f"{where}: duration is {stated_s:g}, but the recording has {duration_s:.2f} s. Write it in seconds."
        )
    return stated_s if stated_s > 0 else duration_s
