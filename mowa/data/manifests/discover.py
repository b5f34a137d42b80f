"""Detect the layout of a source: expand patterns, recognize corpora, and list the files or folders of each split.

Tables are not opened, and recordings are recognized by their suffix. `examples` reads what is found here.
"""

from __future__ import annotations

import glob
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mowa.data.audio import is_audio_file
from mowa.data.manifests import archives, lhotse
from mowa.data.manifests.rows import BadRow, TableRow, guess_columns
from mowa.data.manifests.tables import READERS, full_suffix
from mowa.errors import DataError

SUPPORTED_DATASETS = (
    "a .jsonl, .json, .csv, .tsv (also as .gz), .parquet or .arrow file, lhotse cuts, or supervisions beside "
    "recordings (.jsonl, .jsonl.gz), a .tar, .tar.gz or "
    ".tgz of recordings (Common Voice, WebDataset shards or others), a Common Voice folder, a Kaldi directory "
    "(wav.scp), an audiofolder (metadata.jsonl or .csv), a folder with transcripts.tsv, a folder of {split}.jsonl, "
    ".csv, .tsv, .parquet, .arrow or .tar files or of such folders, a folder saved by datasets, and "
    "hub:owner/name[@revision][:config]"
)
SUPPORTED_SOURCES = f"a recording, a folder of recordings, a pattern in quotes, {SUPPORTED_DATASETS}"
RESULTS_PREFIX = b'{"results": '  # first bytes of a results log (mowa.engines.results)
SHARD_PATTERN = re.compile(r"(?P<split>.+?)-(?P<number>\d+)-of-(?P<count>\d+)(-\w+)?")  # train-00000-of-00002

_MAX_SHARDS = 100_000  # a larger number in a name does not count shards
_DEV = {"dev", "validation", "valid", "val"}
_SPLITS = {"train", "test", *_DEV}
_MANIFEST_SUFFIXES = (".jsonl", ".tsv", ".csv", ".jsonl.gz", ".tsv.gz", ".csv.gz")  # in order of preference
_NUMBERED_PATTERN = re.compile(r"(?P<split>.+?)[-_.]?\d*")  # as in WebDataset: train-000007.tar
_LHOTSE_PATTERNS = [re.compile(rf"(.*[_-])?{name}([_-](?P<split>.+))?") for name in ("cuts", "supervisions")]
_BRACES = re.compile(r"\{(?P<first>\d+)\.\.(?P<last>\d+)\}|\{(?P<listed>[^{}]*,[^{}]*)\}")
_WILDCARD = re.compile(r"[*?\[]")

LayoutKind = Literal[
    "audio file",
    "audio folder",
    "table",
    "archive",
    "archives",
    "Kaldi directory",
    "audiofolder",
    "folder with transcripts",
    "Common Voice",
    "Common Voice, spontaneous",
    "folder of manifests",
    "folder of splits",
    "parquet files",
    "Arrow files",
    "saved by datasets",
    "data set on the Hub",
]


@dataclass(frozen=True, slots=True)
class SourceLayout:
    """How a source is read: its kind, and the files or folders of each split ("" if splits have no names)."""

    kind: LayoutKind
    splits: Mapping[str, tuple[Path, ...]]


# --- patterns ---------------------------------------------------------------------------------------------------------


def expand_pattern(source: str) -> Iterator[str]:
    """Yield the sources that a pattern (`*`, `?`, `[…]`, `**`, `{0..9}`, `{a,b}`) matches, sorted; others as they are.

    Of recordings, archives, tables and folders only the first kind that matches is yielded. Raises DataError if nothing
    matches.
    """
    if source.startswith("hub:") or os.path.lexists(os.path.expanduser(source)):
        yield source
        return
    for pattern in _expand_braces(source):
        if not _WILDCARD.search(pattern):
            yield pattern
            continue
        matched = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        ranks = [_kind_rank(Path(match)) for match in matched]
        best = min(filter(None, ranks), default=0)
        if not best:
            matches = "no supported file" if matched else "nothing"
            raise DataError(f"{pattern}: matches {matches}. Check the spelling and the contents of the folder.")
        yield from (match for match, rank in zip(matched, ranks, strict=True) if rank == best)


