"""One table, wherever it is kept → its rows, one at a time: JSON lines, CSV, TSV, parquet, Arrow, a stream off the hub.

This room knows containers and what their columns may be called; it refuses to know what a recording is, and decodes
none: sound comes as a path, or as the bytes that the table holds. `sources` puts the tables of a folder together.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

from mowa.errors import DataError, HubUnreachable, MissingDependency

# What a column may be called, the likelier name first; letter case does not matter.
COLUMN_ALIASES: dict[str, tuple[str, ...]] = {
    "audio": tuple("audio audio_filepath audio_path audio_file file_name filename file path wav flac mp3".split()),
    "text": tuple("text sentence transcription transcript normalized_text raw_transcription raw_text txt".split()),
    "id": ("id", "utt_id", "utterance_id", "uid", "key", "__key__"),
    "duration": ("duration_s", "duration"),
    "offset": ("offset",),
    "split": ("split",),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "gender": ("gender", "sex"),
    "age": ("age",),
    "accent": ("accent", "accents"),
    "voice": ("voice",),
    "language": ("language", "locale", "lang"),
}
HUB_PATTERN = re.compile(r"hub:(?P<repo>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?(:(?P<config>.+))?")

TableRow = tuple[str, Path, Mapping[str, Any]]  # where it stands, the folder its paths start from, its columns


@lru_cache(maxsize=256)
def guess_columns(names: tuple[str, ...]) -> dict[str, str]:
    """Role → the column that plays it, of those with these names."""
    there = {str(name).strip().lower(): name for name in reversed(names)}
    return {role: there[name] for role, known in COLUMN_ALIASES.items() for name in reversed(known) if name in there}


def _useful(names: list[str], sounding: list[str], also: Collection[str]) -> dict[str, str]:
    """Columns to read → what to call them: those with a role, sound under any name; all, where a role is missing.
    `also` are columns that were asked for by name."""
    known = {name for names in COLUMN_ALIASES.values() for name in names}
    useful = {name: name for name in names if name.strip().lower() in known or name in also}
    if "audio" not in guess_columns(tuple(useful)) and sounding and sounding[0] not in also:
        useful[sounding[0]] = "audio"
    if {"audio", "text"} <= set(guess_columns(tuple(useful.values()))):
        return useful
    return {name: useful.get(name, name) for name in names}  # so that an error can name them all


# --- text -------------------------------------------------------------------------------------------------------------


def decode_lines(lines: Iterable[bytes], name: object) -> Iterator[str]:
    """Lines with their ends, a byte order mark left out; split at line feeds only, as U+2028 may stand in a text."""
    for number, line in enumerate(lines, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as wrong:
            raise DataError(
                f"{name}:{number}: is not UTF-8 (byte 0x{wrong.object[wrong.start]:02x}). Save it as UTF-8, or "
                "convert it: iconv -f ITS-ENCODING -t UTF-8."
            ) from None


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a text file as `decoded` gives them, unpacked where it is a .gz. DataError, as there."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield from decode_lines(file, path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as wrong:
        raise DataError(f"{path}: is damaged, or cut off ({_reason(wrong)}). Copy it again.") from None
    except OSError as wrong:
        raise DataError(f"{path}: cannot be read ({wrong.strerror}). Check who may read it.") from None


def _objects(path: Path, also: Collection[str] = ()) -> Iterator[TableRow]:
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as wrong:
            raise DataError(
                f"{path}:{number}: broken JSON ({wrong.msg}, column {wrong.colno}). Write one whole object a line."
            ) from None
        if not isinstance(fields, dict):
            raise DataError(f"{path}:{number}: is JSON, but no object with columns. Write one object a line.")
        yield f"{path}:{number}", path.parent, fields


def _table(path: Path, also: Collection[str] = ()) -> Iterator[TableRow]:
    """CSV with its usual quotes, its delimiter told by the header; TSV with none, as Common Voice's quotes are text."""
    lengths = _clip_lengths(path.parent)
    for where, fields in parse_table(read_lines(path), path, tab_separated=full_suffix(path).startswith(".tsv")):
        if (length_s := lengths.get(fields.get("path", ""))) is not None:
            fields["duration_s"] = length_s
        yield where, path.parent, fields


