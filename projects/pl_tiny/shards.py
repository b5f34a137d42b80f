"""Unpack a corpus of tar shards into manifests, one for each voice.

The folder has `manifest.jsonl`, whose lines hold id, shard, text, duration_s and voice, and the shards, which hold
`{id}.opus` for each line. With RHVoice installed, `mowa data synthesize --engine command` makes a similar corpus
(docs/synthesize.md).
"""

from __future__ import annotations

import json
import math
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mowa.data.text.normalize import normalize_text
from mowa.errors import DataError
from mowa.io.atomic import atomic_write

_FIELDS = ("id", "shard", "text", "duration_s", "voice")
_FILE_NAME = re.compile(r"\w[\w.-]*")


def unpack_corpus(source: Path, folder: Path) -> dict[str, float]:
    """Write `folder/{voice}.jsonl` and the recordings under `folder/audio`. Return the hours of each voice.

    A voice's manifest is written after its recordings; voices that are complete and unchanged are not unpacked again.
    Raises DataError for a folder without a manifest, a line that is not valid, a damaged shard or a missing recording.
    """
    voices = _read_manifest(source / "manifest.jsonl")
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file: name a folder")
    pending = {voice: rows for voice, rows in voices.items() if not _is_unpacked(folder, voice, rows)}
    members = defaultdict(set)
    for row in (row for rows in pending.values() for row in rows):
        members[row["shard"]].add(f"{row['id']}.opus")
    with tqdm(total=sum(map(len, members.values())), unit="clip", desc=folder.name, disable=None) as bar:
        for shard, names in sorted(members.items()):
            _unpack_shard(source / shard, names, folder / "audio", bar)
    for voice, rows in pending.items():
        atomic_write(folder / f"{voice}.jsonl", _to_lines(voice, rows))
    return {voice: sum(row["duration_s"] for row in rows) / 3600 for voice, rows in voices.items()}


def _is_unpacked(folder: Path, voice: str, rows: list[dict[str, Any]]) -> bool:
    """Return whether the manifest of a voice is what it would be now, and all of its recordings are there."""
    path = folder / f"{voice}.jsonl"
    is_same = path.is_file() and path.read_text(encoding="utf-8") == _to_lines(voice, rows)
    return is_same and all((folder / "audio" / f"{row['id']}.opus").is_file() for row in rows)


def _to_lines(voice: str, rows: list[dict[str, Any]]) -> str:
    lines = (
        {"id": row["id"], "audio": f"audio/{row['id']}.opus", "text": normalize_text(row["text"])}
        | {"duration_s": row["duration_s"], "voice": voice, "written": row["text"]}
        for row in rows
    )
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _read_manifest(path: Path) -> dict[str, list[dict[str, Any]]]:
    if not path.is_file():
        raise DataError(f"{path}: not found. Give the folder that holds manifest.jsonl and the shards.")
    voices = defaultdict(list)
    ids: set[str] = set()
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not a JSON object ({error})") from None
        if problem := _row_problem(row, ids):
            raise DataError(f"{path}:{number}: {problem}")
        ids.add(row["id"])
        voices[row["voice"]].append(row)
    if not voices:
        raise DataError(f"{path}: holds no recordings")
    return voices


def _row_problem(row: Any, ids: set[str]) -> str:
    """Return what is wrong with a line of the manifest; empty if nothing is. Names must not lead to other folders."""
    if not isinstance(row, dict):
        return f"a JSON {type(row).__name__}, not an object"
    if missing := [name for name in _FIELDS if name not in row]:
        return f"{', '.join(missing)} missing; a line has {', '.join(_FIELDS)}"
    if wrong := next((name for name in ("id", "shard", "text", "voice") if not isinstance(row[name], str)), None):
        return f"{wrong} is {row[wrong]!r:.40}, not a text"
    if unsafe := next((name for name in ("id", "shard", "voice") if not _FILE_NAME.fullmatch(row[name])), None):
        return f"{unsafe} is {row[unsafe]!r:.60}, which cannot be a file name"
    duration = row["duration_s"]
    if isinstance(duration, bool) or not isinstance(duration, int | float) or not 0 < duration < math.inf:
        return f"duration_s is {duration!r:.40}, not a number of seconds above 0"
    return f"the id {row['id']} is there twice" if row["id"] in ids else ""


def _unpack_shard(shard: Path, names: set[str], folder: Path, bar: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    remaining = set(names)
    for name, content in _read_members(shard, names):
        atomic_write(folder / name, content)
        remaining.discard(name)
        bar.update()
    if remaining:
        raise DataError(
            f"{shard}: {len(remaining)} of the {len(names)} recordings that manifest.jsonl lists are not in it, such as"
            f" {min(remaining)}. Copy it again."
        )


def _read_members(shard: Path, names: set[str]) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(shard) as archive:
            for member in archive:
                if member.name in names and (content := archive.extractfile(member)):
                    yield member.name, content.read()
    except FileNotFoundError:
        raise DataError(f"{shard}: not found, and manifest.jsonl lists {len(names)} recordings in it") from None
    except (OSError, EOFError, tarfile.TarError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{shard}: cannot be read as a tar file ({reason}). Copy it again.") from None
