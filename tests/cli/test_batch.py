"""`mowa transcribe --journal`: a job that goes on wherever it was ended, and says all of it once."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

import mowa
from mowa.cli.main import main
from mowa.data import audio

SAMPLE = Path(mowa.__file__).parent / "assets" / "sample.flac"


def run(*arguments, capsys=None):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def lines(journal):
    return [json.loads(line) for line in journal.read_text().splitlines()][1:]


def texts(journal):
    return {row["id"]: row.get("text", row.get("error")) for row in lines(journal)}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Pieces of the sample, of 1 to 3 s, in two formats, and one that is none."""
    folder = tmp_path_factory.mktemp("clips")
    sample, rng = audio.load_audio(SAMPLE), random.Random(0)
    for number in range(24):
        start, length = rng.randrange(len(sample) - 48_000), rng.randrange(16_000, 48_000)
        suffix = ".flac" if number % 2 else ".wav"
        soundfile.write(folder / f"clip-{number:02}{suffix}", sample[start : start + length], 16_000)
    (folder / "clip-99.mp3").write_bytes(b"ID3 nothing of the kind")
    return folder


@pytest.fixture(scope="module")
def unbroken(clips, tmp_path_factory):
    journal = tmp_path_factory.mktemp("unbroken") / "out.jsonl"
    assert run("transcribe", clips, "--journal", journal, "--threads", 1) == 2
    return journal


def test_every_recording_is_there_once(clips, unbroken):
    found = lines(unbroken)
    assert sorted(row["id"] for row in found) == sorted(file.stem for file in clips.iterdir())
    assert [row["id"] for row in found if "error" in row] == ["clip-99"]
    alone = mowa.transcribe(clips / "clip-00.wav", "pl-tiny")
    assert texts(unbroken)["clip-00"] == alone.text


def test_again_does_nothing_and_asks_for_what_failed(clips, unbroken, tmp_path, capsys):
    journal = tmp_path / "out.jsonl"
    before = unbroken.read_bytes()
    journal.write_bytes(before)
    assert run("transcribe", clips, "--journal", journal, "--threads", 1) == 2
    assert journal.read_bytes() == before
    assert "25 are in it already" in capsys.readouterr().err
    assert run("transcribe", clips, "--journal", journal, "--retry-failed") == 2
    assert sorted(journal.read_bytes().splitlines()) == sorted(before.splitlines())


def test_shards_are_the_whole(clips, unbroken, tmp_path):
    parts = [tmp_path / f"{number}.jsonl" for number in (1, 2, 3)]
    for number, part in enumerate(parts, 1):
        run("transcribe", clips, "--journal", part, "--shard", f"{number}/3", "--threads", 1)
    assert max(len(lines(part)) for part in parts) == 9
    assert run("journal", "merge", *parts, "--out", tmp_path / "all.jsonl") == 0
    assert texts(tmp_path / "all.jsonl") == texts(unbroken)
    assert len(lines(tmp_path / "all.jsonl")) == 25


def test_other_settings_and_wrong_words_are_refused(clips, unbroken, tmp_path, capsys):
    before = unbroken.read_bytes()
    assert run("transcribe", clips, "--journal", unbroken, "--window-s", 9) == 2
    assert "window_s: 20.0 → 9.0" in capsys.readouterr().err
    for option, value, said in (
        ("--shard", "3/2", "no share of a whole"),
        ("--column", "audio", "names no column"),
        ("--channels", "left", "say mix, split"),
        ("--out", tmp_path, "mowa journal export"),
    ):
        assert run("transcribe", clips, "--journal", unbroken, option, value) == 2
        assert said in capsys.readouterr().err
    assert run("transcribe", clips, "--shard", "1/2") == 2
    assert "name a --journal" in capsys.readouterr().err
    assert unbroken.read_bytes() == before


