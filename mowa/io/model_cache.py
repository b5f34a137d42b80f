"""List, download and remove cached models: Hub snapshots, and what mowa derived from them.

Derived are safetensors converted from pickles, and ONNX exports that `--engine onnx` made. Only `pull` contacts the
Hub, and nothing here needs torch.
"""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mowa.errors import ModelError, UnknownModel
from mowa.hardware import cache_folder
from mowa.io.atomic import read_json
from mowa.io.hub import HUB_ID, MODEL_ALIASES, resolve_model
from mowa.io.manifest import find_manifest
from mowa.io.weights import safetensors_metadata, weight_files

ModelKind = Literal["snapshot", "converted", "onnx"]


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model in the local cache.

    name         Hub id; for a derived model, the Hub id or folder of its source
    size_bytes   size on disk; snapshots of one repository may share files
    model_type   model_type in its config
    revision     full commit id of a Hub model
    last_used_s  when its weights were last read, in seconds since 1970, as far as the file system records it
    kind         snapshot of the Hub; converted: safetensors converted from its pickles; onnx: export of it
    """

    name: str
    folder: Path
    size_bytes: int
    model_type: str
    revision: str | None = None
    last_used_s: float | None = None
    kind: ModelKind = "snapshot"


@dataclass(frozen=True, slots=True)
class Removal:
    """What `remove` deletes: snapshots, with what was derived from them. `size_bytes` is the space that this frees."""

    models: tuple[CachedModel, ...]
    size_bytes: int


def list_cached(model_types: Container[str]) -> list[CachedModel]:
    """List cached Hub models whose config has one of `model_types`, then derived models, each sorted by name."""
    snapshots = [one for one in _snapshots() if one.model_type in model_types and weight_files(one.folder)]
    return [model for group in (snapshots, _derived()) for model in sorted(group, key=lambda model: model.name)]


def pull(name: str, *, revision: str | None = None, validate: Callable[[Path], object] | None = None) -> CachedModel:
    """Download a model of the Hub (an alias or `owner/name[@revision]`) and return it; nothing if it is cached.

    Only config, weights, tokenizer and processor files are fetched. `validate` and errors are those of `resolve_model`;
    also raises ModelError for a folder or a bundled model, which are here already.
    """
    origin = resolve_model(name, revision=revision, validate=validate)
    if origin.revision is None:
        where = "is bundled with mowa" if name in MODEL_ALIASES else "is a folder"
        raise ModelError(f"{name} {where} ({origin.folder}): there is nothing to download")
    size = sum(file.stat().st_size for file in origin.folder.rglob("*") if file.is_file())
    return CachedModel(origin.source, origin.folder, size, _model_type(origin.folder), origin.revision)


def plan_removal(name: str) -> Removal:
    """Return the cached revisions of a Hub model, `owner/name[@revision]` or an alias, and what was derived from them.

    Raises ModelError for a bundled model, and UnknownModel if nothing is cached under this name.
    """
    target = MODEL_ALIASES.get(name, name)
    if isinstance(target, Path):
        raise ModelError(f"{name} is bundled with mowa and cannot be removed")
    hub_id = HUB_ID.fullmatch(target)
    snapshots = list(_snapshots())
    chosen = [one for one in snapshots if hub_id and one.name == hub_id["repo"] and _is_at(one, hub_id["revision"])]
    if not chosen:
        raise _not_cached(name, snapshots)
    derived = [one for one in _derived() if any(_is_from(one, snapshot) for snapshot in chosen)]
    freed = _strategy(chosen).expected_freed_size + sum(one.size_bytes for one in derived)
    return Removal((*chosen, *derived), freed)


def remove(removal: Removal) -> None:
    """Delete what `plan_removal` planned. Files that other revisions share are kept."""
    _strategy([one for one in removal.models if one.kind == "snapshot"]).execute()
    for one in removal.models:
        if one.kind != "snapshot":
            shutil.rmtree(one.folder, ignore_errors=True)


def _snapshots() -> Iterator[CachedModel]:
    """Yield every snapshot of a model in the Hub's cache, complete or not."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return
    for repo in repos:
        for snapshot in repo.revisions if repo.repo_type == "model" else ():
            # Not of the config, which listing reads.
            used = [file.blob_last_accessed for file in snapshot.files if file.file_path.suffix != ".json"]
            folder, size = snapshot.snapshot_path, snapshot.size_on_disk
            yield CachedModel(
                repo.repo_id, folder, size, _model_type(folder), snapshot.commit_hash, max(used, default=None)
            )


def _derived() -> list[CachedModel]:
    return [*_conversions(), *_onnx_exports()]


def _conversions() -> Iterator[CachedModel]:
    for file in (cache_folder() / "converted").glob("*/model.safetensors"):
        source = Path(safetensors_metadata(file).get("source", ""))
        found = CachedModel(str(source), file.parent, file.stat().st_size, _model_type(source), kind="converted")
        repo, commit = _split_snapshot(source)
        yield replace(found, name=repo, revision=commit) if repo else found


def _onnx_exports() -> Iterator[CachedModel]:
    for folder in (cache_folder() / "onnx").glob("*"):
        try:
            manifest = find_manifest(folder)
        except ModelError:
            manifest = None
        if manifest is not None:
            origin, files = manifest.origin, [file for file in folder.glob("*") if file.is_file()]
            yield CachedModel(
                name=origin["name"] if origin.get("revision") is None else origin["source"],
                folder=folder,
                size_bytes=sum(file.stat().st_size for file in files),
                model_type=_model_type(folder),
                revision=origin.get("revision"),
                last_used_s=max((file.stat().st_atime for file in files if file.suffix != ".json"), default=None),
                kind="onnx",
            )


def _split_snapshot(folder: Path) -> tuple[str, str]:
    """Return repository and commit of a folder `models--owner--name/snapshots/COMMIT`; "" for any other."""
    if folder.parent.name != "snapshots" or not (repo := folder.parents[1].name).startswith("models--"):
        return "", ""
    return repo.removeprefix("models--").replace("--", "/"), folder.name


def _strategy(snapshots: list[CachedModel]) -> Any:
    """Return huggingface_hub's DeleteCacheStrategy for `snapshots`."""
    from huggingface_hub import constants, scan_cache_dir

    commits = [one.revision for one in snapshots if one.revision]
    return scan_cache_dir(constants.HF_HUB_CACHE).delete_revisions(*commits)


def _is_at(snapshot: CachedModel, revision: str | None) -> bool:
    """Whether a snapshot is that of `revision`: a commit or its beginning, or a branch or tag; None is any."""
    if revision is None or (snapshot.revision or "").startswith(revision):
        return True
    ref = snapshot.folder.parents[1] / "refs" / revision
    return ref.is_file() and ref.read_text().strip() == snapshot.revision


def _is_from(derived: CachedModel, snapshot: CachedModel) -> bool:
    return (derived.name, derived.revision) == (snapshot.name, snapshot.revision)


def _not_cached(name: str, snapshots: list[CachedModel]) -> UnknownModel:
    names = sorted({one.name for one in snapshots})
    close = difflib.get_close_matches(name, [*names, *MODEL_ALIASES], n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close and close[0] != name else ""
    return UnknownModel(f"{name} is not in the cache: {hint}`mowa models list` shows what is")


def _model_type(folder: Path) -> str:
    try:
        return str(read_json(folder / "config.json").get("model_type", ""))
    except ModelError:
        return ""
