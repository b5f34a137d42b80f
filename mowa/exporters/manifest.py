"""What a folder that was exported to says of itself: `mowa.json`, written once, read and checked before it is run.

Beside it lie the config, vocabulary and audio settings as transformers has them, whatever the format. How a format is
written or run is not known here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mowa.adapters import checkpoint
from mowa.errors import ModelError
from mowa.io import processor
from mowa.io.atomic import read_json
from mowa.types import Artifact, Model, Origin, Preprocessing, Scheme, Vocabulary

MANIFEST_FILE, FORMAT_VERSION = "mowa.json", 2


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What an exporter wrote: which files hold the model, what whoever runs it must know beside (`details`), and what
    came of comparing it with the net: `farthest` (nats, of any log-probability) and `agreeing` (the share of frames
    with the same likeliest output), or why they are not there (`unchecked`)."""

    files: tuple[str, ...]
    details: Mapping[str, Any] = field(default_factory=dict)
    max_abs_diff: float | None = None
    agreement: float | None = None
    unverified_reason: str = ""
    packages: tuple[str, ...] = ()  # packages whose versions matter


def write_manifest(model: Model, net: Any, export_format: str, folder: Path, result: ExportResult) -> None:
    """The note in `folder` and, beside it, config, vocabulary and audio settings. `net` is what was written."""
    net.config.save_pretrained(folder)
    processor.write_processor(model.vocabulary, model.preprocessing, folder)
    words = model.vocabulary
    note = {
        "format": FORMAT_VERSION,
        "kind": export_format,
        "family": model.family.name,
        "scheme": asdict(model.scheme),
        "origin": {name: value for name, value in asdict(model.origin).items() if name != "folder"},
        "weights_sha256": model_sha256(model),
        "files": {name: checkpoint.sha256_file(folder / name) for name in sorted(result.files)},
        "details": dict(result.details),
        "compared": {
            "farthest": result.max_abs_diff,
            "agreeing": result.agreement,
            "unchecked": result.unverified_reason,
        },
        "vocabulary": {
            "tokens": words.tokens,
            "blank": words.blank,
            "delimiter": words.delimiter,
            "specials": sorted(words.specials),
        },
        "preprocessing": asdict(model.preprocessing),
        "made_by": checkpoint.package_versions()
        | {name: checkpoint.installed_version(name) for name in result.packages},
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(note, ensure_ascii=False, indent=1), encoding="utf-8")


def read_artifact(folder: Path, formats: Iterable[str] = ()) -> Artifact:
    """What the export in `folder` is. ModelError: none there, of none of `kinds`, a newer format's, files missing or
    changed."""
    from transformers import AutoConfig

    if not (folder / MANIFEST_FILE).is_file():
        raise ModelError(f"{folder} holds no export: name a folder that `mowa export` wrote, with a {MANIFEST_FILE}")
    note = read_json(folder / MANIFEST_FILE)
    kind, formats = note.get("kind", "nothing"), tuple(formats)
    if note.get("format") != FORMAT_VERSION or "files" not in note or (formats and kind not in formats):
        wanted = " or ".join(formats) or "an export"
        raise ModelError(
            f"{folder}/{MANIFEST_FILE} is {kind} of format {note.get('format')}, not {wanted} of format {FORMAT_VERSION}"
        )
    try:
        for name, known in note["files"].items():
            if not (folder / name).is_file() or checkpoint.sha256_file(folder / name) != known:
                raise ModelError(f"{folder}/{name} is missing or damaged: export the model again")
        words = note["vocabulary"]
        return Artifact(
            folder=folder,
            format=kind,
            family=note["family"],
            scheme=Scheme(**note["scheme"]),
            origin=Origin(**note["origin"] | {"folder": folder}),
            config=AutoConfig.from_pretrained(folder),
            vocabulary=Vocabulary(
                tuple(words["tokens"]), words["blank"], words["delimiter"], frozenset(words["specials"])
            ),
            preprocessing=Preprocessing(**note["preprocessing"]),
            files=tuple(note["files"]),
            details=note["details"],
            agreement=note["compared"]["agreeing"],
            unverified_reason=note["compared"]["unchecked"],
        )
    except (KeyError, TypeError) as missing:
        raise ModelError(
            f"{folder}/{MANIFEST_FILE} is damaged: it does not say {missing}; export the model again"
        ) from None


def is_export(folder: Path) -> bool:
    """Whether `folder` says that it is an export, of whatever format."""
    try:
        note = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(note, dict) and "files" in note and "kind" in note


def model_sha256(model: Model) -> str:
    """SHA-256 (hex) of all that makes the net's numbers: its weights, an adapter's among them, config and scheme."""
    found = hashlib.sha256(model.net.config.to_json_string().encode())
    found.update(repr(model.scheme).encode())
    for name, value in sorted(model.net.state_dict().items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()
