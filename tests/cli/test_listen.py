"""`mowa listen`: output formats, how it ends, errors, latency and the terminal."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from mowa.cli import listen, live_display
from mowa.cli.main import main
from mowa.data import audio
from mowa.data.inputs.source import AudioBlock, AudioChunk, AudioSource
from mowa.engines import streaming
from mowa.engines.streaming import StreamSession, TimedSegment
from mowa.errors import AudioError
from mowa.types import Segment, Word

ROOT = Path(__file__).parents[2]
MODEL = ["--model", str(ROOT / "tests" / "assets" / "micro"), "--threads", "1", "--dtype", "float32"]
RATE_HZ = 16_000
KEYS = ["type", "text", "start_s", "end_s", "confidence", "end_of_segment", "stability", "words"]
KEYS += ["processed_s", "latency_s"]


@pytest.fixture(scope="module")
def sound():
    """Eight seconds of speech."""
    return audio.load_audio(ROOT / "examples" / "dzien-dobry.flac")[: 8 * RATE_HZ]


@pytest.fixture
def file(tmp_path, sound):
    soundfile.write(tmp_path / "said.wav", sound, RATE_HZ)
    return tmp_path / "said.wav"


@pytest.fixture
def run(capsys):
    def call(*arguments, model=MODEL):
        with pytest.raises(SystemExit) as end:
            main(["listen", *map(str, arguments), *model])
        return end.value.code, *capsys.readouterr()

    return call


def finals(out):
    events = [json.loads(line) for line in out.splitlines()]
    return " ".join(event["text"] for event in events if event["type"] == "final" and event["text"])


# --- output -----------------------------------------------------------------------------------------------------------


def test_json_events(run, file):
    code, out, err = run(file, "--format", "json")
    assert (code, err) == (0, "")
    events = [json.loads(line) for line in out.splitlines()]
    assert {event["type"] for event in events} == {"final", "partial"}
    until_s = processed_s = 0.0
    for event in events:
        assert list(event) == KEYS
        assert event["processed_s"] >= processed_s
        processed_s = event["processed_s"]
        assert event["text"] == " ".join(word["text"] for word in event["words"])
        assert (event["latency_s"] is None) == (not event["words"])
        assert event["latency_s"] is None or event["latency_s"] >= 0
        for word in event["words"]:
            assert list(word) == ["text", "start_s", "end_s", "confidence"]
            assert until_s <= word["start_s"] <= word["end_s"] <= processed_s + 0.001
        if event["type"] == "final" and event["words"]:
            until_s = event["end_s"]
    assert events[-1]["processed_s"] == 8.0
    assert [event for event in events if event["type"] == "final"][-1]["end_of_segment"]
    assert "zapisuje" in finals(out)


def test_every_source_gives_the_same_words(run, file, sound, tmp_path, monkeypatch):
    code, plain, err = run(file)
    assert (code, err) == (0, "")
    assert len(plain.splitlines()) == 1
    (tmp_path / "said.raw").write_bytes((sound * 32768).round().astype("<i2").tobytes())
    outs = [run(file, "--realtime", "--speed", 20, "--format", "json")]
    for name in ("said.raw", "said.wav"):
        with subprocess.Popen(["cat", tmp_path / name], stdout=subprocess.PIPE) as cat:
            monkeypatch.setattr(sys, "stdin", cat.stdout)
            outs.append(run("-", "--format", "json"))
    for code, out, err in outs:
        assert (code, err) == (0, "")
        assert finals(out) == plain.strip()


def test_text_is_one_line_per_segment(run, sound, monkeypatch):
    pause = np.zeros(RATE_HZ, np.float32)
    plays(monkeypatch, [sound[: 2 * RATE_HZ], pause, sound[2 * RATE_HZ : 5 * RATE_HZ], pause])
    code, out, err = run("--min-silence-s", 0.5)
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 2


# --- how it ends ------------------------------------------------------------------------------------------------------


def plays(monkeypatch, pieces, *, after=None, ends=False, lost_s=0.0):
    """Replace the source by these pieces; `lost_s` is lost before each but the first."""

    def sounds(rate_hz):
        for number, piece in enumerate(pieces):
            for at in range(0, len(piece), 512):
                lost = lost_s if number and not at else 0.0
                yield AudioChunk(piece[at : at + 512], RATE_HZ, time.monotonic(), lost)
        if after is not None:
            yield from after()

    monkeypatch.setattr(
        listen, "_open_source", lambda *_: AudioSource("microphone", sounds, pausable=True, finite=ends)
    )


@pytest.fixture(scope="module")
def expected(sound):
    """The transcript of the first five seconds."""
    from mowa.engines import streaming
    from mowa.engines.settings import EngineSpec
    from mowa.engines.transcription import load_engine

    stream = streaming.stream(load_engine(EngineSpec(MODEL[1], dtype="float32", threads=1)).engine)
    segments = [*stream.feed(sound[: 5 * RATE_HZ]), *stream.close()]
    return " ".join(segment.text for segment in segments if segment.is_final and segment.text)


@pytest.fixture
def default_sigint():
    """Handle SIGINT as at a terminal, also when the tests run in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_sigint")
