"""Write the manifest of an exported folder, `mowa.json`, and read it as an `Artifact`.

transformers' config, vocabulary and audio settings are written beside it, whatever the format.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mowa.errors import ModelError
from mowa.hardware import installed_version
from mowa.io.atomic import write_json
from mowa.io.hashing import sha256_file
from mowa.io.manifest import (
    EXPORT_FORMAT_VERSION,
    MANIFEST_FILE,
    is_export_manifest,
    package_versions,
    read_manifest,
    validate_format_version,
)
from mowa.io.processor import write_processor
from mowa.types import Artifact, CTCModel, Origin, Preprocessing, Scheme, Vocabulary


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What an exporter wrote.

    files              files that hold the model, relative to the folder
    details            settings that a runtime of this format needs
    max_abs_diff       largest difference of a log-probability from the net's, in nats; None if not compared
    agreement          fraction of frames with the same top token as the net; None if not compared
    unverified_reason  what could not be compared, and why
    packages           packages whose versions the manifest records
    """

    files: tuple[str, ...]
    details: Mapping[str, Any] = field(default_factory=dict)
    max_abs_diff: float | None = None
    agreement: float | None = None
    unverified_reason: str = ""
    packages: tuple[str, ...] = ()


def write_manifest(model: CTCModel, net: Any, export_format: str, folder: Path, result: ExportResult) -> None:
    """Write the manifest, config, vocabulary and audio settings into `folder`. `net` is the net that was written."""
    net.config.save_pretrained(folder)
    write_processor(model.vocabulary, model.preprocessing, folder)
    vocabulary = model.vocabulary
    manifest = {
        "format_version": EXPORT_FORMAT_VERSION,
        "format": export_format,
        "family": model.family.name,
        "scheme": asdict(model.scheme),
        "origin": {name: value for name, value in asdict(model.origin).items() if name != "folder"},
        "model_sha256": model_sha256(model),
        "files": {name: sha256_file(folder / name) for name in sorted(result.files)},
        "details": dict(result.details),
        "verification": {
            "max_abs_diff": result.max_abs_diff,
            "agreement": result.agreement,
            "unverified_reason": result.unverified_reason,
        },
        "vocabulary": {
            "tokens": vocabulary.tokens,
            "blank": vocabulary.blank,
            "delimiter": vocabulary.delimiter,
            "specials": sorted(vocabulary.specials),
        },
        "preprocessing": asdict(model.preprocessing),
        "package_versions": package_versions() | {name: installed_version(name) for name in result.packages},
    }
    write_json(folder / MANIFEST_FILE, manifest)


def read_artifact(folder: Path, formats: Iterable[str] = ()) -> Artifact:
    """Read the export in `folder`, of one of `formats` if any are given, and check its files.

    Raises ModelError if there is no export, it has another format or format version, or files are missing or changed.
    """
    from transformers import AutoConfig

    manifest = read_manifest(folder)
    if not is_export_manifest(manifest):
        raise ModelError(f"{folder} is not an export: use a folder that `mowa export` wrote")
    validate_format_version(folder, manifest, EXPORT_FORMAT_VERSION, "export the model again")
    found, formats = manifest.get("format"), tuple(formats)
    if formats and found not in formats:
        raise ModelError(f"{folder} is an export in the format {found}, expected {' or '.join(formats)}")
    try:
        for name, checksum in manifest["files"].items():
            if not (folder / name).is_file() or sha256_file(folder / name) != checksum:
                raise ModelError(f"{folder}/{name} is missing or damaged: export the model again")
        vocabulary, verification = manifest["vocabulary"], manifest["verification"]
        return Artifact(
            folder=folder,
            format=manifest["format"],
            family=manifest["family"],
            scheme=Scheme(**manifest["scheme"]),
            origin=Origin(**manifest["origin"] | {"folder": folder}),
            config=AutoConfig.from_pretrained(folder),
            vocabulary=Vocabulary(
                tuple(vocabulary["tokens"]),
                vocabulary["blank"],
                vocabulary["delimiter"],
                frozenset(vocabulary["specials"]),
            ),
            preprocessing=Preprocessing(**manifest["preprocessing"]),
            files=tuple(manifest["files"]),
            details=manifest["details"],
            agreement=verification["agreement"],
            unverified_reason=verification["unverified_reason"],
        )
    except (KeyError, TypeError) as error:
        raise ModelError(f"{folder}/{MANIFEST_FILE} is damaged ({error} is missing): export the model again") from None


def is_export(folder: Path) -> bool:
    """Return whether `folder` holds an export, of any format and version."""
    try:
        return is_export_manifest(read_manifest(folder))
    except ModelError:
        return False


def model_sha256(model: CTCModel) -> str:
    """Return the SHA-256 (hex) of everything that determines the outputs: weights with adapters, config and scheme."""
    digest = hashlib.sha256(model.net.config.to_json_string().encode())
    digest.update(repr(model.scheme).encode())
    for name, value in sorted(model.net.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
