"""Write files and folders atomically, so that readers see either the old or the new content; read and write JSON."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
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
    atomic_write(path, dump_json(data, indent=1, default=float))


def dump_json(data: Any, **options: Any) -> str:
    """Return JSON with characters as they are; `options` are those of `json.dumps`.

    Only the bytes of a file name that is not UTF-8, which Python has as lone surrogates, are escaped: `\\udcf1`.
    `json.loads` returns the name that the file is opened by.
    """
    return json.dumps(data, ensure_ascii=False, **options).encode(errors="backslashreplace").decode()


def atomic_write(path: Path, data: str | bytes) -> None:
    """Write a file atomically; text is encoded as UTF-8, file names in it that are not UTF-8 as in `dump_json`."""
    content = data.encode(errors="backslashreplace") if isinstance(data, str) else data
    with replace_atomically(Path(path)) as unfinished:
        unfinished.write_bytes(content)


def read_json_cache(file: Path) -> dict[str, Any]:
    """Read a JSON object that may be lost: empty if the file is missing or damaged."""
    with suppress(OSError, ValueError):
        content = json.loads(file.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}


def update_json_cache(file: Path, entries: Mapping[str, Any], *, max_entries: int = 1000) -> None:
    """Add entries to a JSON object that may be lost, and drop the oldest; do nothing if it cannot be written.

    If two processes write at once, the entries of one are lost. Names may be paths that are not UTF-8: characters
    outside ASCII are escaped.
    """
    known = {name: value for name, value in read_json_cache(file).items() if name not in entries} | dict(entries)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps(dict(list(known.items())[-max_entries:]), indent=1, default=float))


@contextmanager
def exclusive_lock(file: Path) -> Iterator[None]:
    """Hold a lock on `file`, which is created, inside the context; wait for other processes that hold it.

    Where files cannot be locked or written, nothing is locked: use it to save work, not to protect data.
    """
    with ExitStack() as stack:
        with suppress(OSError, ImportError):
            import fcntl

            file.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(file.open("w")), fcntl.LOCK_EX)
        yield


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
        try:
            if out.is_dir():
                out.rmdir()
            os.replace(folder, out)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise DataError(f"{out} was written by another process in the meantime: choose another folder") from None


@contextmanager
def atomic_update(folder: Path, last: str) -> Iterator[Path]:
    """Yield a temporary folder to write into. On success its files are moved into `folder`, whose other files stay.

    The file `last` says what the folder is: it is deleted before the others are moved, and moved after them, so that
    an interrupted update is not taken for a complete one. All files get its permissions: safetensors makes its files
    readable by their owner only.
    """
    partial = folder / ".partial"
    if partial.exists():
        shutil.rmtree(partial)  # of a process that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        mode = (partial / last).stat().st_mode
        (folder / last).unlink(missing_ok=True)
        for file in sorted(partial.iterdir(), key=lambda file: file.name == last):
            if file.is_file():
                with file.open("rb+") as opened:
                    os.fsync(opened.fileno())
                file.chmod(mode)
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
