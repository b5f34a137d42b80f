import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile

from mowa.cli import main
from mowa.data.manifests.examples import read_examples
from mowa.data.synthesize import synthesize
from mowa.data.text.normalize import normalize_text
from mowa.data.tts import plan as planning
from mowa.data.tts.engines import SpeechEngine, open_engine
from mowa.errors import DataError, MissingDependency

SENTENCES = ["Ala ma kota.", "Pada deszcz.", "Dzień dobry pani.", "Idziemy do lasu.", "To jest nowy dom."]

# Speaks a tone whose length depends on the sentence; some words make it fail. Every call is logged.
STAND_IN = """
import math, os, struct, sys, time, wave
wav, *options = sys.argv[1:]
text = sys.stdin.buffer.read().decode()
with open(os.environ["CALLS"], "a") as calls:
    calls.write(f"{os.getpid()} {options} {text.strip()}\\n")
time.sleep(float(os.environ.get("SLEEP", 0)))
if "crash" in text:
    sys.exit("loading\\nno such phoneme")
if "nothing" in text:
    sys.exit(0)
if "garbage" in text:
    open(wav, "w").write("no audio")
    sys.exit(0)
loud = 0 if "silence" in text else 8000
count = 200 if "short" in text else 8000 + 100 * len(text)
with wave.open(wav, "wb") as out:
    out.setparams((2, 2, 22050, 0, "NONE", ""))
    for t in range(count):
        value = int(loud * math.sin(t / 9))
        out.writeframes(struct.pack("<hh", value, value))
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A command template, and the file that logs its calls."""
    script = tmp_path / "say it.py"
    script.write_text(STAND_IN)
    calls = tmp_path / "calls"
    calls.touch()
    monkeypatch.setenv("CALLS", str(calls))
    return shlex.join([sys.executable, "-S", str(script)]) + " {wav}", calls


def speak(sentences, out, **options):
    return synthesize(sentences, out, language="pl", **options)


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main.main(["data", "synthesize", *map(str, arguments)])
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


def rows(manifest):
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def engine(*voices, rates=(None,), pitches=(None,)):
    return SpeechEngine("command", voices, rates, pitches, "utf-8", "say {wav}", lambda voice, wav: [])


# --- a corpus by espeak-ng --------------------------------------------------------------------------------------------


def test_corpus_by_espeak(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(SENTENCES) + "\n  \n" + SENTENCES[0] + "\n")
    out = tmp_path / "corpus"
    code, printed, errors = run(capsys, text, "--language", "pl", "-o", out, "--dev", "0.2")
    assert (code, errors) == (0, "")
    assert printed.startswith("train: 4 recordings, ")
    made = rows(out / "train.jsonl") + rows(out / "dev.jsonl")
    assert sorted(row["text"] for row in made) == sorted(SENTENCES)
    assert {row["language"] for row in made} == {"pl"}
    for row in made:
        samples, rate_hz = soundfile.read(out / row["audio"], dtype="float32")
        assert (rate_hz, samples.ndim) == (16_000, 1)
        assert len(samples) / rate_hz == pytest.approx(row["duration_s"], abs=1e-3)
        assert 0.3 < row["duration_s"] < 6
        assert np.abs(samples).max() > 0.05
        assert row["speaker"].partition("+")[0] == "pl"
        assert 120 <= row["rate"] <= 220
        assert 25 <= row["pitch"] <= 70
    assert {example.text for split in ("train", "dev") for example in read_examples(out, split)} == set(SENTENCES)
    assert not list(out.rglob("*.tmp"))
    with pytest.raises(SystemExit) as ended:
        main.main(["data", "check", str(out)])
    assert ended.value.code == 0
    assert "unreadable: none" in capsys.readouterr().out


def test_the_seed_determines_every_byte(tmp_path):
    for name, seed, processes in (("a", 1, 1), ("b", 1, 3), ("c", 2, 2)):
        speak(SENTENCES, tmp_path / name, clips=12, seed=seed, processes=processes)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a").keys() != contents(tmp_path / "c").keys()


def test_sample_rate(tmp_path):
    speak(SENTENCES[:1], tmp_path, sample_rate_hz=8_000)
    (file,) = (tmp_path / "audio").iterdir()
    assert soundfile.info(file).samplerate == 8_000


