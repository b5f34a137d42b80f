"""Model names resolve to folders. The Hub is `tests/hub.py`, a server on this machine."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mowa.errors import HubUnreachable, ModelError, UnknownModel
from mowa.hardware import cache_folder
from mowa.io import weights
from mowa.io.hub import MODEL_ALIASES, resolve_model
from tests.hub import NOWHERE, Hub, point_client_at, running
from tests.io.checkpoints import write_checkpoint

REPO = "someone/wav2vec2-tiny"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOWA_CACHE", str(tmp_path / "mowa-cache"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running(tmp_path / "hf", monkeypatch) as hub:
        yield hub


# cache_folder


def test_the_environment_sets_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "mowa-cache"
    monkeypatch.delenv("MOWA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mowa"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "mowa"


# resolve_model: folders and aliases


def test_a_folder_resolves_to_itself(tmp_path: Path, hub: Hub) -> None:
    origin = resolve_model(str(write_checkpoint(tmp_path / "model")))
    assert origin.folder == tmp_path / "model"
    assert (origin.source, origin.revision, origin.license) == (origin.name, None, "apache-2.0")
    assert not hub.log


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense:\n- cc-by-4.0\n---\n", "cc-by-4.0"),
        ("---\nlicense: 'mit'\r\n---\n", "mit"),
        ("---\nlicense:\nlanguage: pl\n---\n", None),
        ("---\nlanguage: pl\n---\nlicense: mit\n", None),
        ("license: mit\n", None),
        ("", None),
    ],
)
def test_the_license_is_read_from_the_front_matter_only(tmp_path: Path, card: str, license: str | None) -> None:
    (tmp_path / "README.md").write_text(card)
    assert resolve_model(str(tmp_path)).license == license


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="folders have no revisions"):
        resolve_model(str(tmp_path), revision="v1")


def test_an_alias_names_a_bundled_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODEL_ALIASES, "pl-tiny", write_checkpoint(tmp_path / "pl-tiny"))
    origin = resolve_model("pl-tiny")
    assert (origin.name, origin.folder) == ("pl-tiny", tmp_path / "pl-tiny")
    monkeypatch.setitem(MODEL_ALIASES, "pl-tiny", tmp_path / "gone")
    with pytest.raises(ModelError, match="pl-tiny is missing from this installation"):
        resolve_model("pl-tiny")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("polsh", "unknown model 'polsh': did you mean 'polish'?"),
        ("pl_tiny", "did you mean 'pl-tiny'?"),
        ("xyzzy", "unknown model 'xyzzy': use an alias (pl-tiny, polish), a folder, or a Hub id owner/name"),
        ("", "unknown model ''"),
        ("a/b/c", "unknown model 'a/b/c'"),
        ("./nothing/here", "folder ./nothing/here does not exist"),
        ("~nobody-of-that-name/model", "folder ~nobody-of-that-name/model does not exist"),
    ],
)
def test_an_unknown_name_gets_a_suggestion(name: str, message: str, hub: Hub) -> None:
    with pytest.raises(UnknownModel) as caught:
        resolve_model(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not hub.log


# resolve_model: the Hub


def test_a_hub_id_is_fetched_pinned_and_kept(hub: Hub, tmp_path: Path) -> None:
    commit = hub.publish(REPO, write_checkpoint(tmp_path / "src"))
    origin = resolve_model(REPO)
    assert (origin.source, origin.revision, origin.license) == (REPO, commit, "apache-2.0")
    assert weights.ensure_safetensors(origin.folder) == origin.folder
    assert hub.downloads == {"config.json", "vocab.json", "README.md", "model.safetensors"}

    hub.log.clear()
    assert resolve_model(REPO) == origin
    assert len(hub.log) == 1, "a single request, for the commit of the branch"

    hub.log.clear()
    assert resolve_model(REPO, offline=True) == origin
    assert resolve_model(f"{REPO}@{commit}").folder == origin.folder, "a commit does not change"
    assert not hub.log


def test_a_branch_that_moved_is_fetched_anew(hub: Hub, tmp_path: Path) -> None:
    first = hub.publish(REPO, write_checkpoint(tmp_path / "src"))
    assert resolve_model(REPO).revision == first
    second = hub.publish(REPO, write_checkpoint(tmp_path / "src", size=1))
    assert resolve_model(REPO).revision == second
    assert resolve_model(REPO, revision=first).revision == first


def test_a_second_name_for_the_same_commit_is_remembered_too(hub: Hub, tmp_path: Path) -> None:
    hub.publish(REPO, write_checkpoint(tmp_path / "src"))
    commit = hub.publish(REPO, tmp_path / "src", branch="v1")
    assert resolve_model(REPO).revision == resolve_model(f"{REPO}@v1").revision == commit
    assert resolve_model(f"{REPO}@v1", offline=True).revision == commit


def test_an_alias_may_name_a_hub_id(hub: Hub, tmp_path: Path) -> None:
    commit = hub.publish(str(MODEL_ALIASES["polish"]), write_checkpoint(tmp_path / "src"))
    origin = resolve_model("polish")
    assert (origin.name, origin.source, origin.revision) == ("polish", MODEL_ALIASES["polish"], commit)


def test_a_revision_follows_an_at_sign_or_is_a_parameter(hub: Hub, tmp_path: Path) -> None:
    hub.publish(REPO, write_checkpoint(tmp_path / "src"))
    commit = hub.publish(REPO, write_checkpoint(tmp_path / "src", size=1), branch="v1")
    assert resolve_model(f"{REPO}@v1").revision == commit
    assert resolve_model(REPO, revision="v1").revision == commit
    assert resolve_model(REPO, revision="v1", offline=True).revision == commit
    with pytest.raises(ModelError, match="two revisions were given, 'v1' and 'main'"):
        resolve_model(f"{REPO}@v1", revision="main")


def test_a_pickle_is_downloaded_only_without_safetensors(hub: Hub, tmp_path: Path) -> None:
    hub.publish(REPO, write_checkpoint(tmp_path / "both", pickled=True))
    resolve_model(REPO)
    assert "pytorch_model.bin" not in hub.downloads
    hub.publish("someone/old", write_checkpoint(tmp_path / "old", safetensors=False, pickled=True))
    origin = resolve_model("someone/old")
    assert "pytorch_model.bin" in hub.downloads
    assert "flax_model.msgpack" not in hub.downloads
    converted = weights.ensure_safetensors(origin.folder)
    assert torch.equal(load_file(converted / "model.safetensors")["lm_head.weight"], torch.arange(63.0))


def test_weights_of_a_rejected_model_are_not_downloaded(hub: Hub, tmp_path: Path) -> None:
    hub.publish(REPO, write_checkpoint(tmp_path / "src"))

    def reject(folder: Path) -> None:
        assert (folder / "config.json").is_file()
        raise ModelError("unsupported")

    with pytest.raises(ModelError, match="unsupported"):
        resolve_model(REPO, validate=reject)
    assert "model.safetensors" not in hub.downloads
    with pytest.raises(HubUnreachable):  # a partial download is not a cached model
        resolve_model(REPO, offline=True)


def test_missing_and_gated_models(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="the Hub has no model no/such; if it is private, set HF_TOKEN"):
        resolve_model("no/such")
    with pytest.raises(UnknownModel, match="someone/two--hyphens is neither a folder nor a valid Hub id"):
        resolve_model("someone/two--hyphens")
    hub.publish(REPO, write_checkpoint(tmp_path / "src"))
    with pytest.raises(ModelError, match="has no revision 'v9'"):
        resolve_model(REPO, revision="v9")
    hub.gated.add(REPO)
    with pytest.raises(ModelError, match=f"{REPO} is gated: accept its terms at {hub.url}/{REPO}, then set HF_TOKEN"):
        resolve_model(REPO)


def test_no_network_and_nothing_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_client_at(NOWHERE, tmp_path / "hf", monkeypatch)
    start = time.monotonic()
    with pytest.raises(HubUnreachable) as caught:
        resolve_model("polish")
    assert time.monotonic() - start < 5
    assert str(caught.value) == (
        f"the Hub at {NOWHERE} cannot be reached and {MODEL_ALIASES['polish']} is not cached: "
        "download it once, or use a folder"
    )


def test_no_network_but_cached(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    commit = hub.publish(REPO, write_checkpoint(tmp_path / "src"))
    origin = resolve_model(REPO)
    point_client_at(NOWHERE, tmp_path / "hf", monkeypatch)
    with caplog.at_level(logging.WARNING, "mowa"):
        assert resolve_model(REPO) == origin
    assert f"cannot be reached; using the cached revision {commit[:12]}" in caplog.text


def test_offline_sends_no_request(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.publish(REPO, write_checkpoint(tmp_path / "src"))
    with pytest.raises(HubUnreachable, match="is not cached and mowa is offline: download it once"):
        resolve_model(REPO, offline=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachable, match="mowa is offline"):
        resolve_model(REPO)
    assert not hub.log


def test_the_hub_is_configured_by_the_environment_and_needs_no_torch(hub: Hub, tmp_path: Path) -> None:
    commit = hub.publish(REPO, write_checkpoint(tmp_path / "src"))
    code = f"""
import sys
from mowa.io.hub import resolve_model
print(resolve_model({REPO!r}).folder)
sys.exit('torch' in sys.modules)
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    folder = Path(child.stdout.strip())
    assert folder.name == commit
    assert folder.is_relative_to(tmp_path / "hf")