def parse_table(lines: Iterator[str], name: object, *, tab_separated: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table with a header: where each stands, and its columns. `tabs`: as a TSV, quotes being text."""
    first = next(lines, "")
    if tab_separated:
        reader = csv.reader(chain([first], lines), delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(chain([first], lines), delimiter=max(",;\t|", key=first.count))
    try:
        header = next(reader, [])
        for values in reader:
            if not values:
                continue
            where = f"{name}:{reader.line_num}"
            if len(values) > len(header):
                counted = f"{len(values)} columns, the header {len(header)}"
                raise DataError(f"{where}: has {counted}. Quote texts that hold the delimiter.")
            yield where, dict(zip(header, values, strict=False))
    except csv.Error as wrong:
        raise DataError(f"{name}:{reader.line_num}: broken table ({wrong}). Check the quotes before it.") from None


def _clip_lengths(folder: Path) -> dict[str, float]:
    """Seconds by clip, where Common Voice lists them: a header less to read for each of a million clips."""
    listed = folder / "clip_durations.tsv"
    if not listed.is_file():
        return {}
    rows = (line.rstrip("\r\n").split("\t") for line in read_lines(listed))
    return {row[0]: float(row[1]) / 1000 for row in rows if len(row) == 2 and row[1].isdecimal()}


# --- tables that hold bytes -------------------------------------------------------------------------------------------


def _parquet(path: Path, also: Collection[str] = ()) -> Iterator[TableRow]:
    pq, arrow = import_optional("pyarrow.parquet"), import_optional("pyarrow")
    try:
        with pq.ParquetFile(path) as file:
            structs = [field for field in file.schema_arrow if arrow.types.is_struct(field.type)]
            sounding = [field.name for field in structs if field.type.get_field_index("bytes") >= 0]
            useful = _useful(file.schema_arrow.names, sounding, also)
            number = 0
            for batch in file.iter_batches(batch_size=16, columns=list(useful)):
                for fields in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", path.parent, {useful[key]: value for key, value in fields.items()}
    except (arrow.ArrowException, OSError) as wrong:
        raise DataError(f"{path}: is no parquet file, or damaged ({_reason(wrong)}). Copy it again.") from wrong


def _arrow(path: Path, also: Collection[str] = ()) -> Iterator[TableRow]:
    datasets = import_optional("datasets")
    try:
        yield from _mapped(datasets.Dataset.from_file(str(path)), path, path.parent, also)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as wrong:
        raise DataError(
            f"{path}: is no Arrow file of datasets, or damaged ({_reason(wrong)}). Copy it again."
        ) from wrong


READERS: dict[str, Callable[..., Iterator[TableRow]]] = {
    ".jsonl": _objects,
    ".json": _objects,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".jsonl.gz": _objects,
    ".csv.gz": _table,
    ".tsv.gz": _table,
}
"""By `suffix`: one file, and columns that are wanted whatever they are called → its rows."""


def full_suffix(path: Path) -> str:
    """In small letters, with what a .gz holds: `.jsonl.gz`."""
    last = path.suffix.lower()
    return path.with_suffix("").suffix.lower() + last if last == ".gz" else last


def read_saved_dataset(folder: Path, extra_columns: Collection[str] = ()) -> Iterator[TableRow]:
    """The rows of a `Dataset` that `save_to_disk` wrote, straight from its mapped files."""
    datasets = import_optional("datasets")
    try:
        yield from _mapped(datasets.load_from_disk(str(folder)), folder, folder, extra_columns)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as wrong:
        raise DataError(f"{folder}: is damaged ({_reason(wrong)}). Save it again with save_to_disk.") from wrong


def _mapped(data: Any, name: Path, folder: Path, also: Collection[str]) -> Iterator[TableRow]:
    """The rows of a `Dataset`, its sound undecoded."""
    datasets = import_optional("datasets")
    data = data.with_format(None)  # a format is saved with it
    sounding = [name for name, feature in data.features.items() if isinstance(feature, datasets.Audio)]
    for column in sounding:
        data = data.cast_column(column, datasets.Audio(decode=False))
    useful = _useful(data.column_names, sounding, also)
    for number, fields in enumerate(data.select_columns(list(useful)), 1):
        yield f"{name}: row {number}", folder, {useful[key]: value for key, value in fields.items()}


def stream_hub_dataset(
    source: str, choose_split: Callable[[Iterable[str]], str], extra_columns: Collection[str] = ()
) -> Iterator[TableRow]:
    """`hub:owner/name[@revision][:config]`, streamed; `choose` picks one of the splits. HubUnreachable, DataError."""
    with _reached(source) as (datasets, builder, splits):
        data = splits[choose_split(splits)]
        kinds = data.features or {}
        sounding = [name for name, feature in kinds.items() if isinstance(feature, datasets.Audio)]
        for name in sounding:
            data = data.cast_column(name, _undecoded(datasets, builder))
        if useful := _useful(list(kinds), sounding, extra_columns):
            data = data.select_columns(list(useful))
        for number, fields in enumerate(data, 1):
            yield f"{source}: row {number}", Path(), {useful.get(key, key): value for key, value in fields.items()}


def list_hub_splits(source: str) -> list[str]:
    """The splits of a data set on the hub, sorted. Errors as `hub`."""
    with _reached(source) as (_, _, splits):
        return sorted(map(str, splits))


@contextmanager
def _reached(source: str) -> Iterator[tuple[ModuleType, Any, Any]]:
    """datasets, the builder of a data set on the hub, and its streams by split."""
    named = HUB_PATTERN.fullmatch(source)
    if named is None:
        raise DataError(f"{source}: is no data set's name. Say hub:owner/name, or hub:owner/name:config.")
    if Path(named["repo"]).exists():  # datasets would read that instead, without a word
        raise DataError(f"{source}: a folder {named['repo']} stands here. For it, leave out hub:; else work elsewhere.")
    datasets, errors = import_optional("datasets"), import_optional("huggingface_hub.errors")
    try:
        builder = datasets.load_dataset_builder(named["repo"], named["config"], revision=named["revision"])
        if hasattr(builder.config, "decode_num_threads"):
            builder.config.decode_num_threads = 0  # decoding ahead in threads needs torchcodec
        yield datasets, builder, builder.as_streaming_dataset()
    except (ConnectionError, errors.HTTPError) as wrong:
        raise HubUnreachable(f"{source}: the hub does not give it ({_reason(wrong)}). Try again later.") from wrong
    except (datasets.exceptions.DatasetsError, ValueError, RuntimeError, OSError) as wrong:
        raise DataError(f"{source}: cannot be streamed ({_reason(wrong)}). Check its page on the hub.") from wrong


def _undecoded(datasets: ModuleType, builder: Any) -> Any:
    """The feature that leaves sound as the builder has it. Where rows are made one by one, `Audio` would not do: it
    wants torchcodec even to pass a path on (datasets 5.2, Audio.encode_example)."""
    if isinstance(builder, datasets.ArrowBasedBuilder):
        return datasets.Audio(decode=False)
    if builder.info.builder_name == "audiofolder":
        return datasets.Value("string")
    return {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}


def import_optional(name: str) -> ModuleType:
    """A module of what `mowa[data]` brings. MissingPart where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingDependency(f"{name.partition('.')[0]} is needed to read this: pip install 'mowa[data]'") from None


def _reason(wrong: Exception) -> str:
    return next((line.strip() for line in str(wrong).splitlines() if line.strip()), type(wrong).__name__).rstrip(".")