def test_double_brackets_are_not_phonemes():
    assert open_engine("espeak-ng", "pl").encode("a [[b]]") == b"a [ [b]]\n"


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_dev_has_its_own_sentences_and_voices():
    sentences = [f"Zdanie numer {number}" for number in range(300)]
    sentences += [f"zdanie, numer {number}!" for number in range(300)]
    voices = [f"v{number}" for number in range(20)]
    plan = planning.plan_clips(sentences, engine(*voices), "pl", dev=0.1, clips=1800)
    train, dev = ([clip for clip in plan if clip.split == split] for split in ("train", "dev"))
    assert len({clip.id for clip in plan}) == len(plan) == 1800
    assert 0.05 < len(dev) / len(plan) < 0.15
    assert not {normalize_text(clip.text) for clip in train} & {normalize_text(clip.text) for clip in dev}
    assert not {clip.voice.name for clip in train} & {clip.voice.name for clip in dev}
    assert {clip.voice.name for clip in plan} == set(voices)
    other_seed = planning.plan_clips(sentences, engine(*voices), "pl", dev=0.1, seed=5)
    assert {clip.text for clip in other_seed if clip.split == "dev"} == {clip.text for clip in dev}


@pytest.mark.parametrize("dev", [0, 0.001, 0.999])
def test_dev_is_never_everything_and_nothing_only_if_zero(dev):
    plan = planning.plan_clips(SENTENCES, engine("a", "b"), "pl", dev=dev)
    sizes = {split: sum(clip.split == split for clip in plan) for split in ("train", "dev")}
    assert sizes == {0: {"train": 5, "dev": 0}, 0.001: {"train": 4, "dev": 1}, 0.999: {"train": 1, "dev": 4}}[dev]


def test_the_order_of_sentences_does_not_matter():
    voices = engine("a", "b", "c", "d", rates=(1, 2, 3))
    there = {(clip.id, clip.text, clip.split) for clip in planning.plan_clips(SENTENCES, voices, "pl", clips=11)}
    again = {(clip.id, clip.text, clip.split) for clip in planning.plan_clips(SENTENCES[::-1], voices, "pl", clips=11)}
    assert there == again


def test_repeated_sentences_take_every_voice_before_one_again():
    voices = engine("a", "b", "c", rates=(1, 2), pitches=(5, 6))
    plan = planning.plan_clips(SENTENCES[:2], voices, "pl", clips=24, dev=0)
    for text in SENTENCES[:2]:
        assert len({clip.voice for clip in plan if clip.text == text}) == 12
    few = planning.plan_clips(SENTENCES[:2], voices, "pl", clips=6, dev=0)
    assert sorted(clip.voice.name for clip in few) == ["a", "a", "b", "b", "c", "c"]
    with pytest.raises(DataError, match=r"12 combinations .* for 2 sentences; ask for at most 24"):
        planning.plan_clips(SENTENCES[:2], voices, "pl", clips=25, dev=0)


def test_fewer_clips_than_sentences_are_drawn_by_the_seed():
    sentences = [f"Zdanie {number}" for number in range(100)]
    drawn = [
        {clip.text for clip in planning.plan_clips(sentences, engine("a"), "pl", clips=10, seed=s)} for s in (0, 1)
    ]
    assert [len(texts) for texts in drawn] == [10, 10]
    assert drawn[0] != drawn[1]
    assert drawn[0] != set(sentences[:10])


# --- any command, and what it cannot speak ----------------------------------------------------------------------------


def test_command_gets_sentence_voice_rate_and_no_shell(tmp_path, stand_in):
    command, calls = stand_in
    command += " --voice={voice} '$(rm -rf x); {rate}' {pitch}"
    report = speak(
        ["Zażółć gęślą jaźń"], tmp_path / "out", engine="command", command=command, voices=["{wav} b"], rates=[1.25],
        pitches=[3],
    )  # fmt: skip
    assert calls.read_text().partition(" ")[2] == "['--voice={wav} b', '$(rm -rf x); 1.25', '3'] Zażółć gęślą jaźń\n"
    (row,) = rows(report.splits["train"].manifest)
    assert (row["speaker"], row["rate"], row["pitch"]) == ("{wav} b", 1.25, 3)
    samples, _ = soundfile.read(tmp_path / "out" / row["audio"])
    assert samples.shape == (round((8000 + 100 * 18) / 22_050 * 16_000),)


