"""Turn recordings, manifests, folders, archives and Hub data sets into Examples, one at a time.

`list_examples` lists without opening recordings; `read_examples` ensures that each recording is an existing file with a
duration. `discover` detects layouts, which `tables`, `archives`, `kaldi` and `lhotse` read, and `recordings` finds what
a row names. The Hub is contacted only for sources that begin with `hub:`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from mowa.data.manifests import archives, kaldi, lhotse
from mowa.data.manifests.discover import (
    SourceLayout,
    choose_split,
    detect_layout,
    expand_pattern,
    filter_split,
    find_missing_shards,
    find_only_corpus,
    missing_row,
    walk_audio_files,
)
from mowa.data.manifests.recordings import ExcerptCutter, cache_audio, fetch, locate_audio, read_duration
from mowa.data.manifests.rows import COLUMN_ALIASES, BadRow, TableRow, guess_columns, parse_times, usable_fields
from mowa.data.manifests.tables import (
    READERS,
    full_suffix,
    list_hub_splits,
    read_saved_dataset,
    stream_hub_dataset,
)
from mowa.data.text.normalize import compose
from mowa.errors import AudioError, DataError, MowaError
from mowa.hardware import cache_folder
from mowa.types import Example

_TAGS = ("speaker", "gender", "age", "accent", "voice", "language")
_EMPTY_TEXTS = 100  # rows without text before the column is considered empty
_BAD_ROWS = 100  # unusable rows at the beginning of a source before all are considered unusable


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
    `clips` and `audios` beside it, and in the working directory. Audio stored in tables and archives is in
    Example.audio_bytes, encoded; URLs (s3://…) stay URLs, except those listed by a `hub:` source, which are fetched.
    Durations are those stated, else 0. A row with `offset` and a duration or `end` is an excerpt. Ids are those of the
    rows, else the stem of the file; of recordings without a table, the path without suffix, as given or relative to the
    given folder. A repeated id gets a suffix: name-2. Texts are not changed.

    A row that cannot be used (a broken line, a segment without length, a command in place of a recording) is an Example
    with the reason in Example.error, and the rows after it are read.

    Memory: the ids, the names in one directory, the table of one split of an archive, JSON that is not JSON Lines.
    Raises DataError with file and line for what cannot be listed, after the Examples before it, and if no row can be
    used, or none of the first 100; MissingDependency without `datasets`; HubUnreachable.
    """
    listed = [sources] if isinstance(sources, str | Path) else list(sources)
    for entry in _list_entries(listed, split, columns or {}, require_text=require_text, allow_audio=True):
        example = entry.example
        if entry.on_hub and "://" in example.audio:
            with suppress(Exception):  # protocols raise various errors; opening the URL later will report them
                example = replace(example, audio_bytes=fetch(example.audio))
        yield example


def read_examples(
    path: str | Path,
    split: str = "",
    *,
    columns: Mapping[str, str] | None = None,
    cache_dir: Path | None = None,
    require_text: bool = True,
    cut_excerpts: bool = True,
    on_unreadable: Callable[[Example, MowaError], object] | None = None,
) -> Iterator[Example]:
    """Yield the Examples of one source, in order and lazily; each recording is an existing file with a duration.

    As `list_examples`, and: durations are those of the rows, else of the headers; bytes are written to files under
    `cache_dir` (default: mowa's cache), named after their SHA-256, and so are excerpts, unless `cut_excerpts` is false.
    Without `require_text` texts may be missing (""), and recordings without a table are allowed. With `on_unreadable`,
    a row that cannot be used, or whose recording is missing or cannot be read, is given to it with the error, and is
    left out.

    Raises DataError with file and line for what cannot be used: no such split, no column of recordings or texts, no
    text in any row, not UTF-8, no rows, and, without `on_unreadable`, a broken row or no such recording; AudioError if
    a duration or an excerpt is needed and cannot be read; MissingDependency without `datasets`; HubUnreachable.
    """
    cache_dir = cache_dir or cache_folder() / "audio"
    cutter = ExcerptCutter(cache_dir) if cut_excerpts else None
    for entry in _list_entries([path], split, columns or {}, require_text=require_text, allow_audio=not require_text):
        try:
            example = _read_recording(entry, cache_dir, cutter)
        except (AudioError, DataError) as error:
            if on_unreadable is None:
                raise
            on_unreadable(entry.example, error)
            continue
        yield example


