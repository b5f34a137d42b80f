"""Write files and folders atomically: readers see the old content or the new, never a part of it."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mowa.errors import DataError, ModelError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder. ModelError where the file is missing, is not JSON, or is no object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent} has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path} should hold a JSON object, not a {type(data).__name__}")
    return data


def atomic_write(path: Path, data: str | bytes) -> None:
    """Write `path` whole or not at all: text as UTF-8. A reader, or a crash, never sees half a file."""
    with replace_atomically(Path(path)) as unfinished:
        unfinished.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; on success it is flushed to disk and takes `path`'s place."""
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
    """A folder to write into and to examine; it becomes `out` when the context ends well, else nothing is left of it.

    Raises DataError where `out` is there already and not an empty folder.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{out} is there already: choose another folder, or delete it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as name:
        folder = Path(name) / "whole"
        folder.mkdir()
        yield folder
        if out.is_dir():
            out.rmdir()
        os.replace(folder, out)
