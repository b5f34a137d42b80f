"""Manifests, folders and data sets of every usual shape → Examples, one at a time.

This room knows where others keep recordings and texts; it refuses to know what is learnt from them (`sift` says which
can be) and how a table is read (`rows`). Nothing is decoded or copied but what has no file of its own (bytes in
parquet, Arrow or a stream): that is written once, under `cache`. The hub is reached only for a source named `hub:`.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mowa.data import audio
from mowa.data.rows import READERS, ROLES, Row, columns, hub, part, saved
from mowa.errors import AudioError, DataError
from mowa.files import atomic_write
from mowa.machine import cache_folder
from mowa.nouns import Example

UNDERSTOOD = (
    "a .jsonl, .csv, .tsv or .parquet file, a Common Voice folder, an audiofolder (metadata.jsonl or .csv), a folder "
    "with transcripts.tsv, a folder of {split}.jsonl, .csv, .tsv or .parquet files or of such folders, a folder that "
    "datasets saved, and hub:owner/name[@revision][:config]"
)

_TAGS = ("speaker", "gender", "age", "accent", "voice", "language")
_DEV = {"dev", "validation", "valid", "val"}
_MANIFESTS = (".jsonl", ".tsv", ".csv")  # in a folder; the first wins where a split has several
_ASIDE = {"clip_durations", "reported", "times", "unvalidated_sentences", "validated_sentences"}  # of Common Voice
_SHARD = re.compile(r"(?P<split>.+)-\d+-of-\d+(-\w+)?")
_MAGIC = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"ID3": ".mp3", b"\xff\xfb": ".mp3"}
_DOUBTFUL_S = 300.0  # longer than this, a duration is compared with the recording: it may be in milliseconds
_MUTE = 100  # so many rows without a text, and the column has none


@dataclass(frozen=True, slots=True)
class Layout:
    """How a path is read: its kind in words, and the files or folders of each split ("" where nothing has a name)."""

    kind: str
    splits: Mapping[str, tuple[Path, ...]]


def read(path: str | Path, split: str = "", *, cache: Path | None = None, texts: bool = True) -> Iterator[Example]:
    """The recordings and texts of a manifest, folder or data set (`UNDERSTOOD` lists them), in order, lazily.

    `split` names one of several; "" is train, or the only one there is; dev and validation are the same. In a single
    manifest it picks rows by their column `split`. Audio paths are absolute: what is relative is looked for beside the
    manifest, in `clips` beside it, and in the working directory. Durations are the row's, else the header's. Ids are
    the row's, else the file's stem, else numbers; a second one of the same name becomes name-2. Tags, where given:
    speaker, gender, age, accent, voice, language. Texts are left as they are. `cache` (default: mowa's own) is where
    bytes become files, named after their sha256. With `texts=False` rows need none (it is then "").

    Raises DataError, with file and line, for what cannot be used: no such split, no column for recording or text,
    no text in any row, broken JSON, not UTF-8, no rows, no such recording, a part of a recording (`offset`); AudioError
    for a recording whose length has to be read and cannot be; MissingPart without `datasets`; HubUnreachable.
    """
    cache = cache or cache_folder() / "audio"
    remote = str(path).startswith("hub:")
    taken: set[str] = set()
    again: Counter[str] = Counter()
    number, spoken = 0, False
    for number, (where, folder, fields) in enumerate(_rows(path, split), 1):
        column = columns(tuple(fields))
        for role in ("audio", "text") if texts else ("audio",):
            if role not in column:
                raise _no_column(where, role, fields)
        text = fields[column["text"]] if "text" in column else ""
        if not isinstance(text, str | None):
            raise DataError(f"{where}: {column['text']} is {text!r}, which is no text. Write it in quotes.")
        spoken = spoken or bool(text and text.strip())
        if texts and not spoken and number == _MUTE:
            break
        if _number(fields.get(column.get("offset", ""))):
            raise DataError(f"{where}: is a part of a recording (offset). Cut the recordings into files first.")
        file, name = _recording(where, folder, fields[column["audio"]], cache, remote)
        named = fields.get(column.get("id", ""))
        yield Example(
            id=_unique(str(named) if named not in (None, "") else Path(name).stem or str(number), taken, again),
            audio=str(file),
            text=text or "",
            duration_s=_duration(where, _number(fields.get(column.get("duration", ""))), file),
            tags={tag: str(value) for tag in _TAGS if (value := fields.get(column.get(tag, ""))) not in (None, "")},
        )
    if not number:
        raise DataError(f"{path}: is empty, there is no row to read. Check that it was written to its end.")
    if texts and not spoken:
        raise DataError(f"{path}: {column['text']} is empty in all {number} rows read. Name a source with texts.")


# --- which files, which split -----------------------------------------------------------------------------------------


def layout(path: str | Path) -> Layout:
    """Which of the understood shapes a path has. DataError where it has none, or does not exist."""
    source, path = str(path), Path(path).expanduser()
    if source.startswith("hub:"):
        return Layout("data set on the hub", {})
    if not path.exists():
        hint = f", or say hub:{source} if it is there" if re.fullmatch(r"[\w-]+/[\w.-]+", source) else ""
        raise DataError(f"{source}: no such file or folder. Check the spelling{hint}.")
    found = _folder(path) if path.is_dir() else None
    if path.is_file() and path.suffix.lower() in READERS:
        found = Layout(f"{path.suffix.lower()} file", {"": (path,)})
    if found is None:
        raise DataError(f"{source}: is nothing that can be read here. Understood are {UNDERSTOOD}.")
    return found


def _folder(path: Path, *, deeper: bool = True) -> Layout | None:
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return Layout("saved by datasets", {"": (path,)})
    for stem, kind in (("metadata", "audiofolder"), ("transcripts", "folder with transcripts")):
        for suffix in _MANIFESTS:
            if (path / f"{stem}{suffix}").is_file():
                return Layout(kind, {"": (path / f"{stem}{suffix}",)})
    if shards := sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet")):
        return Layout("parquet files", _shards(shards))
    manifests: dict[str, tuple[Path, ...]] = {}
    for suffix in _MANIFESTS:
        for file in sorted(path.glob(f"*{suffix}")):
            if file.stem not in _ASIDE:
                manifests.setdefault(file.stem, (file,))
    if manifests:
        return Layout("Common Voice" if (path / "clips").is_dir() else "folder of manifests", manifests)
    if not deeper:
        return None
    inside = (child for child in sorted(path.glob("[!.]*")) if child.is_dir() and _folder(child, deeper=False))
    folders = {child.name: (child,) for child in inside}
    return Layout("folder of splits", folders) if folders else None


def _shards(files: list[Path]) -> dict[str, tuple[Path, ...]]:
    """Parquet files by split: `{split}-00000-of-00002.parquet`, as the hub has them, or `{split}.parquet`."""
    named = {file: match["split"] if (match := _SHARD.fullmatch(file.stem)) else file.stem for file in files}
    if not {"train", "test", *_DEV} & set(named.values()) and not any(_SHARD.fullmatch(file.stem) for file in files):
        return {"": tuple(files)}  # part-0, part-1: pieces of one table
    return {split: tuple(file for file in files if named[file] == split) for split in named.values()}


def _rows(path: str | Path, split: str) -> Iterator[Row]:
    if str(path).startswith("hub:"):
        yield from hub(str(path), partial(chosen, split, str(path)))
        return
    splits = layout(path).splits
    if set(splits) != {""}:
        for child in splits[chosen(split, str(path), splits)]:
            yield from _rows(child, "")
        return
    for file in splits[""]:
        rows = saved(file) if file.is_dir() else READERS[file.suffix.lower()](file)
        yield from of_split(rows, split, str(path)) if split else rows


def chosen(split: str, source: str, splits: Iterable[str]) -> str:
    """The one of `splits` that `split` means: "" is train, or the only one; dev and validation are the same."""
    there = sorted(map(str, splits))
    for name in (split or "train", *sorted(_same(split))):
        if name in there:
            return name
    if not split and len(there) == 1:
        return there[0]
    listed = ", ".join(there[:20]) + (", …" if len(there) > 20 else "")
    raise DataError(f"{source}: there is no split {split or 'train'}. Name one of those there are: {listed}.")


def _same(split: str) -> set[str]:
    return _DEV if split in _DEV else {split}


def of_split(rows: Iterator[Row], split: str, source: str) -> Iterator[Row]:
    """Those rows whose column `split` says so. DataError where there is no such column, or none of them does."""
    seen: set[str] = set()
    for where, folder, fields in rows:
        column = columns(tuple(fields)).get("split")
        if column is None:
            raise DataError(f"{where}: split {split} was asked for, and there is no column split. Leave the split out.")
        seen.add(str(fields[column]))
        if str(fields[column]) in _same(split):
            yield where, folder, fields
    if seen and not seen & _same(split):
        chosen(split, source, seen)


# --- one row ----------------------------------------------------------------------------------------------------------


def _no_column(where: str, role: str, fields: Mapping[str, Any]) -> DataError:
    what = {"audio": "recording", "text": "text"}[role]
    found = ", ".join(repr(str(name)[:40]) for name in fields) or "none"
    return DataError(f"{where}: no column holds the {what}. Call one of them {', '.join(ROLES[role])}; found: {found}.")


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


def _recording(where: str, folder: Path, value: Any, cache: Path, remote: bool) -> tuple[Path, str]:
    """What stands in the audio column → a file that is there, and the name it had."""
    data, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if isinstance(data, bytes):
        return _kept(data, name or "", cache), name or ""
    name = name or data
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: names no recording. Fill in its path, or delete the row.")
    if "://" in name:
        if not remote:
            raise DataError(f"{where}: {name} is an address, and none is opened from a manifest. Download it first.")
        with part("fsspec").open(name, "rb") as file:
            return _kept(file.read(), name, cache), name
    for base in (folder, folder / "clips", Path()):
        if (base / name).is_file():
            return Path(os.path.abspath(base / name)), name
    looked = dict.fromkeys((folder.absolute(), Path.cwd()))
    raise DataError(
        f"{where}: there is no recording {name} in {' or '.join(map(str, looked))}. Mend the path, or delete the row."
    )


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
        length_s = audio.probe(file).duration_s
        if length_s is None:
            length_s = sum(map(len, audio.stream(file, 16_000))) / 16_000
    except AudioError as wrong:
        raise AudioError(f"{where}: {wrong}") from None
    if stated_s > 20 * length_s:
        raise DataError(f"{where}: duration {stated_s:g}, and the recording has {length_s:.2f} s. Give it in seconds.")
    return stated_s if stated_s > 0 else length_s