def _read_recording(entry: _Entry, cache_dir: Path, cutter: ExcerptCutter | None) -> Example:
    example = entry.example
    if example.error:
        raise DataError(example.error)
    file = _audio_file(entry, cache_dir)
    if example.is_excerpt:
        if cutter is None:
            return replace(example, audio=str(file), audio_bytes=None)
        try:
            file = cutter.cut(example, file)
        except AudioError as error:
            raise AudioError(f"{entry.where}: {error}") from None
    duration_s = read_duration(entry.where, example.duration_s, file)
    return replace(example, audio=str(file), duration_s=duration_s, offset_s=0.0, is_excerpt=False, audio_bytes=None)


def list_splits(source: str | Path) -> list[str]:
    """Return the splits of a source, sorted; none if it has only one, or one without a name.

    For a single table they are the values of its column `split`. Errors as `list_examples`.
    """
    if str(source).startswith("hub:"):
        return list_hub_splits(str(source))
    layout = detect_layout(source, allow_audio=True)
    if set(layout.splits) != {""}:
        if only := find_only_corpus(layout):
            return list_splits(only)
        return sorted(layout.splits)
    (first, *others) = layout.splits[""]
    if layout.kind == "archive":
        return archives.list_splits(first)
    if others or full_suffix(first) not in READERS:
        return []
    found: set[str] = set()
    for fields in usable_fields(READERS[full_suffix(first)](first)):
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
    for listed in map(str, sources):
        found = list(expand_pattern(listed))
        for source in found:
            entries = _parse_rows(source, split, columns, require_text=require_text, allow_audio=allow_audio)
            for entry in _require_usable(entries):
                yield replace(entry, example=replace(entry.example, id=_unique_id(entry.example.id, taken, repeats)))
        missing = [file for file in find_missing_shards(map(Path, found)) if fnmatch(file.name, Path(listed).name)]
        for file in missing[:1]:
            where, folder, fields = missing_row(file)
            yield _Entry(_bad_example(where, fields, {}, DataError(fields.reason)), where, folder, "", False)


def _require_usable(entries: Iterator[_Entry]) -> Iterator[_Entry]:
    """Yield the same entries. Raises DataError if none of the first `_BAD_ROWS` can be used."""
    bad: list[_Entry] = []
    for entry in entries:
        bad.append(entry)
        if entry.example.error and len(bad) < _BAD_ROWS:
            continue
        if entry.example.error:
            break
        yield from bad
        yield from entries
        return
    if bad:
        raise DataError(bad[0].example.error)


def _parse_rows(
    source: str, split: str, columns: Mapping[str, str], *, require_text: bool, allow_audio: bool
) -> Iterator[_Entry]:
    number, is_first, has_text, column = 0, True, False, dict[str, str]()
    for number, (where, folder, fields) in enumerate(_read_rows(source, split, columns, allow_audio), 1):
        name = ""
        try:
            if isinstance(fields, BadRow):
                raise DataError(fields.reason)
            if lhotse.is_cut(fields):
                fields = lhotse.parse_cut(where, fields)
            column = _assign_columns(fields, columns)
            missing = [role for role in columns if role not in column] if is_first else []
            for role in () if missing else ("audio", "text") if require_text else ("audio",):
                if role not in column:
                    raise _missing_column_error(where, role, fields, columns.get(role))
            if not missing:
                example, name = _to_example(where, folder, fields, column, str(number))
        except MowaError as error:
            example = _bad_example(where, fields, column, error)
        else:
            if missing:
                raise _missing_column_error(where, missing[0], fields, columns[missing[0]])
            is_first = False
        has_text = has_text or bool(example.text.strip())
        if require_text and not has_text and number == _EMPTY_TEXTS:
            break
        yield _Entry(example, where, folder, name, source.startswith("hub:"))
    if not number:
        raise DataError(f"{source}: is empty: it has no rows. Check that it was written completely.")
    if require_text and not has_text and not is_first:
        name = column.get("text", "text")
        raise DataError(f"{source}: {name} is empty in all {number} rows read. Pass a source with texts.")


