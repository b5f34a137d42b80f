"""Find the recording that a row names, and make it an existing file with a duration.

A recording is a path (POSIX, Windows, `~`, `file://`), a URL, encoded bytes, or decoded samples as `datasets` returns
them. Excerpts are cut into FLAC files in the cache; those of one recording that follow each other are decoded in one
pass, since most compressed formats are decoded from their beginning.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import soundfile

from mowa.data import audio
from mowa.data.audio.values import to_audio_source
from mowa.data.manifests.tables import import_optional
from mowa.errors import AudioError, DataError
from mowa.io.atomic import atomic_write
from mowa.types import Example

AUDIO_FOLDERS = ("", "clips", "audios")  # beside a table: Common Voice's are in clips, its spontaneous speech in audios

_MAGIC_SUFFIXES = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"ID3": ".mp3", b"\xff\xfb": ".mp3"}
_DOUBTFUL_S = 300.0  # longer stated durations are compared with the recording: they may be milliseconds
_WHOLE_TOLERANCE_S = 0.1  # an excerpt from 0 that lacks less is the whole recording, which needs no copy
_WINDOWS_DRIVE = re.compile(r"/?[A-Za-z]:[\\/]")


# --- paths ------------------------------------------------------------------------------------------------------------


def locate_audio(where: str, folder: Path, value: Any) -> tuple[str, str, bytes | None]:
    """Return the path of the recording in an audio column, its name in the row, and its bytes if it is not a file.

    Relative paths are searched in `AUDIO_FOLDERS` of `folder` and in the working directory. Raises DataError if the
    column has no recording, AudioError for samples that are no audio.
    """
    if isinstance(value, dict) and (value.get("array") is not None or value.get("raw") is not None):
        try:
            encoded: Any = to_audio_source(value, name=where)
        except AudioError as error:
            message = str(error)
            raise AudioError(message if message.startswith(where) else f"{where}: {message}") from None
        return str(value.get("path") or where), str(value.get("path") or ""), encoded.data
    data, label = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if isinstance(data, bytes):
        return label or where, label or "", data
    given = label or data
    if not isinstance(given, str) or not given:
        raise DataError(f"{where}: has no recording. Add its path, or delete the row.")
    name = _strip_file_scheme(given)
    if "://" in name:
        return name, name, None
    for plain in _plain_paths(name):
        for candidate in _in_folders(folder, plain):
            if os.path.isfile(candidate):
                return os.path.abspath(candidate), plain, None
    if _is_windows_path(name):
        name = PureWindowsPath(name).as_posix()
    missing = name if _WINDOWS_DRIVE.match(name) else os.path.abspath(os.path.join(folder, os.path.expanduser(name)))
    return missing, name, None


def _strip_file_scheme(name: str) -> str:
    """Return the path of a `file://` URL of this machine; other names as they are."""
    if not name.lower().startswith("file://"):
        return name
    try:
        url = urlsplit(name)
    except ValueError:  # no URL after all
        return name
    path = unquote(url.path)
    if _WINDOWS_DRIVE.match(path):
        return path.lstrip("/")
    return path if url.netloc in ("", "localhost") else name


def _is_windows_path(name: str) -> bool:
    return "\\" in name or _WINDOWS_DRIVE.match(name) is not None


def _plain_paths(name: str) -> Iterator[str]:
    """Yield what a path may be here: itself; below the home folder; a Windows path by its drive, then by its tails."""
    yield name
    if name.startswith("~"):
        yield os.path.expanduser(name)
    if not _is_windows_path(name):
        return
    path = PureWindowsPath(name)
    if not path.anchor:
        yield path.as_posix()
        return
    below = path.parts[1:]
    if len(path.drive) == 2:  # where Windows' drives are in its Linux subsystem
        yield "/".join(("/mnt", path.drive[0].lower(), *below))
    for start in range(len(below)):
        yield "/".join(below[start:])


def _in_folders(folder: Path, path: str) -> Iterator[str]:
    yield from (os.path.join(folder, name, path) for name in AUDIO_FOLDERS)
    yield path


# --- files and durations ----------------------------------------------------------------------------------------------


def fetch(url: str) -> bytes:
    """Download a file with fsspec."""
    with import_optional("fsspec").open(url, "rb") as file:
        data: bytes = file.read()
    return data


def cache_audio(data: bytes, name: str, cache_dir: Path) -> Path:
    """Write bytes to a file under `cache_dir`; its suffix follows from the first bytes, else from `name`."""
    suffixes = (suffix for magic, suffix in _MAGIC_SUFFIXES.items() if data.startswith(magic))
    suffix = next(suffixes, Path(name).suffix.lower())
    file = _cache_file(cache_dir, hashlib.sha256(data), suffix if suffix in audio.AUDIO_SUFFIXES else ".audio")
    if not file.is_file():
        _write(file, data, cache_dir)
    return file


def _cache_file(cache_dir: Path, digest: Any, suffix: str) -> Path:
    name = digest.hexdigest()[:32]
    return Path(os.path.abspath(cache_dir / name[:2] / f"{name}{suffix}"))


def _write(file: Path, data: bytes, cache_dir: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, data)
    except OSError as error:
        raise DataError(f"{cache_dir}: cannot be written ({error.strerror}). Choose another cache folder.") from None


def read_duration(where: str, stated_s: float, file: Path) -> float:
    """Return the stated duration if plausible, else that of the header, else that of the decoded audio."""
    if 0 < stated_s <= _DOUBTFUL_S:
        return stated_s
    try:
        duration_s = audio.probe_audio(file).duration_s
        if duration_s is None:
            duration_s = sum(map(len, audio.stream_audio(file, 16_000))) / 16_000
    except AudioError as error:
        raise AudioError(f"{where}: {error}") from None
    if stated_s > 20 * duration_s:
        raise DataError(
            f"{where}: duration is {stated_s:g}, but the recording has {duration_s:.2f} s. Write it in seconds."
        )
    return stated_s if stated_s > 0 else duration_s


# --- excerpts ---------------------------------------------------------------------------------------------------------


class ExcerptCutter:
    """Cut excerpts into mono FLAC files of 24 bits, at the sample rate of their recording."""

    def __init__(self, cache_dir: Path) -> None:
        self.cache_dir = cache_dir
        self._file: Path | None = None
        self._blocks: Iterator[audio.Samples] = iter(())
        self._held = np.zeros(0, np.float32)  # decoded samples that an excerpt may still need
        self._start = self._rate_hz = 0  # position of the first one, and their sample rate

    def cut(self, example: Example, file: Path) -> Path:
        """Return the file of an excerpt, which is written unless it exists; the recording's, if it is all of it.

        Raises AudioError if the recording cannot be read.
        """
        if not example.offset_s and self._is_whole(example, file):
            return file
        status = file.stat()
        key = f"{file}\n{status.st_size}\n{status.st_mtime_ns}\n{example.offset_s!r}\n{example.duration_s!r}"
        found = _cache_file(self.cache_dir, hashlib.sha256(key.encode("utf-8", "surrogateescape")), ".flac")
        if not found.is_file():
            samples = np.clip(self._read(file, example.offset_s, example.duration_s), -1.0, 1.0)
            encoded = io.BytesIO()
            soundfile.write(encoded, samples, self._rate_hz, format="FLAC", subtype="PCM_24")
            _write(found, encoded.getvalue(), self.cache_dir)
        return found

    def _is_whole(self, example: Example, file: Path) -> bool:
        duration_s = audio.probe_audio(file).duration_s
        return duration_s is not None and example.duration_s > duration_s - _WHOLE_TOLERANCE_S

    def _read(self, file: Path, offset_s: float, duration_s: float) -> audio.Samples:
        if file != self._file or round(offset_s * self._rate_hz) < self._start:
            self._rate_hz = audio.probe_audio(file).rate_hz
            self._start = round(offset_s * self._rate_hz)
            self._file, self._held = file, np.zeros(0, np.float32)
            self._blocks = audio.stream_audio(file, self._rate_hz, offset_s=offset_s)
        first, count = round(offset_s * self._rate_hz), round(duration_s * self._rate_hz)
        pieces, end = [self._held], self._start + len(self._held)
        try:
            while end < first + count and (block := next(self._blocks, None)) is not None:
                if end <= first:  # what was held comes before the excerpt
                    pieces, self._start = [], end
                pieces.append(block)
                end += len(block)
        except AudioError:  # what follows the excerpt may be damaged
            end = -1
        if end < first + count:  # the recording ends in the excerpt: an error, unless hardly anything is missing
            self._file = None
            return audio.load_audio(file, self._rate_hz, offset_s=offset_s, duration_s=duration_s)
        self._held, self._start = np.concatenate(pieces)[first - self._start :], first
        return self._held[:count]
