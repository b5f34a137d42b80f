"""Files, folders and data sets that hold texts → their rows, one at a time.

What a row says is not known here (`dialogues`), nor how one table is read (`rows`). A text file is one row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mowa.data.manifests.examples import choose_split, filter_split
from mowa.data.manifests.tables import READERS, TableRow, import_optional, read_saved_dataset, stream_hub_dataset
from mowa.errors import DataError

SUPPORTED_FILES = (
    ".jsonl, .json, .csv, .tsv, .parquet, .txt and .md files, a folder of them (one split a file or folder), a folder "
    "that datasets saved, and hub:owner/name[@revision][:config]"
)
TEXT_SUFFIXES = (".txt", ".md")
TABLE_SUFFIXES = (".jsonl", ".json", ".parquet", ".tsv", ".csv")
SHARD_PATTERN = re.compile(r"(?P<split>.+?)(-\d+-of-\d+(-\w+)?)?")


def read_rows(path: str | Path, split: str = "") -> Iterator[TableRow]:
    """(where it stands, its folder, its columns) for every row of what is at `path`; `UNDERSTOOD` lists what may be.

    `split` names one of several: a file or folder of that name, or rows by their column `split`; "" is train, or the
    only one there is. Raises DataError, with file and line, for what cannot be read; MissingPart; HubUnreachable.
    """
    if str(path).startswith("hub:"):
        yield from stream_hub_dataset(str(path), partial(choose_split, split, str(path)))
        return
    place = Path(path).expanduser()
    if not place.exists():
        hint = f", or say hub:{path} if it is there" if re.fullmatch(r"[\w-]+/[\w.-]+", str(path)) else ""
        raise DataError(f"{path}: no such file or folder. Check the spelling{hint}.")
    if place.is_file():
        yield from filter_split(_file(place), split, str(path)) if split else _file(place)
    elif (place / "state.json").is_file() and (place / "dataset_info.json").is_file():
        yield from filter_split(read_saved_dataset(place), split, str(path)) if split else read_saved_dataset(place)
    else:
        yield from _folder(place, split)


def _folder(place: Path, split: str) -> Iterator[TableRow]:
    splits: dict[str, list[Path]] = {}
    for child in sorted([*place.glob("[!.]*"), *place.glob("data/*.parquet")]):
        if child.is_file() and child.suffix.lower() in TABLE_SUFFIXES and child.stem != "dataset_dict":
            named = SHARD_PATTERN.fullmatch(child.stem)
            splits.setdefault(named["split"] if named else child.stem, []).append(child)
        elif child.is_dir() and ((child / "state.json").is_file() or _folder_of_texts(child)):
            splits.setdefault(child.name, []).append(child)
    if splits:
        for child in splits[choose_split(split, str(place), splits)]:
            yield from _file(child) if child.is_file() else read_rows(child)
        return
    plain = _folder_of_texts(place)
    if not plain:
        raise DataError(f"{place}: holds nothing that can be read here. Understood are {SUPPORTED_FILES}.")
    if split:
        raise DataError(f"{place}: split {split} was asked for, and there is no folder of that name. Leave it out.")
    for file in plain:
        yield from _file(file)


def _folder_of_texts(place: Path) -> list[Path]:
    found = (file for file in sorted(place.rglob("*")) if file.is_file() and file.suffix.lower() in TEXT_SUFFIXES)
    return [file for file in found if file.stem.lower() not in ("readme", "license")]


def _file(path: Path) -> Iterator[TableRow]:
    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        yield str(path), path.parent, {"id": path.stem, "text": _decoded(path)}
    elif suffix == ".json":
        yield from _json(path)
    elif suffix == ".parquet":
        yield from _parquet(path)
    elif suffix in READERS:
        yield from READERS[suffix](path)
    else:
        raise DataError(f"{path}: is nothing that can be read here. Understood are {SUPPORTED_FILES}.")


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as wrong:
        raise DataError(
            f"{path}: is not UTF-8 (byte {wrong.start}). Save it as UTF-8: iconv -f ITS-ENCODING -t UTF-8."
        ) from None


def _json(path: Path) -> Iterator[TableRow]:
    """One list of objects, or an object that holds one under `data` or `train`; else lines of objects."""
    text = _decoded(path)
    try:
        found: Any = json.loads(text)
    except json.JSONDecodeError as wrong:
        if text.lstrip().startswith("["):
            raise DataError(f"{path}:{wrong.lineno}: broken JSON ({wrong.msg}). Write one list of objects.") from None
        yield from READERS[".jsonl"](path)
        return
    if isinstance(found, dict):
        found = next((found[name] for name in ("data", "train", "rows") if isinstance(found.get(name), list)), [found])
    if not isinstance(found, list):
        raise DataError(f"{path}: is JSON, but no list of objects. Write one list of objects, or one object a line.")
    for number, fields in enumerate(found, 1):
        if not isinstance(fields, dict):
            raise DataError(f"{path}: row {number}: is JSON, but no object with columns. Write a list of objects.")
        yield f"{path}: row {number}", path.parent, fields


def _parquet(path: Path) -> Iterator[TableRow]:
    pq, arrow = import_optional("pyarrow.parquet"), import_optional("pyarrow")
    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=512):
                for fields in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", path.parent, fields
    except (arrow.ArrowException, OSError) as wrong:
        raise DataError(f"{path}: is no parquet file, or damaged ({wrong}). Copy it again.") from wrong
