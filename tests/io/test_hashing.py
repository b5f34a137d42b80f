"""Checksums are computed once per file and state, also over several starts of mowa."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from mowa.io import hashing


@pytest.fixture
def reads(tmp_path, monkeypatch):
    """The files that were read, with an empty cache and files that count as settled."""
    monkeypatch.setenv("MOWA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashing, "MIN_AGE_S", -1.0)
    found: list[Path] = []
    compute = hashing._read_and_hash
    monkeypatch.setattr(hashing, "_read_and_hash", lambda file: found.append(file) or compute(file))
    hashing._sha256.cache_clear()
    return found


def restart():
    hashing._sha256.cache_clear()


def write(file, content):
    file.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def test_a_second_start_does_not_read_the_file(reads, tmp_path):
    file = tmp_path / "weights"
    expected = write(file, b"\0" * 4097)
    link = tmp_path / "link"
    link.symlink_to(file)
    for path in (file, file, link):
        restart()
        assert hashing.sha256_file(path) == expected
    assert reads == [file]


def test_a_changed_file_is_read_again(reads, tmp_path):
    file = tmp_path / "weights"
    write(file, b"one")
    hashing.sha256_file(file)
    status = file.stat()
    expected = write(file, b"two")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # same path, size and time of modification
    restart()
    assert hashing.sha256_file(file) == expected
    replacement = tmp_path / "other"
    expected = write(replacement, b"six")
    os.replace(replacement, file)
    restart()
    assert hashing.sha256_file(file) == expected
    assert len(reads) == 3


def test_a_file_that_was_just_written_is_not_cached(reads, tmp_path, monkeypatch):
    monkeypatch.setattr(hashing, "MIN_AGE_S", 60.0)
    write(tmp_path / "weights", b"one")
    for _ in range(2):
        restart()
        hashing.sha256_file(tmp_path / "weights")
    assert len(reads) == 2
    assert not (tmp_path / "cache" / hashing.CACHE_FILE).exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"FILE": 1}', '{"FILE": [[], "0"]}', '{"FILE": [null, 7]}'])
def test_a_damaged_cache_is_ignored(reads, tmp_path, content):
    file, cache = tmp_path / "weights", tmp_path / "cache" / hashing.CACHE_FILE
    expected = write(file, b"one")
    cache.parent.mkdir()
    cache.write_text(content.replace("FILE", str(file)))
    assert hashing.sha256_file(file) == expected
    restart()
    assert hashing.sha256_file(file) == expected
    assert len(reads) == 1


def test_a_cache_that_cannot_be_written_is_ignored(reads, tmp_path):
    (tmp_path / "cache").write_text("a file")
    expected = write(tmp_path / "weights", b"one")
    assert hashing.sha256_file(tmp_path / "weights") == expected


def test_the_cache_is_bounded(reads, tmp_path, monkeypatch):
    monkeypatch.setattr(hashing, "MAX_CACHED_FILES", 3)
    for index in range(5):
        write(tmp_path / f"{index}", b"one")
        hashing.sha256_file(tmp_path / f"{index}")
    cached = json.loads((tmp_path / "cache" / hashing.CACHE_FILE).read_text())
    assert [Path(name).name for name in cached] == ["2", "3", "4"]
