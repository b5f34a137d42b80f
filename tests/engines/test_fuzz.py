"""Broken recordings by the hundred through the runner: a line for each, and never a crash, a hang or another error."""

import json
import random
import threading

import numpy as np
import pytest
import soundfile

import mowa
from mowa.engines import batch
from mowa.engines.results import ResultsFile
from mowa.engines.settings import TranscriptionSettings
from mowa.errors import DataError
from mowa.types import Example
from tests.checkpoints import tiny
from tests.data.audio.test_reader import ENCODERS, encode, tone

CONTAINERS = ["a.wav", "a.flac", "a.ogg", "a.mp3", "a.m4a", "a.webm", "a.opus", "a.aiff"]


def whole(folder, name):
    path = folder / name
    if name in ENCODERS:
        encode(path, tone(0.7, 48_000), 48_000, ENCODERS[name])
    else:
        soundfile.write(path, tone(0.7), 16_000)
    return path.read_bytes()


def broken(data, rng):
    """A header mutated, anything mutated, cut off, a stretch doubled or left out, or random bytes behind the magic."""
    data = bytearray(data)
    match rng.randrange(6):
        case 0 | 1:
            reach = 200 if rng.random() < 0.5 else len(data)
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(min(reach, len(data)))] = rng.randrange(256)
        case 2:
            del data[rng.randrange(len(data)) :]
        case 3:
            start = rng.randrange(len(data))
            data[start:start] = data[start : start + rng.randrange(2000)]
        case 4:
            start = rng.randrange(len(data))
            del data[start : start + rng.randrange(2000)]
        case 5:
            data[rng.choice([4, 12, 40]) :] = rng.randbytes(rng.randrange(4000))
    return bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTAINERS)
def test_two_hundred_broken_files_of_a_container(tmp_path, name):
    engine = mowa.open_engine(mowa.load(str(tiny(tmp_path / "net"))), device="cpu", dtype="float32", threads=1)
    rng, original = random.Random(name), whole(tmp_path, name)
    folder = tmp_path / "broken"
    folder.mkdir()
    examples = []
    for number in range(200):
        file = folder / f"{number}-{name}"
        file.write_bytes(broken(original, rng))
        examples.append(Example(str(number), str(file), "", 0.0))
    settings = TranscriptionSettings(vad_threshold=0.0)
    with ResultsFile.open(tmp_path / "j.jsonl", batch.build_header(engine, settings)) as journal:
        counts = batch.transcribe_corpus(examples, engine, settings, journal, decode_threads=2)
    rows = [json.loads(line) for line in (tmp_path / "j.jsonl").read_text().splitlines()][1:]
    assert sorted(int(row["id"]) for row in rows) == list(range(200))
    assert counts["done"] + counts["failed"] == 200
    assert counts["failed"] > 20
    assert all(("error" in row) != ("text" in row) for row in rows)
    assert all("\n" not in row.get("error", "") for row in rows)


def test_what_crashes_its_decoder_is_a_line_when_the_run_goes_on(tmp_path, monkeypatch):
    """A run that died is suspected of its recordings; the child that decodes them dies in its place."""
    soundfile.write(tmp_path / "good.wav", tone(0.5), 16_000)
    soundfile.write(tmp_path / "evil.wav", tone(0.5), 16_000)
    engine = mowa.open_engine(mowa.load(str(tiny(tmp_path / "net"))), device="cpu", dtype="float32", threads=1)
    settings, path = TranscriptionSettings(vad_threshold=0.0), tmp_path / "j.jsonl"
    header = batch.build_header(engine, settings)
    book = ResultsFile.open(path, header)
    for name in ("good", "evil"):
        book.mark_started(name)
    book._file.close()  # killed: no mark was taken back
    real = batch.subprocess.run

    def run(command, **how):
        if command[-1].endswith("evil.wav"):
            command = [command[0], "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"]
        return real(command, **how)

    monkeypatch.setattr(batch.subprocess, "run", run)
    examples = [Example(name, str(tmp_path / f"{name}.wav"), "", 0.0) for name in ("good", "evil", "new")]
    with ResultsFile.open(path, header) as book:
        assert book.suspect_ids == {"good", "evil"}
        batch.transcribe_corpus(examples, engine, settings, book)
    rows = {row["id"]: row for row in map(json.loads, path.read_text().splitlines()[1:])}
    assert "crashes its decoder (signal 11)" in rows["evil"]["error"]
    assert "text" in rows["good"]
    assert "does not exist" in rows["new"]["error"]
    assert not (tmp_path / ".j.jsonl.begun").exists()


def test_decoding_ahead_in_many_threads_changes_no_batch(tmp_path):
    engine = mowa.open_engine(mowa.load(str(tiny(tmp_path / "net"))), device="cpu", dtype="float32", threads=1)
    rng = np.random.default_rng(0)
    examples = []
    for number in range(30):
        soundfile.write(tmp_path / f"{number}.wav", tone(rng.uniform(0.3, 2.5)), 16_000)
        examples.append(Example(str(number), str(tmp_path / f"{number}.wav"), "", 0.0))
    found = []
    for decoders in (1, 4):
        path = tmp_path / f"{decoders}.jsonl"
        settings = TranscriptionSettings(vad_threshold=0.0, batch_s=4)
        with ResultsFile.open(path, batch.build_header(engine, settings)) as journal:
            batch.transcribe_corpus(examples, engine, settings, journal, decode_threads=decoders)
        found.append(sorted(path.read_text().splitlines()))
    assert found[0] == found[1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mowa-decode")]


def test_addresses_are_opened_only_when_asked(tmp_path):
    import fsspec

    soundfile.write(tmp_path / "a.flac", tone(0.5), 16_000)
    with fsspec.open("memory://corpus/a.flac", "wb") as file:
        file.write((tmp_path / "a.flac").read_bytes())
    engine = mowa.open_engine(mowa.load(str(tiny(tmp_path / "net"))), device="cpu", dtype="float32", threads=1)
    examples = [Example(name, f"memory://corpus/{name}.flac", "", 0.0) for name in ("a", "gone")]
    settings = TranscriptionSettings(vad_threshold=0.0)
    here = Example("here", str(tmp_path / "a.flac"), "", 0.0)
    for remote in (False, True):
        path = tmp_path / f"{remote}.jsonl"
        with ResultsFile.open(path, batch.build_header(engine, settings)) as journal:
            batch.transcribe_corpus([*examples, here], engine, settings, journal, allow_remote=remote)
        rows = {row["id"]: row for row in map(json.loads, path.read_text().splitlines()[1:])}
        if not remote:
            assert "Say --remote" in rows["a"]["error"]
        else:
            assert rows["a"]["text"] == rows["here"]["text"]
            assert "cannot be fetched" in rows["gone"]["error"]


@pytest.mark.parametrize("size", [1, 5])
def test_what_a_manifest_gives_before_it_breaks_is_done(tmp_path, size):
    soundfile.write(tmp_path / "a.wav", tone(0.5), 16_000)
    engine = mowa.open_engine(mowa.load(str(tiny(tmp_path / "net"))), device="cpu", dtype="float32", threads=1)

    def listed():
        for number in range(size):
            yield Example(str(number), str(tmp_path / "a.wav"), "", 0.0)
        raise DataError("line 9: broken JSON")

    settings = TranscriptionSettings(vad_threshold=0.0)
    with ResultsFile.open(tmp_path / "j.jsonl", batch.build_header(engine, settings)) as journal:
        with pytest.raises(DataError, match="line 9"):
            batch.transcribe_corpus(listed(), engine, settings, journal)
        assert journal.done_ids == set(map(str, range(size)))
