"""A model's name → a local folder at a pinned revision, its pickled weights → safetensors; and files written whole.

Knows names, folders and the hub; never what is inside a model. The hub is reached only where the user names a hub id
and does not say `offline`. What huggingface_hub reads from the environment (HF_ENDPOINT, HF_TOKEN, HF_HOME,
HF_HUB_OFFLINE) holds here too.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mowa.errors import HubUnreachable, ModelError, UnknownModel
from mowa.hardware import cache_folder
from mowa.io.atomic import read_json
from mowa.io.weights import PICKLES, SAFETENSORS, safetensors_metadata, weight_files
from mowa.types import Origin

if TYPE_CHECKING:
    pass

log = logging.getLogger("mowa")

MODEL_ALIASES: dict[str, str | Path] = {
    "pl-tiny": Path(__file__).parents[1] / "assets" / "pl-tiny",
    "polish": "jonatasgrosman/wav2vec2-large-xlsr-53-polish",
}
"""Short names for a bundled folder (a Path) or a hub id (a str). An alias wins over a folder: for that say ./polish."""


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
    weights = SAFETENSORS if files & {"model.safetensors", "model.safetensors.index.json"} else PICKLES
    # By name first, so that the name is remembered for offline use; then by commit, so that both calls see the same.
    folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(_SMALL)))
    if validate:
        validate(folder)
    snapshot_download(repo, revision=folder.name, allow_patterns=[*_SMALL, *weights])
    return folder


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
