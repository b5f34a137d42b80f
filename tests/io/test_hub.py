"""Names to folders, pickles to safetensors, files written whole. The hub is `tests/hub.py`, on this machine."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mowa.errors import HubUnreachable, ModelError, UnknownModel
from mowa.io import hub as files
from tests.hub import NOWHERE, Hub, point_client_at, running

REPO = "someone/wav2vec2-tiny"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOWA_CACHE", str(tmp_path / "mowa-cache"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running(tmp_path / "hf", monkeypatch) as hub:
        yield hub


def checkpoint(folder: Path, *, safetensors: bool = True, pickled: bool = False, size: int = 63) -> Path:
    """A folder that looks like a model to this room, which reads no more of it than names and tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "wav2vec2"}')
    (folder / "vocab.json").write_text('{"<pad>": 0, "a": 1}')
    (folder / "README.md").write_text("---\nlanguage: pl\nlicense: apache-2.0\n---\n# A model\nlicense: none of it\n")
    (folder / "flax_model.msgpack").write_bytes(b"never wanted")
    tensors = {"lm_head.weight": torch.arange(float(size))}
    if safetensors:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    return folder


# cache_folder


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert files.cache_folder() == tmp_path / "mowa-cache"
    monkeypatch.delenv("MOWA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / "mowa"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / ".cache" / "mowa"


# resolve: folders and aliases


def test_a_folder_is_itself(tmp_path: Path, hub: Hub) -> None:
    origin = files.resolve_model(str(checkpoint(tmp_path / "model")))
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
def test_the_licence_is_read_from_the_front_matter_only(tmp_path: Path, card: str, license: str | None) -> None:
    (tmp_path / "README.md").write_text(card)
    assert files.resolve_model(str(tmp_path)).license == license


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="folders have no revisions"):
        files.resolve_model(str(tmp_path), revision="v1")


