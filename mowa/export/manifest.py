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

from mowa.adapt import processor, store
from mowa.errors import ModelError
from mowa.files import read_json
from mowa.nouns import Artifact, Model, Origin, Preprocessing, Scheme, Vocabulary

NOTE, FORMAT = "mowa.json", 2


@dataclass(frozen=True, slots=True)
class Written:
    """What an exporter wrote: which files hold the model, what whoever runs it must know beside (`details`), and what
    came of comparing it with the net: `farthest` (nats, of any log-probability) and `agreeing` (the share of frames
    with the same likeliest output), or why they are not there (`unchecked`)."""

    files: tuple[str, ...]
    details: Mapping[str, Any] = field(default_factory=dict)
    farthest: float | None = None
    agreeing: float | None = None
    unchecked: str = ""
    made_by: tuple[str, ...] = ()  # packages whose versions matter


def write(model: Model, net: Any, kind: str, folder: Path, written: Written) -> None:
    """The note in `folder` and, beside it, config, vocabulary and audio settings. `net` is what was written."""
    net.config.save_pretrained(folder)
    processor.write(model.vocabulary, model.preprocessing, folder)
    words = model.vocabulary
    note = {
        "format": FORMAT,
        "kind": kind,
        "family": model.family.name,
        "scheme": asdict(model.scheme),
        "origin": {name: value for name, value in asdict(model.origin).items() if name != "folder"},
        "weights_sha256": digest(model),
        "files": {name: store.sha256_of(folder / name) for name in sorted(written.files)},
        "details": dict(written.details),
        "compared": {"farthest": written.farthest, "agreeing": written.agreeing, "unchecked": written.unchecked},
        "vocabulary": {
            "tokens": words.tokens,
            "blank": words.blank,
            "delimiter": words.delimiter,
            "specials": sorted(words.specials),
        },
        "preprocessing": asdict(model.preprocessing),
        "made_by": store.makers() | {name: store.version_of(name) for name in written.made_by},
    }
    (folder / NOTE).write_text(json.dumps(note, ensure_ascii=False, indent=1), encoding="utf-8")


def read(folder: Path, kinds: Iterable[str] = ()) -> Artifact:
    """What the export in `folder` is. ModelError: none there, of none of `kinds`, a newer format's, files missing or
    changed."""
    from transformers import AutoConfig

    if not (folder / NOTE).is_file():
        raise ModelError(f"{folder} holds no export: name a folder that `mowa export` wrote, with a {NOTE}")
    note = read_json(folder / NOTE)
    kind, kinds = note.get("kind", "nothing"), tuple(kinds)
    if note.get("format") != FORMAT or "files" not in note or (kinds and kind not in kinds):
        wanted = " or ".join(kinds) or "an export"
        raise ModelError(f"{folder}/{NOTE} is {kind} of format {note.get('format')}, not {wanted} of format {FORMAT}")
    try:
        for name, known in note["files"].items():
            if not (folder / name).is_file() or store.sha256_of(folder / name) != known:
                raise ModelError(f"{folder}/{name} is missing or damaged: export the model again")
        words = note["vocabulary"]
        return Artifact(
            folder=folder,
            kind=kind,
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
            agreeing=note["compared"]["agreeing"],
            unchecked=note["compared"]["unchecked"],
        )
    except (KeyError, TypeError) as missing:
        raise ModelError(f"{folder}/{NOTE} is damaged: it does not say {missing}; export the model again") from None


def is_export(folder: Path) -> bool:
    """Whether `folder` says that it is an export, of whatever format."""
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(note, dict) and "files" in note and "kind" in note


def digest(model: Model) -> str:
    """SHA-256 (hex) of all that makes the net's numbers: its weights, an adapter's among them, config and scheme."""
    found = hashlib.sha256(model.net.config.to_json_string().encode())
    found.update(repr(model.scheme).encode())
    for name, value in sorted(model.net.state_dict().items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()
