"""`mowa distill`."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mowa.cli.main import cli
from mowa.errors import RecipeError
from tests.checkpoints import corpus, tiny


def test_a_student_is_trained_on_recordings_without_transcripts(tmp_path):
    teacher, manifest = tiny(tmp_path / "teacher"), Path(corpus(tmp_path / "corpus", 6))
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    mute = manifest.parent / "mute.jsonl"
    mute.write_text("".join(json.dumps({"audio": row["audio"]}) + "\n" for row in rows))
    arguments = [teacher, "--student-layers", 1, "--data", mute, "--dev", manifest, "--max-steps", 2]
    arguments += ["-o", tmp_path / "student", "--threads", 1, "--batch.seconds", 4]
    done = CliRunner().invoke(cli, ["distill", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "student" / "config.json").read_text())["num_hidden_layers"] == 1
    transcribed = CliRunner().invoke(
        cli, ["transcribe", str(manifest.parent / "0.wav"), "--model", str(tmp_path / "student")]
    )
    assert transcribed.exit_code == 0, transcribed.output


def test_evaluation_data_is_required(tmp_path):
    arguments = ["distill", "x", "--student-layers", "1", "--data", "a.jsonl", "-o", str(tmp_path)]
    with pytest.raises(RecipeError, match="missing --dev"):
        CliRunner().invoke(cli, arguments, catch_exceptions=False)