def test_an_alias_names_a_bundled_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(files.MODEL_ALIASES, "pl-tiny", checkpoint(tmp_path / "pl-tiny"))
    origin = files.resolve_model("pl-tiny")
    assert (origin.name, origin.folder) == ("pl-tiny", tmp_path / "pl-tiny")
    monkeypatch.setitem(files.MODEL_ALIASES, "pl-tiny", tmp_path / "gone")
    with pytest.raises(ModelError, match="pl-tiny is missing from this installation"):
        files.resolve_model("pl-tiny")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("polsh", "no model is called 'polsh': did you mean 'polish'?"),
        ("pl_tiny", "did you mean 'pl-tiny'?"),
        ("xyzzy", "no model is called 'xyzzy': name an alias (pl-tiny, polish), a folder, or a hub id owner/name"),
        ("", "no model is called ''"),
        ("a/b/c", "no model is called 'a/b/c'"),
        ("./nothing/here", "there is no folder ./nothing/here"),
        ("~nobody-of-that-name/model", "there is no folder ~nobody-of-that-name/model"),
    ],
)
def test_an_unknown_name_is_told_what_is_near(name: str, message: str, hub: Hub) -> None:
    with pytest.raises(UnknownModel) as caught:
        files.resolve_model(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not hub.log


# resolve: the hub


def test_a_hub_id_is_fetched_pinned_and_kept(hub: Hub, tmp_path: Path) -> None:
    commit = hub.publish(REPO, checkpoint(tmp_path / "src"))
    origin = files.resolve_model(REPO)
    assert (origin.source, origin.revision, origin.license) == (REPO, commit, "apache-2.0")
    assert files.ensure_safetensors(origin.folder) == origin.folder
    assert hub.downloads == {"config.json", "vocab.json", "README.md", "model.safetensors"}

    hub.log.clear()
    assert files.resolve_model(REPO) == origin
    assert len(hub.log) == 1, "only whether the branch has moved"

    hub.log.clear()
    assert files.resolve_model(REPO, offline=True) == origin
    assert files.resolve_model(f"{REPO}@{commit}").folder == origin.folder, "a commit cannot move"
    assert not hub.log


def test_a_branch_that_moved_is_fetched_anew(hub: Hub, tmp_path: Path) -> None:
    first = hub.publish(REPO, checkpoint(tmp_path / "src"))
    assert files.resolve_model(REPO).revision == first
    second = hub.publish(REPO, checkpoint(tmp_path / "src", size=1))
    assert files.resolve_model(REPO).revision == second
    assert files.resolve_model(REPO, revision=first).revision == first


def test_a_second_name_for_the_same_commit_is_remembered_too(hub: Hub, tmp_path: Path) -> None:
    hub.publish(REPO, checkpoint(tmp_path / "src"))
    commit = hub.publish(REPO, tmp_path / "src", branch="v1")
    assert files.resolve_model(REPO).revision == files.resolve_model(f"{REPO}@v1").revision == commit
    assert files.resolve_model(f"{REPO}@v1", offline=True).revision == commit


def test_an_alias_may_name_a_hub_id(hub: Hub, tmp_path: Path) -> None:
    commit = hub.publish(str(files.MODEL_ALIASES["polish"]), checkpoint(tmp_path / "src"))
    origin = files.resolve_model("polish")
    assert (origin.name, origin.source, origin.revision) == ("polish", files.MODEL_ALIASES["polish"], commit)


def test_a_revision_is_named_after_an_at_or_apart(hub: Hub, tmp_path: Path) -> None:
    hub.publish(REPO, checkpoint(tmp_path / "src"))
    commit = hub.publish(REPO, checkpoint(tmp_path / "src", size=1), branch="v1")
    assert files.resolve_model(f"{REPO}@v1").revision == commit
    assert files.resolve_model(REPO, revision="v1").revision == commit
    assert files.resolve_model(REPO, revision="v1", offline=True).revision == commit
    with pytest.raises(ModelError, match="two revisions were named, 'v1' and 'main'"):
        files.resolve_model(f"{REPO}@v1", revision="main")


def test_a_pickle_is_fetched_only_where_there_is_nothing_better(hub: Hub, tmp_path: Path) -> None:
    hub.publish(REPO, checkpoint(tmp_path / "both", pickled=True))
    files.resolve_model(REPO)
    assert "pytorch_model.bin" not in hub.downloads
    hub.publish("someone/old", checkpoint(tmp_path / "old", safetensors=False, pickled=True))
    origin = files.resolve_model("someone/old")
    assert "pytorch_model.bin" in hub.downloads
    assert "flax_model.msgpack" not in hub.downloads
    made = files.ensure_safetensors(origin.folder)
    assert torch.equal(load_file(made / "model.safetensors")["lm_head.weight"], torch.arange(63.0))


def test_a_model_that_is_refused_costs_no_weights(hub: Hub, tmp_path: Path) -> None:
    hub.publish(REPO, checkpoint(tmp_path / "src"))

    def vet(folder: Path) -> None:
        assert (folder / "config.json").is_file()
        raise ModelError("not of our kind")

    with pytest.raises(ModelError, match="not of our kind"):
        files.resolve_model(REPO, validate=vet)
    assert "model.safetensors" not in hub.downloads
    with pytest.raises(HubUnreachable):  # what is left of it is not a cached model
        files.resolve_model(REPO, offline=True)


def test_what_the_hub_does_not_have(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="the hub has no model no/such; if it is private, set HF_TOKEN"):
        files.resolve_model("no/such")
    with pytest.raises(UnknownModel, match="someone/two--hyphens is no folder, and no hub id can look like that"):
        files.resolve_model("someone/two--hyphens")
    hub.publish(REPO, checkpoint(tmp_path / "src"))
    with pytest.raises(ModelError, match="has no revision 'v9'"):
        files.resolve_model(REPO, revision="v9")
    hub.gated.add(REPO)
    with pytest.raises(ModelError, match=f"{REPO} is gated: accept its terms at {hub.url}/{REPO}, then set HF_TOKEN"):
        files.resolve_model(REPO)


def test_no_network_and_nothing_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_client_at(NOWHERE, tmp_path / "hf", monkeypatch)
    start = time.monotonic()
    with pytest.raises(HubUnreachable) as caught:
        files.resolve_model("polish")
    assert time.monotonic() - start < 5
    assert str(caught.value) == (
        f"the hub at {NOWHERE} cannot be reached and {files.MODEL_ALIASES['polish']} is not cached: "
        "connect once, or name a folder"
    )


def test_no_network_but_cached(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    commit = hub.publish(REPO, checkpoint(tmp_path / "src"))
    origin = files.resolve_model(REPO)
    point_client_at(NOWHERE, tmp_path / "hf", monkeypatch)
    with caplog.at_level(logging.WARNING, "mowa"):
        assert files.resolve_model(REPO) == origin
    assert f"cannot be reached; using the cached revision {commit[:12]}" in caplog.text


def test_offline_asks_nobody(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.publish(REPO, checkpoint(tmp_path / "src"))
    with pytest.raises(HubUnreachable, match="is not cached and mowa is offline: connect once, or name a folder"):
        files.resolve_model(REPO, offline=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachable, match="mowa is offline"):
        files.resolve_model(REPO)
    assert not hub.log


def test_the_hub_is_found_by_its_environment_and_without_torch(hub: Hub, tmp_path: Path) -> None:
    commit = hub.publish(REPO, checkpoint(tmp_path / "src"))
    code = f"import sys; from mowa.io.hub import resolve; print(resolve({REPO!r}).folder); sys.exit('torch' in sys.modules)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    folder = Path(child.stdout.strip())
    assert folder.name == commit
    assert folder.is_relative_to(tmp_path / "hf")


# weights


def test_safetensors_stay_where_they_are(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", pickled=True)
    assert files.ensure_safetensors(folder) == folder
    assert not files.cache_folder().exists()


def test_a_pickle_is_converted_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(tmp_path / "model", safetensors=False, pickled=True)
    read: list[Path] = []
    monkeypatch.setattr(files, "_read_pickle", lambda path, real=files._read_pickle: read.append(path) or real(path))
    made = files.ensure_safetensors(folder)
    assert files.ensure_safetensors(folder) == made
    assert len(read) == 1
    checkpoint(folder, safetensors=False, pickled=True, size=4097)
    assert files.ensure_safetensors(folder) == made
    assert len(read) == 2
    assert torch.equal(load_file(made / "model.safetensors")["lm_head.weight"], torch.arange(4097.0))
    assert [file.name for file in made.iterdir()] == ["model.safetensors"]


def test_a_damaged_conversion_is_made_again(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", safetensors=False, pickled=True)
    made = files.ensure_safetensors(folder) / "model.safetensors"
    for rubbish in (b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]"):
        made.write_bytes(rubbish)
        files.ensure_safetensors(folder)
        assert load_file(made)["lm_head.weight"].shape == (63,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_a_conversion_keeps_every_tensor(tmp_path: Path, zipped: bool, dtype: torch.dtype) -> None:
    table = torch.arange(4097 * 3).reshape(4097, 3).to(dtype)
    state = {
        "one": torch.ones(1, dtype=dtype),
        "none": torch.ones(0, 63, dtype=dtype),
        "scalar": torch.tensor(3, dtype=dtype),
        "table": table,
        "tied": table,
        "turned": table.T,
        "part": table[63:],
        "empty too": torch.ones(0, dtype=dtype),
    }
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    made = load_file(files.ensure_safetensors(tmp_path) / "model.safetensors")
    assert made.keys() == state.keys()
    for name, tensor in state.items():
        assert made[name].dtype == dtype
        assert torch.equal(made[name], tensor), name


def test_shards_become_one_file_and_a_missing_one_is_said(tmp_path: Path) -> None:
    shards = {f"pytorch_model-0000{i}-of-00002.bin": {f"layer.{i}": torch.full((3,), float(i))} for i in (1, 2)}
    for name, state in shards.items():
        torch.save(state, tmp_path / name)
    places = {key: name for name, state in shards.items() for key in state}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert load_file(files.ensure_safetensors(tmp_path) / "model.safetensors").keys() == {"layer.1", "layer.2"}
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ModelError, match="no complete weights"):
        files.ensure_safetensors(tmp_path)


class Evil:
    """Its pickle writes a file when it is loaded without care."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.victim}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_wants_to_run_code_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    victim, path = tmp_path / "created", tmp_path / "pytorch_model.bin"
    torch.save({"lm_head.weight": Evil(victim)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match=r"is refused: its pickle wants to run posix\.system") as caught:
        files.ensure_safetensors(tmp_path)
    assert "\n" not in str(caught.value)
    assert not victim.exists()
    torch.load(path, weights_only=False)  # the trap works: without care it springs
    assert victim.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged"),
        (b"PK\x03\x04 not a zip at all", "is refused|is damaged"),
        (pickle.dumps({"model": {"a": 1}}), "is refused|is damaged|not a plain"),
    ],
)
def test_a_pickle_that_is_none_is_said(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        files.ensure_safetensors(tmp_path)
    assert "\n" not in str(caught.value)


def test_half_a_pickle_and_a_training_state_are_said(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"model": {"a": torch.ones(3)}, "step": 3}, path)
    with pytest.raises(ModelError, match="is not a plain name → tensor pickle"):
        files.ensure_safetensors(tmp_path)
    torch.save({"a": torch.ones(4097)}, path)
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(ModelError, match=r"is damaged|is refused"):
        files.ensure_safetensors(tmp_path)
    assert not list(files.cache_folder().rglob("*.tmp"))


def test_no_weights_are_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no complete weights"):
        files.ensure_safetensors(tmp_path)


# reading and writing


@pytest.mark.parametrize("content", ["{", "[1]", "\udcff"])
def test_json_that_is_none_is_said(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ModelError, match=r"config\.json (cannot be read|should hold a JSON object)"):
        files.read_json(tmp_path / "config.json")


@given(data=st.binary(max_size=4097) | st.text(max_size=63))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, data: str | bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "written"
    files.atomic_write(path, data)
    assert path.read_bytes() == (data if isinstance(data, bytes) else data.encode())


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    files.atomic_write(path, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.atomic_write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# cached


def test_no_cache_is_an_empty_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_client_at(NOWHERE, tmp_path / "hf", monkeypatch)
    assert files.list_cached_models({"wav2vec2"}) == []


def test_the_cache_lists_known_models_and_conversions(hub: Hub, tmp_path: Path) -> None:
    commit = hub.publish(REPO, checkpoint(tmp_path / "src", safetensors=False, pickled=True, size=4097))
    other = checkpoint(tmp_path / "other")
    (other / "config.json").write_text('{"model_type": "whisper"}')
    hub.publish("someone/whisper", other)
    files.resolve_model("someone/whisper")
    origin = files.resolve_model(REPO)
    made = files.ensure_safetensors(origin.folder)
    snapshot, conversion = files.list_cached_models({"wav2vec2", "hubert"})
    assert (snapshot.name, snapshot.revision, snapshot.model_type) == (REPO, commit, "wav2vec2")
    assert snapshot.folder.samefile(origin.folder)
    assert snapshot.size_bytes > 4 * 4097
    assert (conversion.name, conversion.folder, conversion.converted) == (str(origin.folder), made, True)
    assert conversion.model_type == "wav2vec2"
    assert conversion.size_bytes == (made / "model.safetensors").stat().st_size
