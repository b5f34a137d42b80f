"""`mowa transcribe --results` and `mowa results`: jobs resume after any interruption, with one record per recording."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile

import mowa
from mowa.cli.main import main
from mowa.data import audio
from mowa.io.hub import SAMPLE_CLIP as SAMPLE

# as in the foreground, also when the tests run in the background with SIGINT ignored
SIGINT_MOWA = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from mowa.cli.main import main; main(sys.argv[1:])"
)


def run(*arguments, capsys=None):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()][1:]


def texts(path):
    return {row["id"]: row.get("text", row.get("error")) for row in lines(path)}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Parts of the sample, of 1 to 3 s, in two formats, and one file that is not audio."""
    folder = tmp_path_factory.mktemp("clips")
    sample, rng = audio.load_audio(SAMPLE), random.Random(0)
    for number in range(24):
        start, length = rng.randrange(len(sample) - 48_000), rng.randrange(16_000, 48_000)
        suffix = ".flac" if number % 2 else ".wav"
        soundfile.write(folder / f"clip-{number:02}{suffix}", sample[start : start + length], 16_000)
    (folder / "clip-99.mp3").write_bytes(b"ID3 nothing of the kind")
    return folder


@pytest.fixture(scope="module")
def uninterrupted(clips, tmp_path_factory):
    path = tmp_path_factory.mktemp("uninterrupted") / "out.jsonl"
    assert run("transcribe", clips, "--results", path, "--threads", 1) == 2
    return path


def test_every_recording_has_one_record(clips, uninterrupted):
    found = lines(uninterrupted)
    assert sorted(row["id"] for row in found) == sorted(file.stem for file in clips.iterdir())
    assert [row["id"] for row in found if "error" in row] == ["clip-99"]
    single = mowa.transcribe(clips / "clip-00.wav", "pl-tiny")
    assert texts(uninterrupted)["clip-00"] == single.text


def test_a_finished_job_is_not_repeated_and_failures_are_retried(clips, uninterrupted, tmp_path, capsys):
    path = tmp_path / "out.jsonl"
    before = uninterrupted.read_bytes()
    path.write_bytes(before)
    assert run("transcribe", clips, "--results", path, "--threads", 1) == 2
    assert path.read_bytes() == before
    assert "25 recordings are already in it" in capsys.readouterr().err
    assert run("transcribe", clips, "--results", path, "--retry-failed") == 2
    assert sorted(path.read_bytes().splitlines()) == sorted(before.splitlines())


def test_shards_together_are_the_whole_corpus(clips, uninterrupted, tmp_path):
    parts = [tmp_path / f"{number}.jsonl" for number in (1, 2, 3)]
    for number, part in enumerate(parts, 1):
        run("transcribe", clips, "--results", part, "--shard", f"{number}/3", "--threads", 1)
    assert max(len(lines(part)) for part in parts) == 9
    assert run("results", "merge", *parts, "--out", tmp_path / "all.jsonl") == 0
    assert texts(tmp_path / "all.jsonl") == texts(uninterrupted)
    assert len(lines(tmp_path / "all.jsonl")) == 25


def test_other_settings_and_invalid_options_are_refused(clips, uninterrupted, tmp_path, capsys):
    before = uninterrupted.read_bytes()
    assert run("transcribe", clips, "--results", uninterrupted, "--window-s", 9) == 2
    assert "window_s: 20.0 → 9.0" in capsys.readouterr().err
    for option, value, message in (
        ("--shard", "3/2", "expected I/N"),
        ("--column", "audio", "expected ROLE=NAME"),
        ("--channels", "left", "expected mix, split"),
        ("--out", tmp_path, "mowa results export"),
    ):
        assert run("transcribe", clips, "--results", uninterrupted, option, value) == 2
        assert message in capsys.readouterr().err
    assert run("transcribe", clips, "--shard", "1/2") == 2
    assert "need --results FILE" in capsys.readouterr().err
    assert uninterrupted.read_bytes() == before


