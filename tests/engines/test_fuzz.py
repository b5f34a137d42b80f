"""Hundreds of broken recordings in a batch: one record each, and no crash, hang or other error."""

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
    """Mutate the header or any byte, cut off the end, repeat or remove a part, or put random bytes after the magic."""
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
    with ResultsFile.open(tmp_path / "j.jsonl", batch.build_header(engine, settings)) as results:
        counts = batch.transcribe_corpus(examples, engine, settings, results, decode_threads=2)
    rows = [json.loads(line) for line in (tmp_path / "j.jsonl").read_text().splitlines()][1:]
    assert sorted(int(row["id"]) for row in rows) == list(range(200))
    assert counts["done"] + counts["failed"] == 200
    assert counts["failed"] > 20
    assert all(("error" in row) != ("text" in row) for row in rows)
    assert all("\n" not in row.get("error", "") for row in rows)


def test_a_recording_that_crashes_its_decoder_is_an_error_after_resuming(tmp_path, monkeypatch):
    """Recordings that a killed run had started are decoded in a child process first, which crashes instead."""
    soundfile.write(tmp_path / "good.wav", tone(0.5), 16_000)
    soundfile.write(tmp_path / "evil.wav", tone(0.5), 16_000)
    engine = mowa.open_engine(mowa.load(str(tiny(tmp_path / "net"))), device="cpu", dtype="float32", threads=1)
    settings, path = TranscriptionSettings(vad_threshold=0.0), tmp_path / "j.jsonl"
    header = batch.build_header(engine, settings)
    results = ResultsFile.open(path, header)
    for name in ("good", "evil"):
        results.mark_started(name)
    results._file.close()  # as if killed
    real = batch.subprocess.run

    def run(command, **how):
        if command[-1].endswith("evil.wav"):
            command = [command[0], "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"]
        return real(command, **how)

    monkeypatch.setattr(batch.subprocess, "run", run)
    examples = [Example(name, str(tmp_path / f"{name}.wav"), "", 0.0) for name in ("good", "evil", "new")]
    with ResultsFile.open(path, header) as results:
        assert results.suspect_ids == {"good", "evil"}
        batch.transcribe_corpus(examples, engine, settings, results)
    rows = {row["id"]: row for row in map(json.loads, path.read_text().splitlines()[1:])}
    assert "crashed its decoder (signal 11)" in rows["evil"]["error"]
    assert "text" in rows["good"]
    assert "does not exist" in rows["new"]["error"]
    assert not (tmp_path / ".j.jsonl.started").exists()


def test_the_number_of_decode_threads_does_not_change_batches(tmp_path):
    engine = mowa.open_engine(mowa.load(str(tiny(tmp_path / "net"))), device="cpu", dtype="float32", threads=1)
    rng = np.random.default_rng(0)
    examples = []
    for number in range(30):
        soundfile.write(tmp_path / f"{number}.wav", tone(rng.uniform(0.3, 2.5)), 16_000)
        examples.append(Example(str(number), str(tmp_path / f"{number}.wav"), "", 0.0))
    found = []
    for threads in (1, 4):
        path = tmp_path / f"{threads}.jsonl"
        settings = TranscriptionSettings(vad_threshold=0.0, batch_s=4)
        with ResultsFile.open(path, batch.build_header(engine, settings)) as results:
            batch.transcribe_corpus(examples, engine, settings, results, decode_threads=threads)
        found.append(sorted(path.read_text().splitlines()))
    assert found[0] == found[1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mowa-decode")]


def test_urls_are_opened_only_with_allow_remote(tmp_path):
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
        with ResultsFile.open(path, batch.build_header(engine, settings)) as results:
            batch.transcribe_corpus([*examples, here], engine, settings, results, allow_remote=remote)
        rows = {row["id"]: row for row in map(json.loads, path.read_text().splitlines()[1:])}
        if not remote:
            assert "--allow-remote" in rows["a"]["error"]
        else:
            assert rows["a"]["text"] == rows["here"]["text"]
            assert "cannot be downloaded" in rows["gone"]["error"]


@pytest.mark.parametrize("size", [1, 5])
def test_examples_before_an_error_in_the_manifest_are_transcribed(tmp_path, size):
    soundfile.write(tmp_path / "a.wav", tone(0.5), 16_000)
    engine = mowa.open_engine(mowa.load(str(tiny(tmp_path / "net"))), device="cpu", dtype="float32", threads=1)

    def listed():
        for number in range(size):
            yield Example(str(number), str(tmp_path / "a.wav"), "", 0.0)
        raise DataError("line 9: broken JSON")

    settings = TranscriptionSettings(vad_threshold=0.0)
    with ResultsFile.open(tmp_path / "j.jsonl", batch.build_header(engine, settings)) as results:
        with pytest.raises(DataError, match="line 9"):
            batch.transcribe_corpus(listed(), engine, settings, results)
        assert results.done_ids == set(map(str, range(size)))
