"""The other commands, and that every error is one line."""

from pathlib import Path

import pytest

from mowa.cli import docs_pages
from mowa.cli.main import main

DOCS = Path(__file__).parents[2] / "docs"


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    return end.value.code, *capsys.readouterr()


def test_docs_are_generated_from_the_commands():
    assert (DOCS / "cli.md").read_text() == docs_pages.render_cli_page(), "run `make docs`"


def test_models(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MOWA_CACHE", str(tmp_path))
    code, out, _ = run(capsys, "models")
    assert code == 0
    for word in ("pl-tiny", "bundled", "jonatasgrosman/wav2vec2-large-xlsr-53-polish", "wavlm"):
        assert word in out


def test_families(capsys):
    code, out, _ = run(capsys, "models", "--families")
    assert code == 0
    assert {"hubert", "wav2vec2", "wavlm"} <= {line.split()[0] for line in out.splitlines()}


def test_doctor_transcribes_the_sample(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MOWA_CACHE", str(tmp_path))
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert out.splitlines()[-1] == "  ok"


def test_wrong_recipe_key(capsys, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: m\ndataa: {}\n")
    code, _, err = run(capsys, "train", str(recipe), "--out", str(tmp_path / "out"))
    assert code == 2
    assert err == f"mowa: {recipe}: unknown key dataa; did you mean data?\n"


def test_unknown_command(capsys):
    code, _, err = run(capsys, "transcrib")
    assert code == 2
    assert "transcrib" in err


def test_debug_shows_the_traceback(tmp_path):
    from mowa.errors import MowaError

    with pytest.raises(MowaError):
        main(["transcribe", str(tmp_path / "lost.wav"), "--debug"])
