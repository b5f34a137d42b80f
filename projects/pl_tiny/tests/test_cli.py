import re
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import mowa
from projects.pl_tiny.cli import cli, main


def test_mowa_does_not_import_projects():
    pattern = re.compile(r"^\s*(from|import) projects\b", re.M)
    files = Path(mowa.__file__).parent.rglob("*.py")
    assert not [path for path in files if pattern.search(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("command", [[], *([name] for name in sorted(cli.commands))], ids=str)
def test_help(command):
    done = CliRunner().invoke(cli, [*command, "--help"])
    assert done.exit_code == 0
    assert "Options:" in done.output


def test_text_keeps_readable_sentences_once(tmp_path):
    source, out = tmp_path / "in.txt", tmp_path / "out" / "text.txt"
    source.write_text("Nie łam się! Rozdział 3 mówi o tym.\nCóż to za dziwny statek? Nie łam się!\n")
    done = CliRunner().invoke(cli, ["text", "--text", str(source), "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert out.read_text() == "Nie łam się!\nCóż to za dziwny statek?\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["text", "-o", "OUT"], "no sentences found"),
        (["train", "missing.yaml", "-o", "OUT"], "missing.yaml: no such recipe"),
        (["people", "--source", "klingon", "-o", "OUT"], "klingon: no such source"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    out = str(tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["pl_tiny", *(out if part == "OUT" else part for part in arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pl_tiny: {message}")
    assert error.count("\n") == 1
    assert not Path(out).exists()
