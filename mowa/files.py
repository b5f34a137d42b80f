"""A model's name → a local folder at a pinned revision, its pickled weights → safetensors; and files written whole.

Knows names, folders and the hub; never what is inside a model. The hub is reached only where the user names a hub id
and does not say `offline`. What huggingface_hub reads from the environment (HF_ENDPOINT, HF_TOKEN, HF_HOME,
HF_HUB_OFFLINE) holds here too.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import pickle
import re
import secrets
import warnings
import zipfile
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mowa.errors import DataError, HubUnreachable, ModelError, UnknownModel
from mowa.machine import cache_folder
from mowa.nouns import Origin

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("mowa")

MODEL_ALIASES: dict[str, str | Path] = {
    "pl-tiny": Path(__file__).parent / "assets" / "pl-tiny",
    "polish": "jonatasgrosman/wav2vec2-large-xlsr-53-polish",
}
"""Short names for a bundled folder (a Path) or a hub id (a str). An alias wins over a folder: for that say ./polish."""

_SAFETENSORS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
_PICKLES = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")
_SMALL = (
    *("config.json", "preprocessor_config.json", "processor_config.json", "vocab.json", "tokenizer*.json"),
    *("special_tokens_map.json", "added_tokens.json", "README.md", "generation_config.json", "chat_template*"),
    *("tokenizer.model", "merges.txt"),
)
_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PROBE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class CachedModel:
    """One thing kept on this disk: a hub snapshot, or (`converted`) the safetensors made of a pickle in `name`."""

    name: str
    folder: Path
    size_bytes: int
    model_type: str
    revision: str | None = None
    converted: bool = False


def resolve_model(
    name: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    validate: Callable[[Path], object] | None = None,
) -> Origin:
    """Find the local folder that `name` (alias, folder or hub id `owner/name[@revision]`) stands for.

    `vet` sees a hub model's folder when only its small files are there and may raise: a model that cannot be used is
    refused before its gigabytes come. `Origin.revision` is the full commit id, so a result can be had again.

    Raises UnknownModel (nothing answers to the name), HubUnreachable (no answer, and nothing cached),
    ModelError (gated, no such revision, a revision asked of a folder, and whatever `vet` raises).
    """
    target = MODEL_ALIASES.get(name, name)
    folder = Path(os.path.expanduser(target))
    if target and folder.is_dir():
        if revision:
            raise ModelError(f"{name} is a folder and folders have no revisions: leave out {revision!r}")
        return Origin(name=name, source=str(target), folder=folder, license=_license(folder))
    if isinstance(target, Path):
        raise ModelError(f"the bundled model {name} is missing from this installation: {target} does not exist")
    hub_id = _HUB_ID.fullmatch(target)
    if hub_id is None:
        raise _unknown(name)
    if revision and hub_id["revision"] not in (None, revision):
        raise ModelError(f"two revisions were named, {hub_id['revision']!r} and {revision!r}: keep one")
    repo = hub_id["repo"]
    folder = _from_hub(repo, revision or hub_id["revision"] or "main", offline, validate)
    return Origin(name=name, source=repo, folder=folder, revision=folder.name, license=_license(folder))


class _ConfigFetched(Exception):
    """The small files of a hub model are here, in the folder that is its argument."""


def fetch_config(name: str, *, offline: bool = False) -> Path:
    """The local folder with the config and tokenizer of a model. Weights are not fetched. Raises as `resolve` does."""

    def stop(folder: Path) -> None:
        raise _ConfigFetched(folder)

    try:
        return resolve_model(name, offline=offline, validate=stop).folder
    except _ConfigFetched as found:
        folder: Path = found.args[0]
        return folder


def _unknown(name: str) -> UnknownModel:
    if name.startswith((".", "/", "~")):
        return UnknownModel(f"there is no folder {name}")
    close = difflib.get_close_matches(name, MODEL_ALIASES, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return UnknownModel(
        f"no model is called {name!r}: {hint}name an alias ({', '.join(MODEL_ALIASES)}), a folder, or a hub id owner/name"
    )


def _license(folder: Path) -> str | None:
    """The `license:` of a model card's front matter (https://huggingface.co/docs/hub/model-cards), if it has one."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    front = re.match(r"\s*---\s*\n(.*?)\n---", card, re.DOTALL)
    found = front and re.search(r"""^license:(?:[ \t]*|\s*-\s*)["']?([\w.+-]+)""", front[1], re.MULTILINE)
    return found[1] if found else None