def test_logs_are_shown_and_exported(clips, uninterrupted, tmp_path, capsys):
    assert run("results", "show", uninterrupted) == 0
    shown = capsys.readouterr().out
    assert "pl-tiny" in shown
    assert "24, 0.0" in shown
    assert "1 × is not audio" in shown
    assert run("results", "export", uninterrupted, "--format", "srt", "--out", tmp_path / "srt") == 0
    assert len(list((tmp_path / "srt").glob("*.srt"))) == 24
    assert "skipped 1 failed recordings" in capsys.readouterr().err
    assert run("results", "export", uninterrupted) == 0
    exported = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert exported["clip-03"] == texts(uninterrupted)["clip-03"]
    assert run("results", "export", uninterrupted, "--format", "vtt") == 2
    assert "name a folder" in capsys.readouterr().err


def test_channels_are_transcribed_separately(tmp_path, capsys):
    sample = audio.load_audio(SAMPLE)
    half = len(sample) // 2
    silence = np.zeros(half, np.float32)
    soundfile.write(
        tmp_path / "talk.wav",
        np.stack([np.r_[sample[:half], silence], np.r_[silence, sample[half:]][: 2 * half]], 1),
        16_000,
    )
    soundfile.write(tmp_path / "same.wav", np.stack([sample, sample], 1), 16_000)
    transcripts = []
    for name in ("talk.wav", "same.wav"):
        assert run("transcribe", tmp_path / name, "--channels", "split", "--format", "json", "--threads", 1) == 0
        transcripts.append(json.loads(capsys.readouterr().out))
    assert [segment["channel"] for segment in transcripts[0]["segments"]] == sorted(
        segment["channel"] for segment in transcripts[0]["segments"]
    )
    assert {segment["channel"] for segment in transcripts[0]["segments"]} == {0, 1}
    assert "channel" not in transcripts[1]["segments"][0]
    assert transcripts[1]["text"] == mowa.transcribe(SAMPLE, threads=1).text
    assert run("transcribe", tmp_path / "talk.wav", "--channels", "1,7") == 2
    assert "has no channel 7: it has 2 channels" in capsys.readouterr().err


# --- interrupted ------------------------------------------------------------------------------------------------------


def started(clips, path):
    arguments = ["transcribe", str(clips), "--results", str(path), "--threads", "1", "--batch-s", "2"]
    return subprocess.Popen([sys.executable, "-c", SIGINT_MOWA, *arguments], stderr=subprocess.PIPE, text=True)


def ended(process):
    process.communicate()
    return process.returncode


def wait_for_output(process, path, size=0):
    """Wait until the log is longer than `size`, or the process has ended."""
    while process.poll() is None and not (path.exists() and path.stat().st_size > size):
        time.sleep(0.01)


def test_two_runs_do_not_write_to_one_log(clips, tmp_path, uninterrupted):
    path = tmp_path / "out.jsonl"
    first = started(clips, path)
    wait_for_output(first, path)
    os.kill(first.pid, signal.SIGSTOP)
    second = started(clips, path)
    assert "another process is writing to it" in second.communicate()[1]
    assert second.returncode == 2
    os.kill(first.pid, signal.SIGCONT)
    wait_for_output(first, path, path.stat().st_size)
    first.send_signal(signal.SIGINT)
    err = first.communicate()[1]
    if first.returncode == 130:
        assert "rerun the command to resume" in err
    assert ended(started(clips, path)) == 2
    assert texts(path) == texts(uninterrupted)
    assert len(lines(path)) == 25


@pytest.mark.slow
def test_killed_twenty_times_it_ends_like_an_uninterrupted_run(clips, tmp_path, uninterrupted):
    rng, path, kills = random.Random(1), tmp_path / "out.jsonl", 0
    while kills < 20:
        if path.exists() and len(lines_whole(path)) > 22:
            assert ended(started(clips, path)) == 2
            assert texts(path) == texts(uninterrupted)
            assert len(lines(path)) == 25
            path.unlink()
        size = path.stat().st_size if path.exists() else 0
        process = started(clips, path)
        if rng.random() < 0.8:
            wait_for_output(process, path, size)  # while it writes
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert ended(started(clips, path)) == 2
    assert texts(path) == texts(uninterrupted)
    assert len(lines(path)) == 25


def lines_whole(path):
    return [line for line in path.read_bytes().split(b"\n")[:-1] if line]
