"""A recording on which pl-tiny has low confidence gets one warning, and the default model says what it is."""

import logging
import sys

import numpy as np
import pytest
import soundfile

import mowa
from mowa.cli.main import main
from mowa.decode.confidence import MIN_CONFIDENCE, warn_if_low
from mowa.io.hub import SAMPLE_CLIP
from mowa.types import Segment, Transcript, Word
from tests.checkpoints import tiny
from tests.shared_data import shared_data

OPTIONS = ["--dtype", "float32", "--engine", "pytorch", "--vad-threshold", "0"]


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    """Organ chords of half a second each, 8 s."""
    times = np.arange(8 * 16_000) / 16_000
    chords = np.array([[220, 277, 330], [196, 247, 294], [262, 330, 392], [175, 220, 262]])[
        (times / 0.5).astype(int) % 4
    ]
    samples = sum(
        np.sin(2 * np.pi * chords[:, note] * part * times) / part for note in range(3) for part in range(1, 6)
    )
    file = tmp_path_factory.mktemp("music") / "organ.wav"
    soundfile.write(file, 0.1 * samples * np.minimum(1, (times % 0.5) * 10), 16_000)
    return str(file)


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(["transcribe", *map(str, arguments), *OPTIONS])
    assert end.value.code == 0
    return capsys.readouterr()


def transcript(*confidences):
    words = tuple(Word("a", 0.0, 1.0, confidence) for confidence in confidences)
    return Transcript("talk.mp3", "a", 1.0, (Segment("a", 0.0, 1.0, words),))


def test_the_mean_of_the_words_decides(caplog):
    warn_if_low(transcript(0.9, 0.41), "pl-tiny")
    warn_if_low(transcript(), "pl-tiny")
    warn_if_low(transcript(0.1), "polish")
    assert not caplog.records
    warn_if_low(transcript(0.7, 0.5), "pl-tiny")
    assert [record.getMessage() for record in caplog.records] == [
        "talk.mp3: the mean confidence of pl-tiny is only 0.60: the recording may be music or noise, and its transcript"
        " wrong"
    ]


def test_python_gets_one_warning_per_recording(music, caplog):
    with caplog.at_level(logging.WARNING, "mowa"):
        outcomes = list(mowa.transcribe([SAMPLE_CLIP, music], dtype="float32", engine="pytorch", vad_threshold=0.0))
    assert outcomes[0].confidence > MIN_CONFIDENCE["pl-tiny"] > outcomes[1].confidence > 0
    assert [record.args[0] for record in caplog.records if "confidence" in record.getMessage()] == [music]


def test_the_command_prints_it_on_standard_error_and_no_note_where_it_is_piped(music, capsys):
    out, err = run(capsys, SAMPLE_CLIP, music)
    assert len(out.splitlines()) == 2
    assert err.startswith(f"mowa: {music}: the mean confidence of pl-tiny is only 0.")
    assert len(err.splitlines()) == 1


def test_the_default_model_says_what_it_is_on_a_terminal(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    note = "pl-tiny: draft quality, Polish; use --model polish for transcripts to keep"
    assert note in run(capsys, SAMPLE_CLIP).err
    assert note not in run(capsys, SAMPLE_CLIP, "--model", "pl-tiny").err
    assert note not in run(capsys, SAMPLE_CLIP, "--model", tiny(tmp_path / "other")).err


@pytest.mark.slow
def test_hardly_any_recording_of_people_is_warned_about(caplog):
    files = sorted((shared_data("human-pl") / "audio").rglob("*.flac"))
    outcomes = list(mowa.transcribe(files, dtype="float32", engine="pytorch"))
    low = [one for one in outcomes if one.words and one.confidence < MIN_CONFIDENCE["pl-tiny"]]
    assert len(low) <= 0.02 * len(files)
