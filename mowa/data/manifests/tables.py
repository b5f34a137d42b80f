"""Read one table row by row: a text table (`text_tables`), parquet, Arrow, or a data set streamed from the Hub.

Audio is not decoded: a row holds its path or the bytes in the table. `examples` combines the tables of a corpus.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from mowa.data.manifests.rows import COLUMN_ALIASES, TableRow, guess_columns
from mowa.data.manifests.text_tables import read_json, read_table
from mowa.errors import DataError, HubUnreachable, MissingDependency

HUB_PATTERN = re.compile(r"hub:(?P<repo>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?(:(?P<config>.+))?")


def _select_columns(names: list[str], audio_columns: list[str], extra_columns: Collection[str]) -> dict[str, str]:
    """Return column → its new name, for the columns to read.

    These are columns with a role, `extra_columns`, and the first of `audio_columns` (columns of audio bytes) if no
    column is called audio. If audio or text are not among them, all columns are read, so that an error can list them.
    """
    aliases = {name for names in COLUMN_ALIASES.values() for name in names}
    selected = {name: name for name in names if name.strip().lower() in aliases or name in extra_columns}
    if "audio" not in guess_columns(tuple(selected)) and audio_columns and audio_columns[0] not in extra_columns:
        selected[audio_columns[0]] = "audio"
    if {"audio", "text"} <= set(guess_columns(tuple(selected.values()))):
        return selected
    return {name: selected.get(name, name) for name in names}


# --- binary tables ----------------------------------------------------------------------------------------------------


def read_parquet_rows(
    path: Path, batch_size: int, select_columns: Callable[[Any], Mapping[str, str]] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the position and the columns of each row of a parquet file.

    `select_columns` maps the Arrow schema to column → new name, for the columns to read. Raises DataError if the file
    is not parquet or damaged, and MissingDependency without pyarrow.
    """
    pq, arrow = import_optional("pyarrow.parquet"), import_optional("pyarrow")
    try:
        with pq.ParquetFile(path) as file:
            names = (
                select_columns(file.schema_arrow) if select_columns else {key: key for key in file.schema_arrow.names}
            )
            number = 0
            for batch in file.iter_batches(batch_size=batch_size, columns=list(names) if select_columns else None):
                for fields in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", {names[key]: value for key, value in fields.items()}
    except (arrow.ArrowException, OSError) as error:
        reason = _first_line(error)
        raise DataError(f"{path}: is not a parquet file, or is damaged ({reason}). Copy it again.") from error


def _read_parquet(path: Path, extra_columns: Collection[str] = ()) -> Iterator[TableRow]:
    def select_columns(schema: Any) -> dict[str, str]:
        structs = [field for field in schema if import_optional("pyarrow").types.is_struct(field.type)]
        audio_columns = [
            field.name for field in structs if any(field.type.get_field_index(key) >= 0 for key in ("bytes", "array"))
        ]
        return _select_columns(schema.names, audio_columns, extra_columns)

    for where, fields in read_parquet_rows(path, 16, select_columns):
        yield where, path.parent, fields


def _read_arrow(path: Path, extra_columns: Collection[str] = ()) -> Iterator[TableRow]:
    datasets = import_optional("datasets")
    try:
        yield from _read_dataset(datasets.Dataset.from_file(str(path)), path, path.parent, extra_columns)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        reason = _first_line(error)
        raise DataError(
            f"{path}: is not an Arrow file of datasets, or is damaged ({reason}). Copy it again."
        ) from error


READERS: dict[str, Callable[..., Iterator[TableRow]]] = {
    ".jsonl": read_json,
    ".json": read_json,
    ".csv": read_table,
    ".tsv": read_table,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".jsonl.gz": read_json,
    ".json.gz": read_json,
    ".csv.gz": read_table,
    ".tsv.gz": read_table,
}
"""`full_suffix` → function of a path, and of columns to read whatever they are called, that yields rows."""


def full_suffix(path: Path) -> str:
    """Return the suffix in lower case; for .gz both suffixes, such as `.jsonl.gz`."""
    last = path.suffix.lower()
    return path.with_suffix("").suffix.lower() + last if last == ".gz" else last


def read_saved_dataset(folder: Path, extra_columns: Collection[str] = ()) -> Iterator[TableRow]:
    """Yield the rows of a `datasets.Dataset` saved with `save_to_disk`, memory-mapped. Raises DataError if damaged."""
    datasets = import_optional("datasets")
    try:
        yield from _read_dataset(datasets.load_from_disk(str(folder)), folder, folder, extra_columns)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        raise DataError(f"{folder}: is damaged ({_first_line(error)}). Save it again with save_to_disk.") from error