def _from_hub(repo: str, revision: str, offline: bool, validate: Callable[[Path], object] | None) -> Path:
    """The snapshot folder of `repo`; its name is the commit. A pinned commit that is cached needs no request at all."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except errors.HFValidationError:
        raise UnknownModel(f"{repo} is no folder, and no hub id can look like that") from None
    offline = offline or constants.HF_HUB_OFFLINE
    cached = _snapshot(repo, revision)
    if cached and (offline or _COMMIT.fullmatch(revision)):
        return cached
    if offline:
        raise HubUnreachable(f"{repo} ({revision}) is not cached and mowa is offline: connect once, or name a folder")
    try:
        return _download(repo, revision, validate)
    except errors.GatedRepoError:
        page = f"{constants.ENDPOINT}/{repo}"
        raise ModelError(f"{repo} is gated: accept its terms at {page}, then set HF_TOKEN to your token") from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{repo} has no revision {revision!r}") from None
    except errors.RepositoryNotFoundError:
        raise UnknownModel(f"the hub has no model {repo}; if it is private, set HF_TOKEN to your token") from None
    except errors.HfHubHTTPError as error:
        reason = f"the hub at {constants.ENDPOINT} answered with HTTP {error.response.status_code}"
    except (errors.HTTPError, errors.LocalEntryNotFoundError):
        reason = f"the hub at {constants.ENDPOINT} cannot be reached"
    if cached:
        log.warning("%s; using the cached revision %s of %s", reason, cached.name[:12], repo)
        return cached
    raise HubUnreachable(f"{reason} and {repo} is not cached: connect once, or name a folder")


def _snapshot(repo: str, revision: str) -> Path | None:
    """The cached snapshot of a branch, tag or commit, if it has a config and all its weights."""
    from huggingface_hub import constants, try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json", cache_dir=constants.HF_HUB_CACHE, revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return folder if weight_files(folder) else None


def _download(repo: str, revision: str, validate: Callable[[Path], object] | None) -> Path:
    """Ask for the commit and its files (one request); fetch the small files, show them to `vet`, fetch the weights.

    Pickles are fetched only where there are no safetensors; other frameworks' weights and n-gram models never.
    """
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi().model_info(repo, revision=revision, timeout=_PROBE_TIMEOUT_S)
    known = _snapshot(repo, revision)
    if known and known.name == info.sha:
        return known
    files = {file.rfilename for file in info.siblings or ()}
    weights = _SAFETENSORS if files & {"model.safetensors", "model.safetensors.index.json"} else _PICKLES
    # By name first, so that the name is remembered for offline use; then by commit, so that both calls see the same.
    folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(_SMALL)))
    if validate:
        validate(folder)
    snapshot_download(repo, revision=folder.name, allow_patterns=[*_SMALL, *weights])
    return folder


def ensure_safetensors(folder: Path) -> Path:
    """The folder that holds `folder`'s weights as safetensors: itself, or one under the cache made of its pickles.

    A pickle is read once, with `weights_only`, straight from the file's pages, and written as safetensors next to a
    stamp of the files it came from (path, size, time); a later call finds it, a changed file is converted again. The
    made folder holds no config: give `from_pretrained` the original's config beside it. That keeps loading lazy, one
    tensor at a time from the file, where `state_dict=` would hold a whole second copy.

    Raises ModelError where weights are missing, damaged, or a pickle wants to run code (it is not run).
    """
    files = weight_files(folder)
    if not files:
        raise ModelError(f"{folder} has no complete weights: neither model.safetensors nor pytorch_model.bin")
    return folder if files[0].suffix == ".safetensors" else _converted(folder, files)


def weight_files(folder: Path) -> list[Path]:
    """Safetensors if there are any, else pickles, whole or in shards; empty if there are none or a shard is missing."""
    for single in (folder / "model.safetensors", folder / "pytorch_model.bin"):
        if single.is_file():
            return [single]
        index = single.with_name(f"{single.name}.index.json")
        if index.is_file():
            shards = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
            return shards if all(shard.is_file() for shard in shards) else []
    return []


def _converted(folder: Path, pickles: list[Path]) -> Path:
    real = [file.resolve() for file in pickles]
    stamp = json.dumps([(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in real])
    key = hashlib.sha256("\n".join(map(str, real)).encode()).hexdigest()[:16]
    made = cache_folder() / "converted" / key / "model.safetensors"
    if made.is_file() and safetensors_metadata(made).get("stamp") == stamp:
        return made.parent

    from safetensors.torch import save_file

    log.info("converting the pickled weights of %s to safetensors, once", folder)
    tensors = _owning_their_memory({name: tensor for file in real for name, tensor in _read_pickle(file).items()})
    made.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(made) as unfinished:
        save_file(tensors, unfinished, metadata={"format": "pt", "source": str(folder.absolute()), "stamp": stamp})
    return made.parent


def _read_pickle(path: Path) -> dict[str, Tensor]:
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):  # of odd protocols: a pickle is read or refused
            # Only the zip format (torch >= 1.6) can be mapped; older pickles are read into memory.
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        culprit = f"wants to run {wanted[1]}" if wanted else "holds more than tensors"
        raise ModelError(f"{path} is refused: its pickle {culprit}, and only tensors are read") from None
    except (RuntimeError, EOFError, OSError) as error:
        reason, *_ = str(error).splitlines() or ["it ends early"]
        raise ModelError(f"{path} is damaged: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(f"{path} is not a plain name → tensor pickle: export it with save_pretrained first")
    return state


def _owning_their_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Safetensors holds contiguous tensors with memory of their own: copy the few that are not so, no others."""
    seen: set[int] = set()
    owned = {}
    for name, tensor in tensors.items():
        dense = tensor.contiguous()
        owned[name] = dense.clone() if dense.untyped_storage().data_ptr() in seen else dense
        seen.add(dense.untyped_storage().data_ptr())
    return owned


