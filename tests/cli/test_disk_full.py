"""A disk that fills while a result is written is one line, whatever writes; what was written before stays."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from mowa.cli.main import main
from mowa.io import atomic
from tests.checkpoints import clip, tiny

ALL = ["--vad-threshold", "0", "--dtype", "float32"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny(tmp_path_factory.mktemp("model")))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MOWA_CACHE", str(tmp_path / ".cache"))
    for name in "abc":
        soundfile.write(tmp_path / f"{name}.wav", clip(0, 12_000), 16_000)
    return tmp_path


def fill(monkeypatch, after):
    """Let the disk be full after this many atomic writes."""
    count, fsync = [0], os.fsync

    def full(handle):
        count[0] += 1
        if count[0] > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(atomic.os, "fsync", full)


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(list(map(str, arguments)))
    return end.value.code, capsys.readouterr().err.strip().splitlines()


def test_out_names_the_file_and_keeps_those_before_it(folder, model, tmp_path, capsys, monkeypatch):
    fill(monkeypatch, after=1)
    code, err = run(capsys, "transcribe", folder, "-m", model, *ALL, "-o", tmp_path / "out")
    assert code == 2
    assert err == [
        f"mowa: {tmp_path / 'out' / 'b.txt'}: cannot be written (No space left on device). The files before it are"
        " complete: free some space or choose another --out, and transcribe the rest"
    ]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["a.txt"]


def test_other_verbs_say_it_in_one_line(folder, model, tmp_path, capsys, monkeypatch):
    code, err = run(capsys, "transcribe", folder, "-m", model, *ALL, "--results", tmp_path / "log.jsonl")
    assert (code, err[-1].endswith("3 recordings, 0 failed")) == (0, True), err
    fill(monkeypatch, after=0)
    code, err = run(capsys, "results", "export", tmp_path / "log.jsonl", "-o", tmp_path / "texts")
    assert code == 2
    assert err == ["mowa: cannot be written (No space left on device): free some space, or write elsewhere"]
    with pytest.raises(OSError, match="No space left"):
        main(["--debug", "results", "export", str(tmp_path / "log.jsonl"), "-o", str(tmp_path / "texts")])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("command", [["models"], ["train", "--list-options"]], ids=lambda command: command[0])
def test_a_full_standard_output_is_one_line(command):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mowa", *command],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        "mowa: cannot be written (No space left on device): free some space, or write elsewhere"
    )
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
