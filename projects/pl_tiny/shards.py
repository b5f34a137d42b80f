"""Unpack a corpus of tar shards into manifests, one for each voice.

The folder has `manifest.jsonl`, whose lines hold id, shard, text, duration_s and voice, and the shards, which hold
`{id}.opus` for each line. With RHVoice installed, `mowa data synthesize --engine command` makes a similar corpus
(docs/synthesize.md).
"""

from __future__ import annotations

import json
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


def unpack_corpus(source: Path, folder: Path) -> dict[str, float]:
    """Write `folder/{voice}.jsonl` and the recordings under `folder/audio`. Return the hours of each voice.

    A voice's manifest is written after its recordings; voices whose manifest exists are not unpacked again. Raises
    DataError for a folder without a manifest, a line without a field, a damaged shard or a recording that is missing.
    """
    voices = _read_manifest(source / "manifest.jsonl")
    pending = {voice: rows for voice, rows in voices.items() if not (folder / f"{voice}.jsonl").is_file()}
    members = defaultdict(set)
    for row in (row for rows in pending.values() for row in rows):
        members[row["shard"]].add(f"{row['id']}.opus")
    with tqdm(total=sum(map(len, members.values())), unit="clip", desc=folder.name, disable=None) as bar:
        for shard, names in sorted(members.items()):
            _unpack_shard(source / shard, names, folder / "audio", bar)
    for voice, rows in pending.items():
        lines = [
            {"id": row["id"], "audio": f"audio/{row['id']}.opus", "text": normalize_text(row["text"])}
            | {"duration_s": row["duration_s"], "voice": voice, "written": row["text"]}
            for row in rows
        ]
        atomic_write(folder / f"{voice}.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return {voice: sum(row["duration_s"] for row in rows) / 3600 for voice, rows in voices.items()}


def _read_manifest(path: Path) -> dict[str, list[dict[str, Any]]]:
    if not path.is_file():
        raise DataError(f"{path}: not found. Give the folder that holds manifest.jsonl and the shards.")
    voices = defaultdict(list)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            absent = [name for name in _FIELDS if name not in row]
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}:{number}: not a JSON object ({error})") from None
        if absent:
            raise DataError(f"{path}:{number}: {absent[0]} is missing; a line has {', '.join(_FIELDS)}")
        voices[row["voice"]].append(row)
    if not voices:
        raise DataError(f"{path}: holds no recordings")
    return voices


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
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{shard}: cannot be read as a tar file ({error}). Copy it again.") from None