def safetensors_metadata(path: Path) -> dict[str, str]:
    """What is noted in a safetensors header (u64 length, then JSON); empty if the file is not one."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except (OSError, ValueError, OverflowError):
        return {}
    return header.get("__metadata__", {}) if isinstance(header, dict) else {}


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Keep transformers from drawing bars and warning of what we check ourselves; leave its settings as they were."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging as chatter

    verbosity, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    no_hub_bars = are_progress_bars_disabled()
    chatter.set_verbosity(logging.CRITICAL)
    chatter.disable_progress_bar()
    try:
        yield
    finally:
        chatter.set_verbosity(verbosity)
        if bars:
            chatter.enable_progress_bar()  # and the hub's with them
        if no_hub_bars:
            disable_progress_bars()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder. ModelError where the file is missing, is not JSON, or is no object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent} has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path} should hold a JSON object, not a {type(data).__name__}")
    return data


def atomic_write(path: Path, data: str | bytes) -> None:
    """Write `path` whole or not at all: text as UTF-8. A reader, or a crash, never sees half a file."""
    with _replacing(Path(path)) as unfinished:
        unfinished.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; on success it is flushed to disk and takes `path`'s place."""
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
    """A folder to write into and to examine; it becomes `out` when the context ends well, else nothing is left of it.

    Raises DataError where `out` is there already and not an empty folder.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{out} is there already: choose another folder, or delete it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as name:
        folder = Path(name) / "whole"
        folder.mkdir()
        yield folder
        if out.is_dir():
            out.rmdir()
        os.replace(folder, out)


def fix_weight_permissions(folder: Path) -> None:
    """Whoever may read the config in `folder` may read its weights too, which safetensors keeps to their writer."""
    readers = (folder / "config.json").stat().st_mode
    for file in folder.glob("*.safetensors"):
        file.chmod(readers)


def list_cached_models(model_types: Container[str]) -> list[CachedModel]:
    """Hub snapshots with weights whose config names one of `model_types`, then conversions, each sorted by name.

    The families are told, not asked: this room lies below them. Sizes are bytes on disk. No network, no torch.
    """
    kinds = _cached_snapshots(model_types), _cached_conversions()
    return [one for kind in kinds for one in sorted(kind, key=lambda one: one.name)]


def _cached_snapshots(model_types: Container[str]) -> Iterator[CachedModel]:
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return
    for repo in repos:
        for snapshot in repo.revisions if repo.repo_type == "model" else ():
            model_type = _model_type(snapshot.snapshot_path)
            if model_type in model_types and weight_files(snapshot.snapshot_path):
                folder, size = snapshot.snapshot_path, snapshot.size_on_disk
                yield CachedModel(repo.repo_id, folder, size, model_type, revision=snapshot.commit_hash)


def _cached_conversions() -> Iterator[CachedModel]:
    for file in (cache_folder() / "converted").glob("*/model.safetensors"):
        source = safetensors_metadata(file).get("source", "")
        yield CachedModel(source, file.parent, file.stat().st_size, _model_type(Path(source)), converted=True)


def _model_type(folder: Path) -> str:
    try:
        return str(read_json(folder / "config.json").get("model_type", ""))
    except ModelError:
        return ""