@pytest.mark.parametrize(("ends", "signalled", "code"), [(False, signal.SIGINT, 0), (True, signal.SIGTERM, 130)])
def test_a_signal_stops_the_source_and_the_rest_is_transcribed(
    run, sound, monkeypatch, expected, ends, signalled, code
):
    before = signal.getsignal(signalled)

    def after():
        os.kill(os.getpid(), signalled)
        while True:
            time.sleep(0.01)
            yield AudioChunk(np.zeros(0, np.float32), RATE_HZ, time.monotonic())

    plays(monkeypatch, [sound[: 5 * RATE_HZ]], after=after, ends=ends)
    assert (code, expected, "") == (lambda code, out, err: (code, finals(out), err))(*run("--format", "json"))
    assert signal.getsignal(signalled) is before


@pytest.mark.usefixtures("default_sigint")
def test_a_second_signal_stops_at_once():
    ended = []
    with listen.stop_on_signal(types.SimpleNamespace(stop=lambda: ended.append(True))) as stopped:
        signal.raise_signal(signal.SIGINT)
        assert (stopped, ended) == ([signal.SIGINT], [True])
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_audio_before_a_failure_is_transcribed(run, sound, monkeypatch, expected):
    def after():
        raise AudioError("microphone: gives no sound any more")
        yield

    plays(monkeypatch, [sound[: 5 * RATE_HZ]], after=after)
    code, out, err = run("--format", "json")
    assert (code, err) == (2, "mowa: microphone: gives no sound any more\n")
    assert finals(out) == expected
    assert run()[1].strip() == expected


