"""Resolve a model name (alias, folder or Hub id) to a local folder, downloading it if needed.

The Hub is contacted only for Hub ids, and never with `offline`. huggingface_hub's environment variables apply:
HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mowa.errors import HubUnreachable, ModelError, UnknownModel
from mowa.io.weights import PICKLES, SAFETENSORS, weight_files
from mowa.types import Origin

log = logging.getLogger("mowa")

_ASSETS = Path(__file__).parents[1] / "assets"
SAMPLE_CLIP = _ASSETS / "sample.flac"  # bundled recording; its text is in sample.json

MODEL_ALIASES: dict[str, str | Path] = {
    "pl-tiny": _ASSETS / "pl-tiny",
    "polish": "jonatasgrosman/wav2vec2-large-xlsr-53-polish",
}
"""Short names of a bundled folder (Path) or a Hub id (str). They take precedence over folders."""

_SMALL_FILES = (
    *("config.json", "preprocessor_config.json", "processor_config.json", "vocab.json", "tokenizer*.json"),
    *("special_tokens_map.json", "added_tokens.json", "README.md", "generation_config.json", "chat_template*"),
    *("tokenizer.model", "merges.txt"),
)
HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PROBE_TIMEOUT_S = 10.0


def resolve_model(
    name: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    validate: Callable[[Path], object] | None = None,
    extra_files: tuple[str, ...] = (),
) -> Origin:
    """Resolve `name` (alias, folder or Hub id `owner/name[@revision]`) to a local folder.

    `validate` is called with a Hub model's folder when only its config and tokenizer are downloaded, and may raise, so
    that an unusable model is rejected before its weights are fetched. Those of `extra_files` that a Hub model has are
    fetched too. `Origin.revision` is the full commit id.

    Raises UnknownModel if there is no such model, HubUnreachable if the Hub cannot be reached and nothing is cached,
    and ModelError if the model is gated, the revision does not exist or is given for a folder, or `validate` raises it.
    """
    target = MODEL_ALIASES.get(name, name)
    folder = Path(os.path.expanduser(target))
    if target and folder.is_dir():
        if revision:
            raise ModelError(f"{name} is a folder, and folders have no revisions: omit {revision!r}")
        if not _is_utf8(str(folder.absolute())):
            raise ModelError(f"{name!r}: safetensors and torch read no folders whose names are not UTF-8: rename it")
        return Origin(name=name, source=str(target), folder=folder, license=_license(folder))
    if isinstance(target, Path):
        raise ModelError(f"the bundled model {name} is missing from this installation ({target}): reinstall mowa")
    hub_id = HUB_ID.fullmatch(target)
    reject_gguf(name)
    if hub_id is None:
        raise _unknown_model(name)
    if revision and hub_id["revision"] not in (None, revision):
        raise ModelError(f"two revisions were given, {hub_id['revision']!r} and {revision!r}: omit one")
    repo = hub_id["repo"]
    folder = _from_hub(repo, revision or hub_id["revision"] or "main", offline, validate, extra_files)
    return Origin(name=name, source=repo, folder=folder, revision=folder.name, license=_license(folder))


def reject_gguf(name: str) -> None:
    """Raise ModelError if `name` is a GGUF file, where a checkpoint is needed."""
    path = Path(os.path.expanduser(name))
    if path.suffix.lower() == ".gguf" and path.is_file():
        raise ModelError(
            f"{name} is a GGUF file, and a checkpoint is needed here: run `mowa export {name} --to safetensors -o"
            " FOLDER` and name FOLDER"
        )


def _is_utf8(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


class _ConfigFetched(Exception):
    """Raised with the folder of a Hub model once its config and tokenizer are downloaded, to skip its weights."""


def fetch_config(name: str, *, revision: str | None = None, offline: bool = False) -> Path:
    """Return a folder with the config and tokenizer of a model, without fetching weights. Raises as `resolve_model`."""

    def stop(folder: Path) -> None:
        raise _ConfigFetched(folder)

    try:
        return resolve_model(name, revision=revision, offline=offline, validate=stop).folder
    except _ConfigFetched as fetched:
        folder: Path = fetched.args[0]
        return folder


def _unknown_model(name: str) -> UnknownModel:
    if name.startswith((".", "/", "~")):
        return UnknownModel(f"folder {name} does not exist")
    close = difflib.get_close_matches(name, MODEL_ALIASES, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return UnknownModel(
        f"unknown model {name!r}: {hint}use an alias ({', '.join(MODEL_ALIASES)}), a folder, or a Hub id owner/name"
    )


def _license(folder: Path) -> str | None:
    """Return the `license:` of a model card's front matter (https://huggingface.co/docs/hub/model-cards), if any."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    front = re.match(r"\s*---\s*\n(.*?)\n---", card, re.DOTALL)
    found = front and re.search(r"""^license:(?:[ \t]*|\s*-\s*)["']?([\w.+-]+)""", front[1], re.MULTILINE)
    return found[1] if found else None