def test_journals_are_shown_and_exported(clips, unbroken, tmp_path, capsys):
    assert run("journal", "show", unbroken) == 0
    shown = capsys.readouterr().out
    assert "pl-tiny" in shown
    assert "24, 0.0" in shown
    assert "1 × is not audio" in shown
    assert run("journal", "export", unbroken, "--format", "srt", "--out", tmp_path / "srt") == 0
    assert len(list((tmp_path / "srt").glob("*.srt"))) == 24
    assert "1 recordings failed" in capsys.readouterr().err
    assert run("journal", "export", unbroken) == 0
    exported = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert exported["clip-03"] == texts(unbroken)["clip-03"]
    assert run("journal", "export", unbroken, "--format", "vtt") == 2
    assert "name a folder" in capsys.readouterr().err


def test_channels_are_heard_each_for_itself(tmp_path, capsys):
    sample = audio.load_audio(SAMPLE)
    half = len(sample) // 2
    silence = np.zeros(half, np.float32)
    soundfile.write(
        tmp_path / "talk.wav",
        np.stack([np.r_[sample[:half], silence], np.r_[silence, sample[half:]][: 2 * half]], 1),
        16_000,
    )
    soundfile.write(tmp_path / "twins.wav", np.stack([sample, sample], 1), 16_000)
    heard = []
    for name in ("talk.wav", "twins.wav"):
        assert run("transcribe", tmp_path / name, "--channels", "split", "--format", "json", "--threads", 1) == 0
        heard.append(json.loads(capsys.readouterr().out))
    assert [segment["channel"] for segment in heard[0]["segments"]] == sorted(
        segment["channel"] for segment in heard[0]["segments"]
    )
    assert {segment["channel"] for segment in heard[0]["segments"]} == {0, 1}
    assert "channel" not in heard[1]["segments"][0]
    assert heard[1]["text"] == mowa.transcribe(SAMPLE, threads=1).text
    assert run("transcribe", tmp_path / "talk.wav", "--channels", "1,7") == 2
    assert "has no channel 7: it has 2 channels" in capsys.readouterr().err


# --- ended from outside -----------------------------------------------------------------------------------------------


def started(clips, journal):
    arguments = ["transcribe", str(clips), "--journal", str(journal), "--threads", "1", "--batch-s", "2"]
    return subprocess.Popen([sys.executable, "-m", "mowa", *arguments], stderr=subprocess.PIPE, text=True)


def ended(process):
    process.communicate()
    return process.returncode


def begun(process, journal, size=0):
    """Wait until the journal is longer than `size`, or the run is over."""
    while process.poll() is None and not (journal.exists() and journal.stat().st_size > size):
        time.sleep(0.01)


def test_two_runs_never_write_beside_each_other(clips, tmp_path, unbroken):
    journal = tmp_path / "out.jsonl"
    first = started(clips, journal)
    begun(first, journal)
    os.kill(first.pid, signal.SIGSTOP)
    second = started(clips, journal)
    assert "another process is writing to it" in second.communicate()[1]
    assert second.returncode == 2
    os.kill(first.pid, signal.SIGCONT)
    begun(first, journal, journal.stat().st_size)
    first.send_signal(signal.SIGINT)
    said = first.communicate()[1]
    if first.returncode == 130:
        assert "the same command goes on" in said
    assert ended(started(clips, journal)) == 2
    assert texts(journal) == texts(unbroken)
    assert len(lines(journal)) == 25


@pytest.mark.slow
def test_killed_twenty_times_it_ends_with_what_an_unbroken_run_says(clips, tmp_path, unbroken):
    rng, journal, kills = random.Random(1), tmp_path / "out.jsonl", 0
    while kills < 20:
        if journal.exists() and len(lines_whole(journal)) > 22:
            assert ended(started(clips, journal)) == 2
            assert texts(journal) == texts(unbroken)
            assert len(lines(journal)) == 25
            journal.unlink()
        size = journal.stat().st_size if journal.exists() else 0
        process = started(clips, journal)
        if rng.random() < 0.8:
            begun(process, journal, size)  # into the midst of the writing
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert ended(started(clips, journal)) == 2
    assert texts(journal) == texts(unbroken)
    assert len(lines(journal)) == 25


def lines_whole(journal):
    return [line for line in journal.read_bytes().split(b"\n")[:-1] if line]