def test_sentences_that_cannot_be_spoken_are_skipped_and_counted(tmp_path, capsys, stand_in):
    text = tmp_path / "text.txt"
    text.write_text("jeden\ncrash\nnothing\n\ngarbage\nsilence\nshort\nbell \a\n...\ndwa\n")
    code, printed, errors = run(
        capsys, text, "-l", "pl", "-o", tmp_path / "out", "--engine", "command", "--command", stand_in[0], "--dev", 0
    )
    assert code == 2
    assert printed.startswith("train: 2 recordings")
    for part in (
        r"line 2 (PYTHON) skipped: PYTHON ended with exit code 1: no such phoneme",
        r"line 3 (PYTHON) skipped: PYTHON wrote no audio",
        r"line 5 (PYTHON) skipped: PYTHON: the audio",
        r"line 6 (PYTHON) skipped: PYTHON wrote 0.40 s of silence",
        r"line 7 (PYTHON) skipped: PYTHON: the audio is too short",
        r"line 8 (PYTHON) skipped: the sentence contains the control character U+0007",
        r"line 9 (PYTHON) skipped: the sentence contains no letter or digit",
        r"7 recordings skipped",
    ):
        assert part.replace("PYTHON", os.path.basename(sys.executable)) in errors
    assert {row["text"] for row in rows(tmp_path / "out/train.jsonl")} == {"jeden", "dwa"}
    assert not (tmp_path / "out/dev.jsonl").exists()


def test_a_program_that_always_fails_ends_the_run_early(tmp_path, stand_in):
    sentences = [f"crash {number}" for number in range(100)]
    with pytest.raises(DataError, match=r"all of the first 20 recordings failed.*: no such phoneme"):
        speak(sentences, tmp_path / "out", engine="command", command=stand_in[0], processes=2)
    assert len(stand_in[1].read_text().splitlines()) < 30
    assert not list((tmp_path / "out").glob("*.jsonl"))
    with pytest.raises(DataError, match="all of the first 2 recordings failed"):
        speak(["crash 1", "crash 2"], tmp_path / "out", engine="command", command=stand_in[0])


def test_a_program_that_does_not_end_is_killed(tmp_path, stand_in, monkeypatch):
    monkeypatch.setattr("mowa.data.tts.speaker.TIMEOUT_S", 0.5)
    monkeypatch.setenv("SLEEP", "60")
    with pytest.raises(DataError, match="did not finish within 0 s"):
        speak(["raz"], tmp_path / "out", engine="command", command=stand_in[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"command": ""}, "needs --command"),
        ({"command": "cat"}, r"has no \{wav\}"),
        ({"command": "cat '{wav}"}, "No closing quotation"),
        ({"command": "cat {wav} {voice}"}, "--voices is needed"),
        ({"command": "cat {wav}", "rates": [1]}, r"--rates has no effect: --command has no \{rate\}"),
        ({"command": "cat {wav}", "pitches": [1]}, "--pitches has no effect"),
        ({"command": "cat {wav}", "encoding": "klingon"}, "unknown encoding 'klingon'"),
    ],
)
def test_templates_that_do_not_fit(options, message):
    with pytest.raises(DataError, match=message):
        open_engine("command", "pl", **options)


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_finished_recordings_are_not_made_again(tmp_path, stand_in):
    command, calls = stand_in
    options = {"engine": "command", "command": command, "dev": 0.3}
    first = speak(SENTENCES, tmp_path / "out", **options)
    assert (first.reused, len(calls.read_text().splitlines())) == (0, 5)
    whole = contents(tmp_path / "out")
    removed, emptied, damaged, *_ = sorted((tmp_path / "out/audio").iterdir())
    removed.unlink()
    emptied.write_bytes(b"")
    damaged.write_bytes(b"fLaC")
    (tmp_path / "out/audio/.x.flac.1234.tmp").touch()
    (tmp_path / "out/.work-left").mkdir()
    again = speak(SENTENCES, tmp_path / "out", **options)
    assert (again.reused, len(calls.read_text().splitlines())) == (2, 8)
    assert contents(tmp_path / "out") == whole
    assert not list((tmp_path / "out").glob(".work-*"))
    more = speak(["Nowe zdanie.", *SENTENCES], tmp_path / "out", **options)
    assert (more.reused, more.unlisted, len(calls.read_text().splitlines())) == (5, 0, 9)
    other = speak(SENTENCES, tmp_path / "out", **options, sample_rate_hz=8_000)
    assert (other.reused, other.unlisted) == (0, 6)


