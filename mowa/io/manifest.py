"""Read `mowa.json`, the manifest of exports and adapters, and check its format version."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mowa.errors import ModelError
from mowa.hardware import installed_version
from mowa.io.atomic import read_json

MANIFEST_FILE = "mowa.json"
EXPORT_FORMAT_VERSION = 3
ADAPTER_FORMAT_VERSION = 2
VERSIONED_PACKAGES = ("mowa", "torch", "transformers", "peft")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest in `folder`; empty if there is none. Raises ModelError if it is not a JSON object."""
    file = folder / MANIFEST_FILE
    return read_json(file) if file.is_file() else {}


def is_export_manifest(manifest: Mapping[str, Any]) -> bool:
    """Return whether a manifest is that of an export, of any format and version."""
    return "files" in manifest and ("format" in manifest or "kind" in manifest)  # "kind" up to version 2


def validate_format_version(folder: Path, manifest: Mapping[str, Any], expected: int, remedy: str) -> None:
    """Raise ModelError, with `remedy` for older ones, if a manifest has another format version than `expected`."""
    found = manifest.get("format_version", manifest.get("format"))
    if "format_version" in manifest and found == expected:
        return
    if isinstance(found, int) and found > expected:
        raise ModelError(
            f"{folder}/{MANIFEST_FILE} has format version {found}, this version of mowa reads {expected}: update mowa"
        )
    raise ModelError(
        f"{folder}/{MANIFEST_FILE} was written by an older version of mowa (format version {found}, this one reads"
        f" {expected}): {remedy}"
    )


def package_versions() -> dict[str, str]:
    """Return the installed versions of mowa, torch, transformers and PEFT."""
    versions = {name: installed_version(name) for name in VERSIONED_PACKAGES}
    return {name: version for name, version in versions.items() if version}
