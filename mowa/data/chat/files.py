"""Read the rows of files, folders and data sets of texts, one at a time. A text file is one row."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mowa.data.chat.arrow import read_parquet_features, read_saved_features, restore_row
from mowa.data.manifests.discover import (
    SHARD_PATTERN,
    choose_split,
    describe_missing_shards,
    filter_split,
    find_missing_shards,
    missing_source_error,
)
from mowa.data.manifests.rows import BadRow, TableRow
from mowa.data.manifests.tables import (
    READERS,
    full_suffix,
    read_parquet_rows,
    read_saved_dataset,
    stream_hub_dataset,
)
from mowa.errors import DataError

SUPPORTED_FILES = (
    ".jsonl, .json, .csv and .tsv (and .gz of these), .parquet, .txt and .md files, a folder of them (one split per "
    "file or folder), a folder saved by datasets, and hub:owner/name[@revision][:config]"
)
TEXT_SUFFIXES = (".txt", ".md")
TABLE_SUFFIXES = (".jsonl", ".json", ".parquet", ".tsv", ".csv", ".jsonl.gz", ".json.gz", ".tsv.gz", ".csv.gz")


def read_rows(path: str | Path, split: str = "", columns: Collection[str] = ()) -> Iterator[TableRow]:
    """Yield (position, folder, columns) of every row at `path`; `SUPPORTED_FILES` lists what it may be.

    `split` is one of several: a file or folder of that name, or rows by their column `split`; "" is train or the only
    one. Of a data set on the Hub with audio, only texts and `columns` are read. Raises DataError with file and line for
    what cannot be read; MissingDependency; HubUnreachable.
    """
    if str(path).startswith("hub:"):
        features: dict[str, Any] = {}
        rows = stream_hub_dataset(str(path), partial(choose_split, split, str(path)), columns, features.update)
        yield from _restore_rows(rows, features)
        return
    resolved = Path(path).expanduser()
    if not resolved.exists():
        raise missing_source_error(str(path))
    if resolved.is_file():
        yield from filter_split(_read_file(resolved), split, str(path)) if split else _read_file(resolved)
    elif (resolved / "state.json").is_file() and (resolved / "dataset_info.json").is_file():
        rows = _read_saved(resolved)
        yield from filter_split(rows, split, str(path)) if split else rows
    else:
        yield from _read_folder(resolved, split)


def _read_folder(folder: Path, split: str) -> Iterator[TableRow]:
    splits: dict[str, list[Path]] = {}
    for child in sorted([*folder.glob("[!.]*"), *folder.glob("data/*.parquet")]):
        stem = child.name[: -len(full_suffix(child))]
        if child.is_file() and full_suffix(child) in TABLE_SUFFIXES and stem != "dataset_dict":
            shard = SHARD_PATTERN.fullmatch(stem)
            splits.setdefault(shard["split"] if shard else stem, []).append(child)
        elif child.is_dir() and ((child / "state.json").is_file() or _find_text_files(child)):
            splits.setdefault(child.name, []).append(child)
    if splits:
        chosen = splits[choose_split(split, str(folder), splits)]
        if missing := find_missing_shards(chosen):
            raise DataError(describe_missing_shards(missing))
        for child in chosen:
            yield from _read_file(child) if child.is_file() else read_rows(child)
        return
    text_files = _find_text_files(folder)
    if not text_files:
        raise DataError(f"{folder}: contains no supported file. Supported: {SUPPORTED_FILES}.")
    if split:
        raise DataError(f"{folder}: split {split} was requested, but there is no folder of that name. Omit the split.")
    for file in text_files:
        yield from _read_file(file)


def _find_text_files(folder: Path) -> list[Path]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix.lower() in TEXT_SUFFIXES)
    return [file for file in files if file.stem.lower() not in ("readme", "license")]


def _read_file(path: Path) -> Iterator[TableRow]:
    suffix = full_suffix(path)
    if suffix in TEXT_SUFFIXES:
        yield str(path), path.parent, {"id": path.stem, "text": _read_text(path)}
    elif suffix == ".parquet":
        features = read_parquet_features(path)
        rows = ((where, path.parent, fields) for where, fields in read_parquet_rows(path, 512))
        yield from _restore_rows(rows, features)
    elif suffix in READERS:
        yield from READERS[suffix](path)
    else:
        raise DataError(f"{path}: is not a supported file. Supported: {SUPPORTED_FILES}.")


def _read_saved(folder: Path) -> Iterator[TableRow]:
    features = read_saved_features(folder)
    yield from _restore_rows(read_saved_dataset(folder, tuple(features)), features)


def _restore_rows(rows: Iterable[TableRow], features: Mapping[str, Any]) -> Iterator[TableRow]:
    for where, folder, fields in rows:
        yield where, folder, fields if isinstance(fields, BadRow) else restore_row(fields, features)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: is not UTF-8 (byte {error.start}). Save it as UTF-8: iconv -f ITS-ENCODING -t UTF-8."
        ) from None
