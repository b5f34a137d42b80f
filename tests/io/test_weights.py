"""Weights of a checkpoint: safetensors are used as they are, pickles are converted without running their code."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mowa.errors import ModelError
from mowa.hardware import cache_folder
from mowa.io import weights
from tests.io.checkpoints import write_checkpoint


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOWA_CACHE", str(tmp_path / "mowa-cache"))


def test_safetensors_are_not_converted(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", pickled=True)
    assert weights.ensure_safetensors(folder) == folder
    assert not cache_folder().exists()


def test_a_pickle_is_converted_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path / "model", safetensors=False, pickled=True)
    read: list[Path] = []
    monkeypatch.setattr(
        weights, "_read_pickle", lambda path, real=weights._read_pickle: read.append(path) or real(path)
    )
    converted = weights.ensure_safetensors(folder)
    assert weights.ensure_safetensors(folder) == converted
    assert len(read) == 1
    write_checkpoint(folder, safetensors=False, pickled=True, size=4097)
    assert weights.ensure_safetensors(folder) == converted
    assert len(read) == 2
    assert torch.equal(load_file(converted / "model.safetensors")["lm_head.weight"], torch.arange(4097.0))
    assert [file.name for file in converted.iterdir()] == ["model.safetensors"]


def test_a_damaged_conversion_is_repeated(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", safetensors=False, pickled=True)
    converted = weights.ensure_safetensors(folder) / "model.safetensors"
    for content in (b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]"):
        converted.write_bytes(content)
        weights.ensure_safetensors(folder)
        assert load_file(converted)["lm_head.weight"].shape == (63,)


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
        "transposed": table.T,
        "part": table[63:],
        "empty too": torch.ones(0, dtype=dtype),
    }
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    converted = load_file(weights.ensure_safetensors(tmp_path) / "model.safetensors")
    assert converted.keys() == state.keys()
    for name, tensor in state.items():
        assert converted[name].dtype == dtype
        assert torch.equal(converted[name], tensor), name


@pytest.mark.parametrize("safetensors", [True, False], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_removed(tmp_path: Path, prefix: str, safetensors: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    save = save_file if safetensors else torch.save
    save(state, tmp_path / ("model.safetensors" if safetensors else "pytorch_model.bin"))
    converted = load_file(weights.ensure_safetensors(tmp_path) / "model.safetensors")
    assert converted.keys() == model.state_dict().keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in model.state_dict().items())


def test_only_the_prefixes_of_wrappers_are_removed() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    keys = list(model.state_dict())
    assert list(weights.unwrap_keys(torch.nn.DataParallel(model).state_dict()).values()) == keys
    assert weights.unwrap_keys(["net._orig_mod.weight", "net.bias"]) == {  # torch.compile(model.net)
        "net._orig_mod.weight": "net.weight",
        "net.bias": "net.bias",
    }


def test_a_module_of_that_name_is_no_wrapper() -> None:
    keys = {"module.weight": "module.weight", "head.weight": "head.weight", "my_orig_mod.bias": "my_orig_mod.bias"}
    assert weights.unwrap_keys(keys) == keys


def test_shards_are_merged_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    shards = {f"pytorch_model-0000{i}-of-00002.bin": {f"layer.{i}": torch.full((3,), float(i))} for i in (1, 2)}
    for name, state in shards.items():
        torch.save(state, tmp_path / name)
    weight_map = {key: name for name, state in shards.items() for key in state}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert load_file(weights.ensure_safetensors(tmp_path) / "model.safetensors").keys() == {"layer.1", "layer.2"}
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ModelError, match="no complete weights"):
        weights.ensure_safetensors(tmp_path)


class Evil:
    """Its pickle creates a file when it is loaded with code execution."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.victim}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_rejected_and_not_run(tmp_path: Path, zipped: bool) -> None:
    victim, path = tmp_path / "created", tmp_path / "pytorch_model.bin"
    torch.save({"lm_head.weight": Evil(victim)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match=r"was not loaded: its pickle would run posix\.system") as caught:
        weights.ensure_safetensors(tmp_path)
    assert "\n" not in str(caught.value)
    assert not victim.exists()
    torch.load(path, weights_only=False)  # the pickle does run code
    assert victim.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged"),
        (b"PK\x03\x04 not a zip at all", "was not loaded|is damaged"),
        (pickle.dumps({"model": {"a": 1}}), "was not loaded|is damaged|not a state dict"),
    ],
)
def test_files_that_are_no_pickle_are_rejected(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        weights.ensure_safetensors(tmp_path)
    assert "\n" not in str(caught.value)


def test_truncated_pickles_and_training_states_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"model": {"a": torch.ones(3)}, "step": 3}, path)
    with pytest.raises(ModelError, match="is not a state dict of tensors"):
        weights.ensure_safetensors(tmp_path)
    torch.save({"a": torch.ones(4097)}, path)
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(ModelError, match=r"is damaged|was not loaded"):
        weights.ensure_safetensors(tmp_path)
    assert not list(cache_folder().rglob("*.tmp"))


def test_missing_weights_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no complete weights"):
        weights.ensure_safetensors(tmp_path)
