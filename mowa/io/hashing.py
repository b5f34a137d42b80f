"""Compute SHA-256 checksums of files and checkpoints, cached in memory and on disk while a file does not change."""

from __future__ import annotations

import hashlib
import time
from functools import lru_cache
from pathlib import Path

from mowa.errors import ModelError
from mowa.hardware import cache_folder
from mowa.io.atomic import read_json_cache, update_json_cache

CACHE_FILE = "sha256.json"  # in the cache folder: path → [state of the file, checksum]
MAX_CACHED_FILES = 1000
MIN_AGE_S = 2.0  # a file that changed since may change again within the resolution of its time, so it is not cached


def hash_weights(folder: Path) -> str:
    """Return the SHA-256 (hex) of a checkpoint's weights: of its file, or of `sha256sum`'s output for several shards.

    Raises ModelError if there are no weights.
    """
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ModelError(f"{folder} has no weights: model.safetensors or pytorch_model.bin is missing")
    return sha256_file(files[0]) if len(files) == 1 else sha256_files(files)


def sha256_files(files: list[Path]) -> str:
    """Return the SHA-256 (hex) of the output of `sha256sum` for these files."""
    lines = "".join(f"{sha256_file(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def sha256_file(file: Path) -> str:
    """Return the SHA-256 (hex) of a file. It is read only if it is not the file that was read before.

    The same file has the same resolved path, size, time of modification, time of change and inode.
    """
    resolved = file.resolve()
    status = resolved.stat()
    state = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    is_settled = time.time() - max(status.st_mtime, status.st_ctime) > MIN_AGE_S
    return _sha256(resolved, state, is_settled)


@lru_cache(maxsize=64)
def _sha256(file: Path, state: tuple[int, ...], is_settled: bool) -> str:
    """Return the checksum of a file in this state, from the cache on disk if it is settled and there."""
    cache = cache_folder() / CACHE_FILE
    if is_settled and (known := _read_cached(cache, file, state)):
        return known
    checksum = _read_and_hash(file)
    if is_settled:
        update_json_cache(cache, {str(file): [list(state), checksum]}, max_entries=MAX_CACHED_FILES)
    return checksum


def _read_cached(cache: Path, file: Path, state: tuple[int, ...]) -> str:
    """Return the checksum in the cache; empty if it has none, or the cache is damaged."""
    try:
        known_state, checksum = read_json_cache(cache)[str(file)]
    except (ValueError, KeyError, TypeError):
        return ""
    return checksum if known_state == list(state) and isinstance(checksum, str) and len(checksum) == 64 else ""


def _read_and_hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
