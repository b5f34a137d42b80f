"""Write and read `mowa.json`, the manifest of everything that mowa writes: runs, adapters, checkpoints and exports.

All have a header: format version, kind of artifact, task, family, origin, files with checksums, package versions. What
only one kind needs stands beside it under names of its own, such as `adapter`, `run`, `scheme` or `details`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mowa.errors import ModelError
from mowa.hardware import installed_version
from mowa.io.atomic import read_json, write_json
from mowa.io.hashing import sha256_file
from mowa.types import Origin

MANIFEST_FILE = "mowa.json"
FORMAT_VERSION = 4
VERSIONED_PACKAGES = ("mowa", "torch", "transformers", "peft")
ArtifactKind = Literal["run", "adapter", "checkpoint", "export"]
REMEDIES = {
    "run": "train the model again",
    "adapter": "train the adapter again",
    "checkpoint": "export the model again, or merge its adapter again",
    "export": "export the model again",
}
_HEADER = ("format_version", "artifact", "task", "family", "origin", "files", "package_versions")


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of a manifest.

    folder            where it lies
    artifact          run (a trained checkpoint), adapter, checkpoint (merged, or written by `mowa export`), or export
    task, family      of the model
    origin            name, source, revision and license of the model that it was made from; for an adapter, those of
                      its base, with the SHA-256 of its weights
    files             weights and graphs, relative to the folder → SHA-256
    package_versions  versions of the packages that wrote it; None: not installed
    sections          what only this kind has
    """

    folder: Path
    artifact: ArtifactKind
    task: str
    family: str
    origin: Mapping[str, Any]
    files: Mapping[str, str]
    package_versions: Mapping[str, str | None]
    sections: Mapping[str, Any]

    def verify_files(self) -> None:
        """Raise ModelError if a file is missing or changed. Checksums of unchanged files are cached."""
        for name, checksum in self.files.items():
            if not (self.folder / name).is_file() or sha256_file(self.folder / name) != checksum:
                raise ModelError(f"{self.folder / name} is missing or damaged: {REMEDIES[self.artifact]}")


def write_manifest(
    folder: Path,
    artifact: ArtifactKind,
    *,
    task: str,
    family: str,
    origin: Origin | Mapping[str, Any],
    files: Iterable[str],
    packages: Iterable[str] = (),
    **sections: Any,
) -> None:
    """Write the manifest of `folder`, with the checksums of `files` in it and the versions of `packages`, atomically.

    Args:
        origin: see `Manifest.origin`; the folder of an `Origin` is left out.
        sections: what only this kind has, JSON values by name.
    """
    if isinstance(origin, Origin):
        origin = {name: value for name, value in asdict(origin).items() if name != "folder"}
    header = {
        "format_version": FORMAT_VERSION,
        "artifact": artifact,
        "task": task,
        "family": family,
        "origin": dict(origin),
        "files": {name: sha256_file(folder / name) for name in sorted(files)},
        "package_versions": package_versions() | {name: installed_version(name) for name in packages},
    }
    write_json(folder / MANIFEST_FILE, header | sections)


def update_manifest(folder: Path, **sections: Any) -> None:
    """Replace sections of the manifest of `folder`; its header stays."""
    write_json(folder / MANIFEST_FILE, read_json(folder / MANIFEST_FILE) | sections)


def find_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of `folder`; None if it has none.

    Raises ModelError if it is damaged, or was written by an older or newer version of mowa.
    """
    file = folder / MANIFEST_FILE
    if not file.is_file():
        return None
    content = read_json(file)
    _validate_format_version(file, content)
    try:
        header = {name: content[name] for name in _HEADER[1:]}
    except KeyError as error:
        raise damaged(file, error) from None
    _validate_types(file, header)
    if header["artifact"] not in REMEDIES:
        raise ModelError(f"{file}: unknown artifact {header['artifact']!r}: update mowa")
    if not isinstance(content.get("format", None if header["artifact"] == "export" else ""), str):
        raise _damaged(file, "its format is missing or no string")
    sections = {name: value for name, value in content.items() if name not in _HEADER}
    return Manifest(folder=folder, sections=sections, **header)


def damaged(file: Path, missing: Exception) -> ModelError:
    """Return the error for a manifest that lacks a key."""
    return _damaged(file, f"{missing} is missing")


def _damaged(file: Path, reason: str) -> ModelError:
    return ModelError(f"{file} is damaged ({reason}): write it again with the command that made it")


def _validate_types(file: Path, header: Mapping[str, Any]) -> None:
    for name, value in header.items():
        kind = str if name in ("artifact", "task", "family") else dict
        if not isinstance(value, kind):
            expected = "a string" if kind is str else "an object"
            raise _damaged(file, f"{name!r} is a JSON {type(value).__name__}, expected {expected}")
    if wrong := next((name for name, value in header["files"].items() if not isinstance(value, str)), None):
        raise _damaged(file, f"the checksum of {wrong!r} is no string")


def _validate_format_version(file: Path, content: Mapping[str, Any]) -> None:
    found = content.get("format_version", content.get("format"))
    if "format_version" in content and found == FORMAT_VERSION:
        return
    if isinstance(found, int) and found > FORMAT_VERSION:
        raise ModelError(f"{file} has format version {found}, this version of mowa reads {FORMAT_VERSION}: update mowa")
    kind = str(content.get("artifact", "export" if "files" in content else "adapter"))  # older ones do not name it
    raise ModelError(
        f"{file} was written by an older version of mowa (format version {found}, this one reads"
        f" {FORMAT_VERSION}): {REMEDIES.get(kind, 'write it again')}"
    )


def package_versions() -> dict[str, str | None]:
    """Return the installed versions of mowa, torch, transformers and PEFT."""
    return {name: version for name in VERSIONED_PACKAGES if (version := installed_version(name))}