def test_a_killed_run_is_continued(tmp_path, stand_in, monkeypatch):
    command, calls = stand_in
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"zdanie {number}" for number in range(8)))
    out = tmp_path / "out"
    arguments = [text, "-l", "pl", "-o", out, "--engine", "command", "--command", command, "--processes", "1"]
    whole = [sys.executable, "-m", "mowa", "data", "synthesize", *map(str, arguments)]
    with subprocess.Popen(whole, env=os.environ | {"SLEEP": "0.3"}, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 60
        while len(list(out.glob("audio/*.flac"))) < 2 and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    finished = list(out.glob("audio/*.flac"))
    assert 2 <= len(finished) < 8
    assert all(soundfile.info(file).frames for file in finished)
    assert not list(out.glob("*.jsonl"))
    time.sleep(0.5)  # the program that was running ends by itself
    before = len(calls.read_text().splitlines())
    report = speak(text.read_text().splitlines(), out, engine="command", command=command)
    assert report.reused == len(finished)
    assert len(calls.read_text().splitlines()) - before == 8 - len(finished)
    assert sum(split.recordings for split in report.splits.values()) == 8
    assert not list(out.glob(".work-*"))


def test_an_interrupted_run_kills_its_programs(tmp_path, stand_in, monkeypatch):
    command, calls = stand_in

    def interrupt(done, total):
        monkeypatch.setenv("SLEEP", "60")
        until = time.monotonic() + 30
        while len(calls.read_text().splitlines()) < 2 and time.monotonic() < until:
            time.sleep(0.02)
        raise KeyboardInterrupt

    started = time.monotonic()
    monkeypatch.setenv("SLEEP", "0.1")
    failures = []
    options = {"processes": 1, "on_progress": interrupt, "on_failure": failures.append}
    with pytest.raises(KeyboardInterrupt):
        speak(SENTENCES, tmp_path / "out", engine="command", command=command, **options)
    assert time.monotonic() - started < 30
    assert not failures
    for line in calls.read_text().splitlines():
        with pytest.raises(ProcessLookupError):
            os.kill(int(line.split()[0]), 0)
    monkeypatch.setenv("SLEEP", "0")
    assert speak(SENTENCES, tmp_path / "out", engine="command", command=command).reused == 1


def test_two_runs_never_write_into_one_folder(tmp_path, stand_in):
    def second(done, total):
        with pytest.raises(DataError, match="in use by another"):
            speak(SENTENCES, tmp_path / "out", engine="command", command=stand_in[0])
        refused.append(done)

    refused = []
    speak(SENTENCES[:2], tmp_path / "out", engine="command", command=stand_in[0], on_progress=second)
    assert refused == [1, 2]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"language": "polish"}, r"no language 'polish' \(near: pl \(Polish\)\)"),
        ({"language": "en-xx"}, r"no language 'en-xx' \(near: .*en-gb"),
        ({"voices": ["adm"]}, r"no voice 'adm' \(near: adam"),
        ({"voices": ["pl+f9"]}, r"no voice 'pl\+f9' \(near: .*f1"),
        ({"rates": [40]}, "--rates 40 is out of range: 80 to 450"),
        ({"pitches": [100]}, "--pitches 100 is out of range"),
        ({"command": "say {wav}"}, "--command needs --engine command"),
        ({"encoding": "latin1"}, "espeak-ng reads UTF-8"),
        ({"engine": "mbrola"}, "unknown engine 'mbrola'; choose one of espeak-ng"),
        ({"dev": 1}, "dev is 1"),
    ],
)
def test_unknown_languages_voices_and_values(tmp_path, options, message):
    with pytest.raises(DataError, match=message) as raised:
        synthesize(SENTENCES, tmp_path / "out", **({"language": "pl"} | options))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_languages_and_voices_by_their_names():
    assert open_engine("espeak-ng", "pl", voices=["f1", "pl", "pl+Mr serious"]).voices == (
        "pl+f1", "pl", "pl+Mr serious"
    )  # fmt: skip
    assert open_engine("espeak-ng", "zh", voices=["f1"]).voices == ("cmn+f1",)  # an alias takes no variant
    every = open_engine("espeak-ng", "pl").voices
    assert len(every) == len(set(every)) > 50
    assert not {"pl+whisper", "pl+robosoft", "pl+croak"} & set(every)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "espeak-ng"}, "espeak-ng is not installed: apt-get install espeak-ng"),
        ({"engine": "festival"}, "text2wave is not installed: apt-get install festival"),
        ({"engine": "command", "command": "piper {wav}"}, "piper is not installed: install it, or give its path"),
    ],
)
def test_missing_programs(tmp_path, monkeypatch, options, message):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependency, match=message):
        speak(SENTENCES, tmp_path / "out", **options)


