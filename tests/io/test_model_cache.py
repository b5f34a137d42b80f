"""Cached models are listed, downloaded and removed. The Hub is `tests/hub.py`, a server on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mowa.cli.main import main
from mowa.errors import HubUnreachable, ModelError, UnknownModel
from mowa.io import model_cache, weights
from mowa.io.hub import resolve_model
from mowa.io.manifest import write_manifest
from mowa.io.model_cache import list_cached, plan_removal, pull, remove
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


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["models", *arguments])
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


def write_onnx_export(folder: Path, source: str, revision: str | None) -> Path:
    folder.mkdir(parents=True)
    origin = {"name": "polish", "source": source, "revision": revision, "license": None}
    write_manifest(folder, "export", task="ctc", family="wav2vec2", origin=origin, files=[], format="onnx")
    (folder / "config.json").write_text('{"model_type": "wav2vec2"}')
    (folder / "model.onnx").write_bytes(bytes(5000))
    return folder


def test_without_a_cache_the_list_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_client_at(NOWHERE, tmp_path / "hf", monkeypatch)
    assert list_cached({"wav2vec2"}) == []


def test_the_cache_lists_known_models_and_what_was_made_of_them(hub: Hub, tmp_path: Path) -> None:
    commit = hub.publish(REPO, write_checkpoint(tmp_path / "src", safetensors=False, pickled=True, size=4097))
    other = write_checkpoint(tmp_path / "other")
    (other / "config.json").write_text('{"model_type": "whisper"}')
    hub.publish("someone/whisper", other)
    resolve_model("someone/whisper")
    origin = resolve_model(REPO)
    converted = weights.ensure_safetensors(origin.folder)
    export = write_onnx_export(tmp_path / "mowa-cache" / "onnx" / "abc", REPO, commit)
    snapshot, *derived = list_cached({"wav2vec2", "hubert"})
    assert (snapshot.name, snapshot.revision, snapshot.model_type) == (REPO, commit, "wav2vec2")
    assert snapshot.folder.samefile(origin.folder)
    assert snapshot.size_bytes > 4 * 4097
    assert snapshot.last_used_s
    assert {(one.kind, one.folder) for one in derived} == {("converted", converted), ("onnx", export)}
    assert {(one.name, one.revision, one.model_type) for one in derived} == {(REPO, commit, "wav2vec2")}
    assert min(one.size_bytes for one in derived) >= 5000


def test_a_conversion_of_a_folder_has_its_path_as_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_client_at(NOWHERE, tmp_path / "hf", monkeypatch)
    folder = write_checkpoint(tmp_path / "src", safetensors=False, pickled=True)
    weights.ensure_safetensors(folder)
    assert [(one.name, one.kind) for one in list_cached({"wav2vec2"})] == [(str(folder), "converted")]


def test_pull_downloads_only_what_loading_needs(hub: Hub, tmp_path: Path) -> None:
    commit = hub.publish(REPO, write_checkpoint(tmp_path / "src", pickled=True))
    model = pull(REPO)
    assert hub.downloads == {"config.json", "vocab.json", "README.md", "model.safetensors"}
    assert (model.name, model.revision) == (REPO, commit)
    assert model.size_bytes == sum((tmp_path / "src" / name).stat().st_size for name in hub.downloads)
    assert resolve_model(REPO, offline=True).folder == model.folder


def test_pull_of_a_revision_and_of_what_is_here(hub: Hub, tmp_path: Path) -> None:
    first = hub.publish(REPO, write_checkpoint(tmp_path / "src"), branch="v1")
    hub.publish(REPO, write_checkpoint(tmp_path / "src", size=1))
    assert pull(f"{REPO}@v1").revision == first
    with pytest.raises(ModelError, match=r"pl-tiny is bundled with mowa .*nothing to download"):
        pull("pl-tiny")
    with pytest.raises(ModelError, match=r"src is a folder .*nothing to download"):
        pull(str(tmp_path / "src"))


def test_remove_deletes_every_revision_and_what_was_made_of_it(hub: Hub, tmp_path: Path) -> None:
    first = hub.publish(REPO, write_checkpoint(tmp_path / "src", safetensors=False, pickled=True, size=5000))
    converted = weights.ensure_safetensors(pull(REPO).folder)
    hub.publish(REPO, write_checkpoint(tmp_path / "src", safetensors=False, pickled=True, size=1))
    pull(REPO)
    kept = write_onnx_export(tmp_path / "mowa-cache" / "onnx" / "kept", "someone/else", "0" * 40)
    export = write_onnx_export(tmp_path / "mowa-cache" / "onnx" / "gone", REPO, first)
    removal = plan_removal(REPO)
    remove(removal)
    assert [one.kind for one in removal.models].count("snapshot") == 2
    assert removal.size_bytes > 2 * 4 * 5000 + 5000
    assert not converted.exists()
    assert not export.exists()
    assert kept.exists()
    with pytest.raises(HubUnreachable):
        resolve_model(REPO, offline=True)


def test_remove_of_one_revision_keeps_the_other(hub: Hub, tmp_path: Path) -> None:
    first = hub.publish(REPO, write_checkpoint(tmp_path / "src"), branch="v1")
    second = hub.publish(REPO, write_checkpoint(tmp_path / "src", size=1))
    pull(f"{REPO}@v1")
    pull(REPO)
    assert [one.revision for one in model_cache.plan_removal(f"{REPO}@{first[:8]}").models] == [first]
    removal = plan_removal(f"{REPO}@v1")
    assert [one.revision for one in removal.models] == [first]
    remove(removal)
    assert [one.revision for one in list_cached({"wav2vec2"})] == [second]


def test_what_cannot_be_removed(hub: Hub, tmp_path: Path) -> None:
    hub.publish(REPO, write_checkpoint(tmp_path / "src"))
    pull(REPO)
    with pytest.raises(ModelError, match="pl-tiny is bundled with mowa and cannot be removed"):
        plan_removal("pl-tiny")
    with pytest.raises(UnknownModel, match=f"someone/wav2vec-tiny is not in the cache: did you mean {REPO}"):
        plan_removal("someone/wav2vec-tiny")
    with pytest.raises(UnknownModel, match="polish is not in the cache: `mowa models list`"):
        plan_removal("polish")
    with pytest.raises(UnknownModel, match="is not in the cache"):
        plan_removal(f"{REPO}@v9")


def test_the_commands(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commit = hub.publish(REPO, write_checkpoint(tmp_path / "src", size=4000))
    code, out, err = run(capsys, "pull", REPO)
    assert (code, err) == (0, "")
    assert out.startswith(f"{REPO}@{commit[:12]}: 16 kB in ")
    assert f"{REPO}  wav2vec2  {commit[:12]}  from the Hub  16 kB  20" in run(capsys)[1]
    listed = json.loads(run(capsys, "list", "--json")[1])
    assert listed["aliases"]["pl-tiny"] == "bundled"
    assert [(one["name"], one["kind"]) for one in listed["cached"]] == [(REPO, "snapshot")]
    assert "wav2vec2" in listed["families"]["ctc"]
    code, _, err = run(capsys, "rm", REPO)  # not on a terminal
    assert (code, "needs --yes" in err) == (2, True)
    assert run(capsys, "rm", REPO, "--yes")[1] == f"removed 1 revision of {REPO}: 16 kB\n"
    assert "cached: none" in run(capsys, "list")[1]
    assert "mowa: pl-tiny is bundled" in run(capsys, "rm", "pl-tiny", "--yes")[2]


def test_pull_rejects_an_unsupported_family_before_its_weights(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tmp_path / "src")
    (folder / "config.json").write_text('{"model_type": "whisper"}')
    hub.publish(REPO, folder)
    code, _, err = run(capsys, "pull", REPO)
    assert (code, "whisper" in err) == (2, True)
    assert "model.safetensors" not in hub.downloads