def _kind_rank(path: Path) -> int:
    """Return 1 for a recording, 2 for an archive, 3 for a table, 4 for a folder, 0 for others."""
    if path.is_dir():
        return 4
    kinds = (is_audio_file(path), archives.is_archive(path), full_suffix(path) in READERS)
    return next((rank for rank, matches in enumerate(kinds, 1) if matches), 0)


def _expand_braces(pattern: str) -> Iterator[str]:
    """Expand `{000..002}` and `{a,b}` as a shell does."""
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    if match["listed"] is not None:
        parts = match["listed"].split(",")
    else:
        first, last = int(match["first"]), int(match["last"])
        width = len(match["first"]) if match["first"].startswith("0") else 1
        parts = [str(number).zfill(width) for number in range(first, last + 1)]
    for part in parts:
        yield from _expand_braces(pattern[: match.start()] + part + pattern[match.end() :])


def walk_audio_files(folder: Path) -> Iterator[Path]:
    """Yield the recordings under a folder by name, without hidden ones; one directory is listed at a time.

    Links to a parent directory are not followed. Raises DataError for a directory that cannot be listed.
    """
    yield from _walk(str(folder), ())


def _walk(folder: str, parents: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    try:
        status = os.stat(folder)
        with os.scandir(folder) as listed:
            children = sorted(
                (child.name, child.is_dir())
                for child in listed
                if not child.name.startswith(".") and (is_audio_file(child.name) or child.is_dir())
            )
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}). Check its permissions.") from None
    current = (status.st_dev, status.st_ino)
    if current in parents:
        return
    for name, is_folder in children:
        if is_folder:
            yield from _walk(os.path.join(folder, name), (*parents, current))
        else:
            yield Path(folder, name)


# --- layouts ----------------------------------------------------------------------------------------------------------


def missing_source_error(source: str) -> DataError:
    """Return the error for a path that does not exist; it suggests `hub:` for names that look like Hub ids."""
    hint = f", or write hub:{source} if it is on the Hub" if re.fullmatch(r"[\w-]+/[\w.-]+", source) else ""
    return DataError(f"{source}: no such file or folder. Check the spelling{hint}.")


def detect_layout(path: str | Path, *, allow_audio: bool = False) -> SourceLayout:
    """Return the layout of a source: one of `SUPPORTED_DATASETS`, or with `allow_audio` of `SUPPORTED_SOURCES`.

    Raises DataError if it does not exist, cannot be read or has no supported layout.
    """
    try:
        return _detect(str(path), Path(path).expanduser(), allow_audio)
    except PermissionError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}). Check its permissions.") from None


def _detect(source: str, path: Path, allow_audio: bool) -> SourceLayout:
    if source.startswith("hub:"):
        return SourceLayout("data set on the Hub", {})
    if allow_audio and not path.exists() and is_audio_file(path):
        return SourceLayout("audio file", {"": (path,)})  # the error is raised when it is opened
    if not path.exists():
        raise missing_source_error(source)
    layout = _detect_folder(path) if path.is_dir() else None
    if path.is_dir() and layout is None and allow_audio and next(walk_audio_files(path), None):
        layout = SourceLayout("audio folder", {"": (path,)})
    if not path.is_dir():
        if full_suffix(path) in READERS:
            layout = SourceLayout("table", {"": (path,)})
        elif archives.is_archive(path):
            layout = SourceLayout("archive", {"": (path,)})
        elif allow_audio:
            layout = SourceLayout("audio file", {"": (path,)})
    if layout is None:
        supported = SUPPORTED_SOURCES if allow_audio else SUPPORTED_DATASETS
        raise DataError(f"{source}: is not a supported source. Supported: {supported}.")
    return layout


