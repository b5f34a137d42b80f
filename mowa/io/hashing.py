"""Compute SHA-256 checksums of files and checkpoints, cached by path, size and modification time."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from mowa.errors import ModelError


def hash_weights(folder: Path) -> str:
    """Return the SHA-256 (hex) of a checkpoint's weights: of its file, or of `sha256sum`'s output for several shards.

    Raises ModelError if there are no weights.
    """
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ModelError(f"{folder} has no weights: model.safetensors or pytorch_model.bin is missing")
    if len(files) == 1:
        return sha256_file(files[0])
    lines = "".join(f"{sha256_file(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def sha256_file(file: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    status = file.stat()
    return _sha256(file.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _sha256(file: Path, size: int, modified_ns: int) -> str:
    """Size and time are part of the cache key, so that a changed file is hashed again."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
