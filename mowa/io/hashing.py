"""SHA-256 of files and of checkpoints, remembered per file, size and modification time."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from mowa.errors import ModelError


def hash_weights(folder: Path) -> str:
    """SHA-256 (hex) of a checkpoint's weights file; of many, that of the lines `sha256sum` prints for them."""
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ModelError(f"{folder} has no weights, so no adapter can be told to be its own")
    if len(files) == 1:
        return sha256_file(files[0])
    lines = "".join(f"{sha256_file(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def sha256_file(file: Path) -> str:
    about = file.stat()
    return _hashed(file.resolve(), about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=64)
def _hashed(file: Path, size: int, changed_ns: int) -> str:
    """A gigabyte takes a second or two: read once for all adapters of a base, and again where it was changed."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