def _read_dataset(data: Any, name: Path, folder: Path, extra_columns: Collection[str]) -> Iterator[TableRow]:
    """Yield the rows of a `datasets.Dataset` without decoding audio."""
    datasets = import_optional("datasets")
    data = data.with_format(None)  # a format is saved with the data
    audio_columns = [name for name, feature in data.features.items() if isinstance(feature, datasets.Audio)]
    for column in audio_columns:
        data = data.cast_column(column, datasets.Audio(decode=False))
    decoded = [name for name, feature in data.features.items() if isinstance(feature, dict) and "array" in feature]
    names = _select_columns(data.column_names, audio_columns + decoded, extra_columns)
    for number, fields in enumerate(data.select_columns(list(names)), 1):
        yield f"{name}: row {number}", folder, {names[key]: value for key, value in fields.items()}


# --- the Hub ----------------------------------------------------------------------------------------------------------


def stream_hub_dataset(
    source: str,
    choose_split: Callable[[Iterable[str]], str],
    extra_columns: Collection[str] = (),
    on_features: Callable[[Mapping[str, Any]], object] = lambda features: None,
) -> Iterator[TableRow]:
    """Stream `hub:owner/name[@revision][:config]`; `choose_split` returns one of the available splits.

    `on_features` is called with the features of the columns, as far as they are known, before the first row.

    Raises HubUnreachable, DataError if it cannot be streamed, and MissingDependency without datasets.
    """
    with _open_hub_dataset(source) as (datasets, builder, splits):
        data = splits[choose_split(splits)]
        features = data.features or {}
        on_features(features)
        audio_columns = [name for name, feature in features.items() if isinstance(feature, datasets.Audio)]
        for name in audio_columns:
            data = data.cast_column(name, _undecoded_feature(datasets, builder))
        if names := _select_columns(list(features), audio_columns, extra_columns):
            data = data.select_columns(list(names))
        for number, fields in enumerate(data, 1):
            yield f"{source}: row {number}", Path(), {names.get(key, key): value for key, value in fields.items()}


def list_hub_splits(source: str) -> list[str]:
    """Return the splits of a Hub data set, sorted. Errors as `stream_hub_dataset`."""
    with _open_hub_dataset(source) as (_, _, splits):
        return sorted(map(str, splits))


@contextmanager
def _open_hub_dataset(source: str) -> Iterator[tuple[ModuleType, Any, Any]]:
    """Yield the datasets module, the builder of a Hub data set, and its streams by split."""
    match = HUB_PATTERN.fullmatch(source)
    if match is None:
        raise DataError(f"{source}: is not a Hub data set. Write hub:owner/name or hub:owner/name:config.")
    if Path(match["repo"]).exists():  # datasets would read the folder instead
        raise DataError(
            f"{source}: the folder {match['repo']} exists here. Omit hub: to read it, or work in another folder."
        )
    datasets, errors = import_optional("datasets"), import_optional("huggingface_hub.errors")
    try:
        builder = datasets.load_dataset_builder(match["repo"], match["config"], revision=match["revision"])
        if hasattr(builder.config, "decode_num_threads"):
            builder.config.decode_num_threads = 0  # decoding ahead in threads needs torchcodec
        yield datasets, builder, builder.as_streaming_dataset()
    except (ConnectionError, errors.HTTPError) as error:
        raise HubUnreachable(f"{source}: the Hub cannot be reached ({_first_line(error)}). Try again later.") from error
    except (datasets.exceptions.DatasetsError, ValueError, RuntimeError, OSError) as error:
        raise DataError(f"{source}: cannot be streamed ({_first_line(error)}). Check its page on the Hub.") from error


def _undecoded_feature(datasets: ModuleType, builder: Any) -> Any:
    """Return the feature that keeps audio as the builder stores it.

    For builders that encode row by row, `Audio` needs torchcodec even for paths (datasets 5.2, Audio.encode_example).
    """
    if isinstance(builder, datasets.ArrowBasedBuilder):
        return datasets.Audio(decode=False)
    if builder.info.builder_name == "audiofolder":
        return datasets.Value("string")
    return {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}


def import_optional(name: str) -> ModuleType:
    """Import a module of the extra `mowa[data]`. Raises MissingDependency if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingDependency(f"{name.partition('.')[0]} is needed to read this: pip install 'mowa[data]'") from None


def _first_line(error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__).rstrip(".")