def _bad_example(where: str, fields: Any, column: Mapping[str, str], error: MowaError) -> Example:
    given = fields.id if isinstance(fields, BadRow) else fields.get(column.get("id", ""))
    label = str(given) if given not in (None, "") else where.rpartition("/")[2]
    return Example(label, where, "", 0.0, error=str(error))


def _read_rows(source: str, split: str, columns: Mapping[str, str], allow_audio: bool) -> Iterator[TableRow]:
    choose = partial(choose_split, split, source)
    if source.startswith("hub:"):
        yield from stream_hub_dataset(source, choose, columns.values())
        return
    layout = detect_layout(source, allow_audio=allow_audio)
    if layout.kind == "Common Voice, spontaneous" and not split:
        split = "train" if list_splits(source) else ""
    if set(layout.splits) != {""}:
        only = find_only_corpus(layout)
        for child in (only,) if only else layout.splits[choose(layout.splits)]:
            if child.exists():
                yield from _read_rows(str(child), split if only else "", columns, allow_audio)
            else:
                yield missing_row(child)
        return
    for file in layout.splits[""]:
        if layout.kind in ("audio file", "audio folder"):
            if split:
                raise DataError(
                    f"{source}: has no split {split}: recordings without a table have none. Omit the split."
                )
            yield from _read_recordings(source, file)
        elif not file.exists():
            yield missing_row(file)
        elif archives.is_archive(file):
            yield from archives.read_archive(file, split, choose, columns)
        else:
            rows = _read_table(file, columns) if file.is_file() else _read_directory(layout, file, columns)
            yield from filter_split(rows, split, source, columns.get("split")) if split else rows


def _read_table(file: Path, columns: Mapping[str, str]) -> Iterator[TableRow]:
    rows = READERS[full_suffix(file)](file, columns.values())
    recordings = lhotse.find_recordings(file)
    return rows if recordings is None else lhotse.join_recordings(rows, READERS[full_suffix(recordings)](recordings))


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
    path, name, audio_bytes = locate_audio(where, folder, fields[column["audio"]])
    given_id = fields.get(column.get("id", ""))
    offset_s, duration_s, is_excerpt = parse_times(where, fields, column)
    return Example(
        id=str(given_id) if given_id not in (None, "") else Path(name).stem or number,
        audio=path,
        text=text or "",
        duration_s=duration_s,
        tags={tag: value for tag in _TAGS if (value := _to_label(fields.get(column.get(tag, ""))))},
        offset_s=offset_s,
        is_excerpt=is_excerpt,
        audio_bytes=audio_bytes,
    ), name


def _to_label(value: Any) -> str:
    """Return a tag as a string, "" if there is none; one name in two Unicode forms is one label, but case matters."""
    return "" if value is None else compose(str(value).strip())


def _missing_column_error(where: str, role: str, fields: Mapping[str, Any], requested: str | None = None) -> DataError:
    found = ", ".join(repr(str(name)[:40]) for name in fields) or "none"
    if requested is not None:
        return DataError(f"{where}: there is no column {requested}, requested as {role}. Columns: {found}.")
    names = ", ".join(COLUMN_ALIASES[role])
    return DataError(f"{where}: no column for {role}. Recognized names: {names}. Columns: {found}.")


def _unique_id(name: str, taken: set[str], repeats: Counter[str]) -> str:
    unique = name
    while unique in taken:
        repeats[name] += 1
        unique = f"{name}-{repeats[name] + 1}"
    taken.add(unique)
    return unique


# --- audio files and durations ----------------------------------------------------------------------------------------


def _audio_file(entry: _Entry, cache_dir: Path) -> Path:
    example = entry.example
    if example.audio_bytes is not None:
        return cache_audio(example.audio_bytes, entry.name, cache_dir)
    if "://" in example.audio:
        if not entry.on_hub:
            raise DataError(
                f"{entry.where}: {example.audio} is a URL, and URLs in manifests are not read. Download it."
            )
        return cache_audio(fetch(example.audio), example.audio, cache_dir)
    if os.path.isfile(example.audio):
        return Path(example.audio)
    folders = " or ".join(map(str, dict.fromkeys((entry.folder.absolute(), Path.cwd()))))
    raise DataError(f"{entry.where}: no recording {entry.name} in {folders}. Correct the path, or delete the row.")
