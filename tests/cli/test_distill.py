"""`mowa distill` is a recipe of `mowa train` by another name."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mowa.cli.main import cli
from mowa.errors import RecipeError
from tests.checkpoints import corpus, tiny


def test_a_student_is_made_of_recordings_without_texts(tmp_path):
    teacher, manifest = tiny(tmp_path / "teacher"), Path(corpus(tmp_path / "corpus", 6))
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    mute = manifest.parent / "mute.jsonl"
    mute.write_text("".join(json.dumps({"audio": row["audio"]}) + "\n" for row in rows))
    arguments = ["--teacher", teacher, "--student-layers", 1, "--data", mute, "--dev", manifest, "--steps", 2]
    arguments += ["-o", tmp_path / "student", "--threads", 1, "--batch.seconds", 4]
    done = CliRunner().invoke(cli, ["distill", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "student" / "config.json").read_text())["num_hidden_layers"] == 1
    heard = CliRunner().invoke(
        cli, ["transcribe", str(manifest.parent / "0.wav"), "--model", str(tmp_path / "student")]
    )
    assert heard.exit_code == 0, heard.output


def test_what_is_to_be_measured_on_has_to_be_said(tmp_path):
    arguments = ["distill", "--teacher", "x", "--student-layers", "1", "--data", "a.jsonl", "-o", str(tmp_path)]
    with pytest.raises(RecipeError, match="give --dev"):
        CliRunner().invoke(cli, arguments, catch_exceptions=False)