def _detect_folder(path: Path, *, recurse: bool = True) -> SourceLayout | None:
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return SourceLayout("saved by datasets", {"": (path,)})
    if (path / "wav.scp").is_file():
        return SourceLayout("Kaldi directory", {"": (path,)})
    named: tuple[tuple[str, LayoutKind], ...] = (
        ("metadata", "audiofolder"),
        ("transcripts", "folder with transcripts"),
    )
    for stem, kind in named:
        for suffix in _MANIFEST_SUFFIXES:
            if (path / f"{stem}{suffix}").is_file():
                return SourceLayout(kind, {"": (path / f"{stem}{suffix}",)})
    if shards := sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet")):
        return SourceLayout("parquet files", _group_shards(shards))
    if shards := sorted(path.glob("*.arrow")):
        return SourceLayout("Arrow files", _group_shards(shards))
    if manifests := _find_manifests(path):
        if spontaneous := [files for stem, files in manifests.items() if archives.is_spontaneous(stem)]:
            return SourceLayout("Common Voice, spontaneous", {"": spontaneous[0]})
        return SourceLayout("Common Voice" if (path / "clips").is_dir() else "folder of manifests", manifests)
    if tars := sorted(file for file in path.glob("*.t*") if archives.is_archive(file)):
        return SourceLayout("archives", _group_shards(tars, _NUMBERED_PATTERN))
    if not recurse:
        return None
    children = (child for child in sorted(path.glob("[!.]*")) if child.is_dir())
    folders = {child.name: (child,) for child in children if _detect_folder(child, recurse=False)}
    return SourceLayout("folder of splits", folders) if folders else None


def find_only_corpus(layout: SourceLayout) -> Path | None:
    """Return the only folder of a folder, if its name is not that of a split: as `pl` in a download of Common Voice."""
    if layout.kind != "folder of splits" or len(layout.splits) != 1:
        return None
    ((name, folders),) = layout.splits.items()
    return None if name in _SPLITS else folders[0]


def _find_manifests(path: Path) -> dict[str, tuple[Path, ...]]:
    found: dict[str, list[Path]] = {}
    for suffix in (*_MANIFEST_SUFFIXES, ".json", ".json.gz"):
        for file in sorted(path.glob(f"*{suffix}")):
            stem = file.name[: -len(suffix)]
            is_lhotse = any(pattern.fullmatch(stem) for pattern in _LHOTSE_PATTERNS)
            if (
                (is_lhotse or suffix in _MANIFEST_SUFFIXES)
                and archives.is_split_table(stem)
                and not _is_results_log(file)
            ):
                match = SHARD_PATTERN.fullmatch(stem)
                split = match["split"] if match else stem
                if split not in found or (match and full_suffix(found[split][0]) == suffix):
                    found.setdefault(split, []).append(file)
    # lhotse writes recordings and supervisions beside the cuts
    for pattern, is_kept in zip(_LHOTSE_PATTERNS, (lambda file: True, lhotse.find_recordings), strict=True):
        named = {
            match["split"] or stem: tuple(files)
            for stem, files in found.items()
            if (match := pattern.fullmatch(stem)) and is_kept(files[0])
        }
        if named:
            return named
    return {split: _with_missing(files) for split, files in found.items()}


def _is_results_log(file: Path) -> bool:
    if file.suffix != ".jsonl":
        return False
    with file.open("rb") as opened:
        return opened.read(len(RESULTS_PREFIX)) == RESULTS_PREFIX


def _group_shards(files: list[Path], numbered: re.Pattern[str] | None = None) -> dict[str, tuple[Path, ...]]:
    """Group shards by split: `{split}-00000-of-00002.parquet`, `{split}.parquet`, `name-{split}.arrow`.

    `numbered` is another pattern of names, used only if it yields one of the usual splits.
    """
    split_of = {file: _split_name(file, numbered) for file in files}
    if not _SPLITS & set(split_of.values()) and (
        numbered or not any(SHARD_PATTERN.fullmatch(file.stem) for file in files)
    ):
        return {"": tuple(files)}  # part-0, part-1: parts of one table
    splits = dict.fromkeys(split_of.values())
    return {split: _with_missing([file for file in files if split_of[file] == split]) for split in splits}