def _from_hub(
    repo: str, revision: str, offline: bool, validate: Callable[[Path], object] | None, extra_files: tuple[str, ...]
) -> Path:
    """Return the snapshot folder of `repo`, named by its commit. A cached commit needs no request."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except errors.HFValidationError:
        raise UnknownModel(f"{repo} is neither a folder nor a valid Hub id") from None
    offline = offline or constants.HF_HUB_OFFLINE
    cached = _snapshot(repo, revision)
    if cached and (offline or (_COMMIT.fullmatch(revision) and _has_any(cached, extra_files))):
        return cached
    if offline:
        raise HubUnreachable(f"{repo} ({revision}) is not cached and mowa is offline: download it once")
    try:
        return _download(repo, revision, validate, extra_files)
    except errors.GatedRepoError:
        page = f"{constants.ENDPOINT}/{repo}"
        raise ModelError(f"{repo} is gated: accept its terms at {page}, then set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{repo} has no revision {revision!r}") from None
    except errors.RepositoryNotFoundError:
        raise UnknownModel(f"the Hub has no model {repo}; if it is private, set HF_TOKEN") from None
    except errors.HfHubHTTPError as error:
        reason = f"the Hub at {constants.ENDPOINT} returned HTTP {error.response.status_code}"
    except (errors.HTTPError, errors.LocalEntryNotFoundError):
        reason = f"the Hub at {constants.ENDPOINT} cannot be reached"
    if cached:
        log.warning("%s; using the cached revision %s of %s", reason, cached.name[:12], repo)
        return cached
    raise HubUnreachable(f"{reason} and {repo} is not cached: download it once, or use a folder")


def _snapshot(repo: str, revision: str) -> Path | None:
    """Return the cached snapshot of a branch, tag or commit, if it has a config and all its weights."""
    from huggingface_hub import constants, try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json", cache_dir=constants.HF_HUB_CACHE, revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return folder if weight_files(folder) else None


def _has_any(folder: Path, names: tuple[str, ...]) -> bool:
    return not names or any((folder / name).is_file() for name in names)


def _download(
    repo: str, revision: str, validate: Callable[[Path], object] | None, extra_files: tuple[str, ...]
) -> Path:
    """Resolve the commit (one request), download the small files, validate them, then download the weights.

    Pickles are downloaded only if there are no safetensors; other frameworks' weights and n-gram models never.
    """
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi().model_info(repo, revision=revision, timeout=_PROBE_TIMEOUT_S)
    cached = _snapshot(repo, revision)
    if cached and cached.name == info.sha and _has_any(cached, extra_files):
        return cached
    files = {file.rfilename for file in info.siblings or ()}
    weights = SAFETENSORS if files & {"model.safetensors", "model.safetensors.index.json"} else PICKLES
    # By name first, which caches the name for offline use; then by commit, so that both calls get the same version.
    folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(_SMALL_FILES)))
    if validate:
        validate(folder)
    snapshot_download(
        repo, revision=folder.name, allow_patterns=[*_SMALL_FILES, *weights, *_preferred(extra_files, files)]
    )
    return folder


def _preferred(names: tuple[str, ...], available: set[str]) -> tuple[str, ...]:
    """Return the first of `names` that is available, if any."""
    return tuple(name for name in names if name in available)[:1]


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Suppress progress bars and warnings of transformers and huggingface_hub within the context."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        with hide_progress_bars():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


@contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Hide progress bars of transformers and huggingface_hub, such as that of saving, within the context."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging as transformers_logging

    bars, hub_bars_disabled = transformers_logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()  # also enables those of huggingface_hub
        if hub_bars_disabled:
            disable_progress_bars()