def test_lost_audio_is_reported_once_and_shifts_times(run, sound, monkeypatch):
    plays(monkeypatch, [sound[: 3 * RATE_HZ], sound[: 3 * RATE_HZ]], lost_s=100.0)
    code, out, err = run("--format", "json")
    assert code == 0
    assert err.startswith("mowa: 100.0 s of audio were lost: ")
    assert err.count("\n") == 1
    events = [json.loads(line) for line in out.splitlines() if '"final"' in line]
    ends = [event["end_s"] for event in events if event["words"]]
    assert min(end for end in ends if end > 50) > 103
    assert max(end for end in ends if end < 50) <= 3
    assert events[-1]["processed_s"] == 106.0


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
def test_a_process_with_an_open_pipe_is_stopped(file, sound, background):
    """Ctrl-C stops it in the foreground. A shell starts background jobs with SIGINT ignored: SIGTERM stops those."""
    soundfile.write(file, np.repeat(sound, 2), 2 * RATE_HZ)  # so that audio is resampled when it is stopped
    handler = "SIG_IGN" if background else "default_int_handler"
    code = (
        f"import signal, sys; signal.signal(signal.SIGINT, signal.{handler})\n"
        "from mowa.cli.main import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "listen", "-", "--format", "json", *MODEL]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(file.read_bytes()[: -2 * RATE_HZ])  # it waits for the rest
        process.stdin.flush()
        first = process.stdout.readline()  # comes while the pipe is open
        process.send_signal(signal.SIGINT)
        if background:
            time.sleep(0.5)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
        rest, err = process.stdout.read(), process.stderr.read()
        process.stdin.close()
    assert (process.returncode, err) == (130, b"")
    assert json.loads(first)["words"]
    assert json.loads(rest.splitlines()[-1])


# --- errors -----------------------------------------------------------------------------------------------------------


def test_every_error_is_one_line(run, file, monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    for arguments, line in (
        (["lost.wav"], "lost.wav: does not exist. Check the spelling."),
        (["lost.wav", "--realtime"], "lost.wav: does not exist. Check the spelling."),
        (["gopher://x/y"], "gopher://x/y: unsupported URL scheme"),
        ([], "microphones need sounddevice: pip install 'mowa[live]'"),
        (["--list-devices"], "microphones need sounddevice"),
        (["--realtime"], "--realtime needs an audio file"),
        (["-", "--realtime"], "--realtime needs an audio file"),
        ([file, "--speed", 2], "--speed needs --realtime"),
        ([file, "--sample-rate", 8000], "--sample-rate is for raw samples"),
        (
            [file, "--encoding", "mulaw"],
            "--encoding is for raw samples on standard input",
        ),
        ([file, "--input-device", 1], "--input-device selects a microphone"),
        ([file, "--mode", "cached"], ""),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith(f"mowa: {line}")
        assert err.count("\n") == 1


def test_a_damaged_file_is_transcribed_up_to_the_damage(run, file, sound):
    soundfile.write(file, np.concatenate([sound, [np.nan]]), RATE_HZ, subtype="FLOAT")
    code, out, err = run(file)
    assert code == 2
    assert "not a number" in err
    assert err.count("\n") == 1
    assert "zapisuje" in out


def test_microphones_are_listed(run, monkeypatch, capsys):
    there = [
        {"name": "Speaker", "max_input_channels": 0, "default_samplerate": 48_000.0},
        {"name": "Built-in", "max_input_channels": 2, "default_samplerate": 44_100.0},
    ]
    module = types.SimpleNamespace(
        default=types.SimpleNamespace(device=(1, 0)), query_devices=lambda: there, PortAudioError=OSError
    )
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    code, out, err = run("--list-devices", model=[])
    assert (code, err) == (0, "")
    assert out.splitlines()[1].split() == ["1", "Built-in", "2", "44100", "Hz", "default"]
    there.pop()
    assert run("--list-devices", model=[])[2] == "mowa: no microphone found\n"


# --- times ------------------------------------------------------------------------------------------------------------


def segment(text, *, end_s=1.0, final=True, ends=False):
    words = tuple(Word(word, 0.0, end_s, 1.0) for word in text.split())
    return Segment(text, 0.0, end_s, words, is_final=final, is_endpoint=ends)


def test_latency_counts_from_the_time_of_recording(monkeypatch):
    now = types.SimpleNamespace(monotonic=lambda: 50.0)
    monkeypatch.setattr(streaming, "time", now)
    stream = types.SimpleNamespace(
        received_s=0.0, feed=None, flush=lambda: [], close=lambda: [segment("end", end_s=2.5)]
    )
    session = StreamSession(stream)

    def feed(samples):
        stream.received_s += len(samples) / RATE_HZ
        return [segment("one", end_s=0.5), segment("", end_s=1.0)]

    stream.feed = feed
    one_second = np.zeros(RATE_HZ, np.float32)
    blocks = [AudioBlock(one_second, recorded_s) for recorded_s in (40.0, 41.0, 47.0)]
    *found, last = session.events(blocks)
    assert [[event.latency_s for event in events] for events in found] == [[10.0, None], [10.0, None], [10.0, None]]
    assert [event.latency_s for event in last] == [6.0]  # 2.5 s of it were recorded between 41 and 47
    assert [event.processed_s for event in last] == [3.0]


def test_status():
    stream = types.SimpleNamespace(received_s=42.4)
    session = StreamSession(stream)
    session.compute_s = 4.664
    assert listen.format_status(session) == "0:42 processed · RTF 0.11"
    session.latency_s, stream.received_s = 0.338, 3700.0
    assert listen.format_status(session) == "1:01:40 processed · RTF 0.00 · 0.34 s latency"
    session.lost_s = 20.0
    assert listen.format_status(session).endswith("1:02:00 processed · RTF 0.00 · 0.34 s latency · 20.0 s lost")


# --- the terminal -----------------------------------------------------------------------------------------------------


class Emulator:
    """Emulates the escape codes that LiveDisplay writes."""

    def __init__(self, width):
        self.width, self.rows, self.at, self.dim = width, [""], 0, False
        self.dimmed = ""

    def write(self, text):
        for code in re.findall(r"\x1b\[\d?[A-Zm]|.|\n|\r", text):
            if code == "\n":
                self.at += 1
                self.rows += [""] * (self.at == len(self.rows))
            elif code == "\x1b[2K":
                self.rows[self.at] = ""
            elif code == "\x1b[1A":
                self.at -= 1
                assert self.at >= 0
            elif code in ("\x1b[2m", "\x1b[0m"):
                self.dim = code == "\x1b[2m"
            elif code != "\r":
                self.rows[self.at] += code
                self.dimmed += code if self.dim else ""
                assert live_display.display_width(self.rows[self.at]) < self.width


words = st.lists(st.text(alphabet="aąż字e\u0301", min_size=1, max_size=14), max_size=4).map(" ".join)
feeds = st.lists(st.lists(st.tuples(words, st.sampled_from(["final", "ends", "partial"])), max_size=3), max_size=9)


@settings(deadline=None, max_examples=60)
@given(feeds, st.integers(3, 30))
def test_final_words_stay_on_the_terminal(fed, width):
    with pytest.MonkeyPatch.context() as patch:
        emulator = Emulator(width)
        patch.setattr(live_display.click, "echo", lambda text, nl: emulator.write(text))
        patch.setattr(live_display.shutil, "get_terminal_size", lambda: os.terminal_size((width, 24)))
        shown, final = live_display.LiveDisplay("waiting"), []
        for feed in fed:
            segments = [segment(text, final=kind != "partial", ends=kind == "ends") for text, kind in feed]
            shown.update(segments, "0:42 processed")
            final += [segment.text for segment in segments if segment.is_final]
            open_ = segments[-1].text if segments and not segments[-1].is_final else ""
            everything = "".join(emulator.rows).replace(" ", "")
            if live_display.display_width(open_) < width - 1:
                assert open_.replace(" ", "") in everything
            assert everything.startswith("".join(final).replace(" ", ""))
        shown.close()
    assert "".join(emulator.rows).replace(" ", "") == "".join(final).replace(" ", "")


def test_partial_words_are_dim_and_final_ones_are_not(monkeypatch):
    emulator = Emulator(40)
    monkeypatch.setattr(live_display.click, "echo", lambda text, nl: emulator.write(text))
    monkeypatch.setattr(live_display.shutil, "get_terminal_size", lambda: os.terminal_size((40, 24)))
    shown = live_display.LiveDisplay("waiting")
    emulator.dimmed = ""
    shown.update([segment("ala ma"), segment("kota i psa", final=False)], "status")
    assert emulator.rows == ["ala ma kota i psa", "status"]
    assert emulator.dimmed == "kota i psastatus"
    shown.update([segment("kota", ends=True), segment("", final=False)], "later")
    assert emulator.rows == ["ala ma kota", "", "later"]
    shown.close()
    assert emulator.rows == ["ala ma kota", "", ""]


def unspaced(text, *, final=True, ends=False, follows=True):
    words = tuple(Word(one, 0.0, 1.0, 1.0, space_before=not (at or follows)) for at, one in enumerate(text))
    return Segment(text, 0.0, 1.0, words, is_final=final, is_endpoint=ends)


def test_words_of_languages_without_spaces_are_shown_without(monkeypatch, capsys):
    emulator = Emulator(40)
    monkeypatch.setattr(live_display.shutil, "get_terminal_size", lambda: os.terminal_size((40, 24)))
    events = [unspaced("你", follows=False), unspaced("好"), unspaced("世", final=False)]
    with monkeypatch.context() as patch:
        patch.setattr(live_display.click, "echo", lambda text, nl: emulator.write(text))
        live_display.LiveDisplay("waiting").update(events, "status")
    assert emulator.rows == ["你好世", "status"]
    writer = listen.LineWriter()
    timed = [TimedSegment(event, 1.0, None) for event in (*events[:2], unspaced("界", ends=True))]
    writer.write(timed, None)
    listen.JsonWriter().write(timed[1:2], None)
    line, event = capsys.readouterr().out.splitlines()
    assert line == "你好界"
    assert json.loads(event)["words"][0]["space_before"] is False