def _with_missing(files: Sequence[Path]) -> tuple[Path, ...]:
    """Return the shards of a split, and the first one that is missing, for `missing_row` to report them all."""
    return (*files, *find_missing_shards(files)[:1])


def missing_row(shard: Path) -> tuple[str, Path, BadRow]:
    """Return the row that reports the missing shards of the set of this one, which is not there."""
    missing = find_missing_shards(file for file in shard.parent.iterdir() if full_suffix(file) == full_suffix(shard))
    prefix = shard.name[: shard.name.rfind("-of-")].rpartition("-")[0]
    same = [file for file in missing if file.name.startswith(f"{prefix}-")]
    return str(shard), shard.parent, BadRow(describe_missing_shards(same or [shard]), shard.name)


def find_missing_shards(files: Iterable[Path]) -> list[Path]:
    """Return the files that sets of shards, `{name}-00000-of-00010`, lack. Numbers begin with 0 or 1."""
    numbers: dict[tuple[Path, int, int], set[int]] = defaultdict(set)
    for file in files:
        suffix = full_suffix(file) or file.suffix
        match = SHARD_PATTERN.fullmatch(file.name.removesuffix(suffix))
        if match and int(match["count"]) <= _MAX_SHARDS:
            name = file.with_name(f"{match['split']}-{{}}-of-{match['count']}{suffix}")
            numbers[name, int(match["count"]), len(match["number"])].add(int(match["number"]))
    return [
        Path(str(name).replace("{}", str(number).zfill(width)))
        for (name, count, width), present in numbers.items()
        for number in range(count in present, count + (count in present))
        if number not in present
    ]


def describe_missing_shards(missing: Sequence[Path]) -> str:
    """Return the reason for a `BadRow`: how many shards are missing, and the first ones."""
    names = ", ".join(file.name for file in missing[:5]) + (", …" if len(missing) > 5 else "")
    count = f"{len(missing)} shards are" if len(missing) > 1 else "a shard is"
    return f"{missing[0].parent}: {count} missing: {names}. Download again, or name the files to read."


def _split_name(file: Path, numbered: re.Pattern[str] | None) -> str:
    stem = file.name.removesuffix(full_suffix(file)) if full_suffix(file) else file.stem
    match = SHARD_PATTERN.fullmatch(stem) or (numbered and numbered.fullmatch(stem))
    name = match["split"] if match else stem
    last = name.rpartition("-")[2]
    return last if file.suffix == ".arrow" and last in _SPLITS else name


# --- splits -----------------------------------------------------------------------------------------------------------


def choose_split(split: str, source: str, available: Iterable[str]) -> str:
    """Return the available split that `split` means: "" is train or the only one; dev and validation are the same.

    Raises DataError if there is none.
    """
    names = sorted(map(str, available))
    for name in (split or "train", *sorted(_synonyms(split))):
        if name in names:
            return name
    if not split and len(names) == 1:
        return names[0]
    listed = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    raise DataError(f"{source}: has no split {split or 'train'}. Available splits: {listed}.")


def _synonyms(split: str) -> set[str]:
    return _DEV if split in _DEV else {split}


def filter_split(
    rows: Iterator[TableRow], split: str, source: str, split_column: str | None = None
) -> Iterator[TableRow]:
    """Yield the rows whose column `split` (or `split_column`) is `split`, and bad rows.

    Raises DataError if there is no such column, or no row of that split.
    """
    seen: set[str] = set()
    for where, folder, fields in rows:
        if isinstance(fields, BadRow):
            yield where, folder, fields
            continue
        column = split_column if split_column in fields else guess_columns(tuple(fields)).get("split")
        if column is None:
            raise DataError(f"{where}: split {split} was requested, but there is no column split. Omit the split.")
        seen.add(str(fields[column]))
        if str(fields[column]) in _synonyms(split):
            yield where, folder, fields
    if seen and not seen & _synonyms(split):
        choose_split(split, source, seen)