def test_text_that_cannot_be_read(tmp_path, capsys, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_bytes("dobrze\nźle\n".encode("iso-8859-2"))
    code, _, errors = run(capsys, text, "-l", "pl", "-o", tmp_path / "out")
    assert (code, f"mowa: {text}:2: " in errors, "UTF-8" in errors) == (2, True, True)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n \n")))
    code, _, errors = run(capsys, "-", "-l", "pl", "-o", tmp_path / "out")
    assert (code, errors) == (2, "mowa: there are no sentences; write one per line\n")
    code, _, errors = run(capsys, text, "-l", "pl", "-o", tmp_path / "out", "--rates", "quick")
    assert code == 2
    assert "'quick' is not a list of numbers such as 120,160,200" in errors


def test_standard_input(tmp_path, capsys, monkeypatch, stand_in):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("żółw\nłoś\n".encode())))
    arguments = ["-", "-l", "pl", "-o", tmp_path / "out", "--engine", "command", "--command", stand_in[0]]
    code, printed, _ = run(capsys, *arguments, "--dev", "0")
    assert code == 0
    assert "train: 2 recordings, 0.0 min, 1 voice → " in printed


def test_a_folder_that_cannot_be_written(tmp_path, stand_in):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="out cannot be written: Not a directory"):
        speak(SENTENCES, tmp_path / "file/out", engine="command", command=stand_in[0])


# --- festival ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def festival(tmp_path, monkeypatch, stand_in):
    """Programs that behave as festival's do: exit code 0 also after an error."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "festival").write_text("#!/bin/sh\necho '(kal_diphone czech_dita)'\n")
    (programs / "text2wave").write_text(
        f"""#!{sys.executable} -S
import os, subprocess, sys
data = sys.stdin.buffer.read()
with open({str(tmp_path / "text2wave.log")!r}, "ab") as log:
    log.write(repr((sys.argv[1:-1], data)).encode() + b"\\n")
if b"lisp" in data:
    sys.exit(print("SIOD ERROR: unbound variable : lisp", "closing a file left open", sep="\\n", file=sys.stderr))
subprocess.run([sys.executable, "-S", {str(tmp_path / "say it.py")!r}, sys.argv[-1]], input=b"tone", check=True)
"""
    )
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return tmp_path / "text2wave.log"


def test_festival(tmp_path, festival):
    sentences = ["Příliš žluťoučký kůň", "Zażółć", "lisp"]
    failures = []
    options = {"engine": "festival", "voices": ["czech_dita"], "rates": [1.25], "on_failure": failures.append}
    report = synthesize(sentences, tmp_path / "out", language="cs", dev=0, **options)
    assert "Příliš žluťoučký kůň".encode("iso-8859-2") + b"\n" in [
        eval(line)[1] for line in festival.read_text().splitlines()
    ]
    command = ["-eval", "(voice_czech_dita)", "-eval", "(Parameter.set 'Duration_Stretch 0.8000)", "-o"]
    assert eval(festival.read_text().splitlines()[0])[0] == command
    assert {failure.text: failure.reason for failure in failures} == {
        "lisp": "text2wave failed: SIOD ERROR: unbound variable : lisp"
    }
    assert report.splits["train"].recordings == 2  # ISO-8859-2 has the Polish letters, too


def test_festival_names_its_encoding(tmp_path, festival):
    options = {"engine": "festival", "voices": ["kal_diphone"]}
    report = synthesize(["naïve", "plain"], tmp_path / "out", language="en-us", dev=0, **options)
    (failure,) = report.failures
    assert failure.reason == "'ï' is not in ASCII, the encoding that the voice reads"
    with pytest.raises(DataError, match="'ł' is not in ISO-8859-1, the encoding"):
        synthesize(["miło"], tmp_path / "pl", language="pl", encoding="iso-8859-1", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "festival needs --voices; installed: czech_dita, kal_diphone"),
        ({"voices": ["czech_ditta"]}, r"no voice 'czech_ditta' \(near: czech_dita\)"),
        ({"voices": ["czech_dita"], "pitches": [1]}, "no common pitch setting"),
        ({"voices": ["czech_dita"], "rates": [160]}, "--rates 160 is out of range: 0.25 to 4"),
    ],
)
def test_festival_options_that_do_not_fit(festival, options, message):
    with pytest.raises(DataError, match=message):
        open_engine("festival", "cs", **options)
