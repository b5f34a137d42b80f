"""Atomic files and folders, and JSON objects."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mowa.errors import ModelError
from mowa.io.atomic import atomic_write, read_json, read_json_cache, update_json_cache


@pytest.mark.parametrize("content", ["{", "[1]", "\udcff"])
def test_invalid_json_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ModelError, match=r"config\.json (cannot be read|holds a JSON list, expected an object)"):
        read_json(tmp_path / "config.json")


@given(data=st.binary(max_size=4097) | st.text(max_size=63))
def test_a_written_file_reads_back(tmp_path_factory: pytest.TempPathFactory, data: str | bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "written"
    atomic_write(path, data)
    assert path.read_bytes() == (data if isinstance(data, bytes) else data.encode())


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    atomic_write(path, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_cache_keeps_names_that_are_not_utf_8(tmp_path: Path) -> None:
    cache = tmp_path / "new" / "cache.json"
    update_json_cache(cache, {"/data/\udcff.wav": 1, "/data/ż.wav": 2})
    assert read_json_cache(cache) == {"/data/\udcff.wav": 1, "/data/ż.wav": 2}
