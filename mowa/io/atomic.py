"""Write files and folders atomically, so that readers see either the old or the new content; read and write JSON."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mowa.errors import DataError, ModelError


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ModelError if the file is missing or does not hold a JSON object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent} has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds a JSON {type(data).__name__}, expected an object")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, with characters as they are; numbers of other types become floats."""
    atomic_write(path, json.dumps(data, ensure_ascii=False, indent=1, default=float))


def atomic_write(path: Path, data: str | bytes) -> None:
    """Write a file atomically; text is encoded as UTF-8."""
    with replace_atomically(Path(path)) as unfinished:
        unfinished.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to. On success it is flushed to disk and replaces `path`."""
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder to write into. It becomes `out` when the context succeeds, else it is deleted.

    Raises DataError if `out` exists and is not an empty folder.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{out} already exists and is not empty: choose another folder, or delete it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as name:
        folder = Path(name) / "content"
        folder.mkdir()
        yield folder
        if out.is_dir():
            out.rmdir()
        os.replace(folder, out)
