"""What a name stands for: patterns → places, a place → its shape, and the files or folders of each of its splits.

This room knows where others keep recordings and tables; it refuses to know what stands in them: it opens no table, and
of a recording it reads the suffix. `sources` makes Examples of what is found here.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mowa.data.audio import AUDIO_SUFFIXES
from mowa.data.manifests import archives
from mowa.data.manifests.tables import READERS, TableRow, full_suffix, guess_columns
from mowa.errors import DataError

SUPPORTED_DATASETS = (
    "a .jsonl, .csv, .tsv (also as .gz), .parquet or .arrow file, lhotse cuts (.jsonl, .jsonl.gz), a .tar, .tar.gz or "
    ".tgz of recordings (Common Voice as Mozilla ships it, WebDataset shards, any other), a Common Voice folder, a "
    "Kaldi directory (wav.scp), an audiofolder (metadata.jsonl or .csv), a folder with transcripts.tsv, a folder of "
    "{split}.jsonl, .csv, .tsv, .parquet, .arrow or .tar files or of such folders, a folder that datasets saved, and "
    "hub:owner/name[@revision][:config]"
)
SUPPORTED_SOURCES = (
    f"a recording, a folder of them, a pattern in quotes, {SUPPORTED_DATASETS}"  # where no text is needed
)

_DEV = {"dev", "validation", "valid", "val"}
_SPLITS = {"train", "test", *_DEV}
_MANIFESTS = (".jsonl", ".tsv", ".csv", ".jsonl.gz", ".tsv.gz", ".csv.gz")  # the first wins where a split has several
_ASIDE = {"clip_durations", "reported", "times", "unvalidated_sentences", "validated_sentences"}  # of Common Voice
_SHARD = re.compile(r"(?P<split>.+?)-\d+-of-\d+(-\w+)?")
_NUMBERED = re.compile(r"(?P<split>.+?)[-_.]?\d*")  # as WebDataset's: train-000007.tar
_CUTS = re.compile(r"(.*[_-])?cuts([_-](?P<split>.+))?")
_JOURNAL = b'{"journal": '  # of a run that writes beside what it hears
_RANGE = re.compile(r"\{(?P<first>\d+)\.\.(?P<last>\d+)\}|\{(?P<listed>[^{}]*,[^{}]*)\}")
_MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class SourceLayout:
    """How a path is read: its kind in words, and the files or folders of each split ("" where nothing has a name)."""

    kind: str
    splits: Mapping[str, tuple[Path, ...]]


# --- names ------------------------------------------------------------------------------------------------------------


def expand_pattern(source: str) -> Iterator[str]:
    """What a name stands for, sorted: itself, or what matches where it is a pattern (`*`, `?`, `[…]`, `**`, `{0..9}`,
    `{a,b}`): of recordings, archives, tables and folders only the first kind that there is.

    DataError where nothing matches.
    """
    if source.startswith("hub:") or os.path.lexists(os.path.expanduser(source)):
        yield source
        return
    for pattern in _expanded(source):
        if not _MAGIC.search(pattern):
            yield pattern
            continue
        matched = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        kinds = [_kind(Path(match)) for match in matched]
        best = min(filter(None, kinds), default=0)
        if not best:
            what = "nothing that can be read here" if matched else "nothing"
            raise DataError(f"{pattern}: matches {what}. Check the spelling, and what the folder holds.")
        yield from (match for match, kind in zip(matched, kinds, strict=True) if kind == best)


def _kind(path: Path) -> int:
    """1 a recording, 2 an archive, 3 a table, 4 a folder, 0 nothing known."""
    if path.is_dir():
        return 4
    ends = (is_audio_file(path), archives.is_archive(path), full_suffix(path) in READERS)
    return next((rank for rank, known in enumerate(ends, 1) if known), 0)


def _expanded(pattern: str) -> Iterator[str]:
    """`{000..002}` and `{a,b}`, as a shell writes them out."""
    found = _RANGE.search(pattern)
    if found is None:
        yield pattern
        return
    if found["listed"] is not None:
        parts = found["listed"].split(",")
    else:
        first, last = int(found["first"]), int(found["last"])
        width = len(found["first"]) if found["first"].startswith("0") else 1
        parts = [str(number).zfill(width) for number in range(first, last + 1)]
    for part in parts:
        yield from _expanded(pattern[: found.start()] + part + pattern[found.end() :])


def is_audio_file(path: Path) -> bool:
    return path.suffix.lower() in AUDIO_SUFFIXES


def walk_audio_files(folder: Path) -> Iterator[Path]:
    """The recordings under a folder, by name, one directory at a time; hidden ones left out, loops not entered."""
    yield from _walk(str(folder), ())


def _walk(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    try:
        status = os.stat(folder)
        with os.scandir(folder) as listed:
            children = sorted(
                (child.name, child.is_dir())
                for child in listed
                if not child.name.startswith(".") and (is_audio_file(Path(child.name)) or child.is_dir())
            )
    except OSError as wrong:
        raise DataError(f"{folder}: cannot be listed ({wrong.strerror}). Check who may read it.") from None
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for name, deeper in children:
        if deeper:
            yield from _walk(os.path.join(folder, name), (*above, here))
        else:
            yield Path(folder, name)


# --- which files, which split -----------------------------------------------------------------------------------------


def detect_layout(path: str | Path, *, allow_audio: bool = False) -> SourceLayout:
    """Which of the understood shapes a path has: those of `UNDERSTOOD`, with `recordings` also bare recordings.

    DataError where it has none, or does not exist.
    """
    source, path = str(path), Path(path).expanduser()
    if source.startswith("hub:"):
        return SourceLayout("data set on the hub", {})
    if allow_audio and not path.exists() and is_audio_file(path):
        return SourceLayout("recording", {"": (path,)})  # whoever opens it will say that it is not there
    if not path.exists():
        hint = f", or say hub:{source} if it is there" if re.fullmatch(r"[\w-]+/[\w.-]+", source) else ""
        raise DataError(f"{source}: no such file or folder. Check the spelling{hint}.")
    found = _folder(path) if path.is_dir() else None
    if path.is_dir() and found is None and allow_audio and next(walk_audio_files(path), None):
        found = SourceLayout("folder of recordings", {"": (path,)})
    if not path.is_dir():
        if full_suffix(path) in READERS:
            found = SourceLayout(f"{full_suffix(path)} file", {"": (path,)})
        elif archives.is_archive(path):
            found = SourceLayout("archive", {"": (path,)})
        elif allow_audio:
            found = SourceLayout("recording", {"": (path,)})
    if found is None:
        raise DataError(
            f"{source}: is nothing that can be read here. Understood are {SUPPORTED_SOURCES if allow_audio else SUPPORTED_DATASETS}."
        )
    return found


def _folder(path: Path, *, deeper: bool = True) -> SourceLayout | None:
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return SourceLayout("saved by datasets", {"": (path,)})
    if (path / "wav.scp").is_file():
        return SourceLayout("Kaldi directory", {"": (path,)})
    for stem, kind in (("metadata", "audiofolder"), ("transcripts", "folder with transcripts")):
        for ending in _MANIFESTS:
            if (path / f"{stem}{ending}").is_file():
                return SourceLayout(kind, {"": (path / f"{stem}{ending}",)})
    if shards := sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet")):
        return SourceLayout("parquet files", _shards(shards))
    if shards := sorted(path.glob("*.arrow")):
        return SourceLayout("Arrow files", _shards(shards))
    if manifests := _manifests(path):
        return SourceLayout("Common Voice" if (path / "clips").is_dir() else "folder of manifests", manifests)
    if tars := sorted(file for file in path.glob("*.t*") if archives.is_archive(file)):
        return SourceLayout("archives", _shards(tars, _NUMBERED))
    if not deeper:
        return None
    inside = (child for child in sorted(path.glob("[!.]*")) if child.is_dir() and _folder(child, deeper=False))
    folders = {child.name: (child,) for child in inside}
    return SourceLayout("folder of splits", folders) if folders else None


def _manifests(path: Path) -> dict[str, tuple[Path, ...]]:
    found: dict[str, tuple[Path, ...]] = {}
    for ending in _MANIFESTS:
        for file in sorted(path.glob(f"*{ending}")):
            stem = file.name[: -len(ending)]
            if stem not in _ASIDE and not _is_journal(file):
                found.setdefault(stem, (file,))
    # beside lhotse's cuts stand its recordings and supervisions
    cuts = {match["split"] or stem: files for stem, files in found.items() if (match := _CUTS.fullmatch(stem))}
    return cuts or found


def _is_journal(file: Path) -> bool:
    if file.suffix != ".jsonl":
        return False
    with file.open("rb") as opened:
        return opened.read(len(_JOURNAL)) == _JOURNAL


def _shards(files: list[Path], numbered: re.Pattern[str] | None = None) -> dict[str, tuple[Path, ...]]:
    """Shards by split: `{split}-00000-of-00002.parquet`, as the hub has them, `{split}.parquet`, `name-{split}.arrow`.

    numbered: what else a name may be, where one of the usual splits comes of it.
    """
    named = {file: _split(file, numbered) for file in files}
    if not _SPLITS & set(named.values()) and (numbered or not any(_SHARD.fullmatch(file.stem) for file in files)):
        return {"": tuple(files)}  # part-0, part-1: pieces of one table
    return {split: tuple(file for file in files if named[file] == split) for split in named.values()}


def _split(file: Path, numbered: re.Pattern[str] | None) -> str:
    stem = file.name.removesuffix(full_suffix(file)) if full_suffix(file) else file.stem
    match = _SHARD.fullmatch(stem) or (numbered and numbered.fullmatch(stem))
    name = match["split"] if match else stem
    ending = name.rpartition("-")[2]
    return ending if file.suffix == ".arrow" and ending in _SPLITS else name


def choose_split(split: str, source: str, available: Iterable[str]) -> str:
    """The one of `splits` that `split` means: "" is train, or the only one; dev and validation are the same."""
    there = sorted(map(str, available))
    for name in (split or "train", *sorted(_same(split))):
        if name in there:
            return name
    if not split and len(there) == 1:
        return there[0]
    listed = ", ".join(there[:20]) + (", …" if len(there) > 20 else "")
    raise DataError(f"{source}: there is no split {split or 'train'}. Name one of those there are: {listed}.")


def _same(split: str) -> set[str]:
    return _DEV if split in _DEV else {split}


def filter_split(
    rows: Iterator[TableRow], split: str, source: str, split_column: str | None = None
) -> Iterator[TableRow]:
    """Those rows whose column `split` (or `named`) says so. DataError where there is none, or no row says so."""
    seen: set[str] = set()
    for where, folder, fields in rows:
        column = split_column if split_column in fields else guess_columns(tuple(fields)).get("split")
        if column is None:
            raise DataError(f"{where}: split {split} was asked for, and there is no column split. Leave the split out.")
        seen.add(str(fields[column]))
        if str(fields[column]) in _same(split):
            yield where, folder, fields
    if seen and not seen & _same(split):
        choose_split(split, source, seen)
