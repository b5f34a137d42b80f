"""Recordings that cannot be read are left out of a run before it starts, up to a limit, with a report."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mowa import loading
from mowa.data.manifests.examples import read_examples
from mowa.data.quality import unreadable
from mowa.errors import AudioError, DataError, TrainingStopped
from mowa.training import loop
from mowa.training.config import ctc, dispatch, schema
from mowa.training.ctc import readable, setup, trainer
from tests.checkpoints import clip, corpus, tiny

BAD = {"3": "is cut off", "5": "is empty (0 bytes)", "7": "not a number", "9": "no recording 9.wav", "11": "too short"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("base"), conv_dim=(8,) * 7, intermediate_size=32)


@pytest.fixture
def folder(tmp_path):
    """A corpus of 24 clips, five of which cannot be read; good.jsonl has the others."""
    manifest = Path(corpus(tmp_path / "corpus", 24))
    folder = manifest.parent
    (folder / "3.wav").write_bytes((folder / "3.wav").read_bytes()[:3000])
    (folder / "5.wav").write_bytes(b"")
    samples = clip(7, 8800)
    samples[2000] = np.nan
    soundfile.write(folder / "7.wav", samples, 16_000, subtype="FLOAT")
    (folder / "9.wav").unlink()
    soundfile.write(folder / "11.wav", clip(11, 300), 16_000)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    write(folder / "good.jsonl", [row for row in rows if row["id"] not in BAD])
    write(folder / "headers.jsonl", [{**row, "duration_s": 0} for row in rows])  # durations have to be read
    return folder


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe(base, train, **overrides):
    tree = {
        "model": str(base),
        "data": {"train": str(train), "dev": str(train), "test": str(train), "max_unreadable": 0.5},
        "batch": {"seconds": 4.0},
        "optimizer": {"max_steps": 6, "precision": "float32"},
        "evaluation": {"eval_steps": 3},
    }
    return ctc.parse(schema.apply_overrides(tree, overrides), "test")


def read(recipe, out):
    return setup.read_data(recipe, loading.load(recipe.model), out)


def record_decoding(monkeypatch):
    """Return a list to which the path of every recording that is decoded to check it is added."""
    decoded, original = [], unreadable.audio.stream_audio

    def stream_audio(path, *arguments, **options):
        decoded.append(path)
        return original(path, *arguments, **options)

    monkeypatch.setattr(unreadable.audio, "stream_audio", stream_audio)
    return decoded


def ids(examples):
    return [example.id for example in examples]


@pytest.mark.parametrize("manifest", ["train.jsonl", "headers.jsonl"])
def test_the_plan_is_that_of_a_corpus_without_the_bad_recordings(base, folder, tmp_path, manifest):
    """So the losses are the same as if the rows had been deleted."""
    found, expected = (read(recipe(base, folder / name), tmp_path) for name in (manifest, "good.jsonl"))
    for data in (found, expected):
        assert not {*ids(data.train[0][0]), *ids(data.dev["dev"]), *ids(data.test["test"])} & set(BAD)
    assert ids(found.dev["dev"]) == ids(expected.dev["dev"])
    assert ids(found.test["test"]) == ids(expected.test["test"])
    plans = [list(map(ids, readable.plan(recipe(base, folder / manifest), data.train))) for data in (found, expected)]
    assert plans[0] == plans[1]


def test_what_was_left_out_is_reported_by_set(base, folder, tmp_path):
    data = read(recipe(base, folder / "train.jsonl"), tmp_path)
    notes = "\n".join(data.notes)
    for name in (str(folder / "train.jsonl"), "dev", "test"):
        assert f"{name}\nleft out, cannot be read: 5 of 24 recordings\n" in notes
    readable.write_report(data, tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "unreadable.jsonl").read_text().splitlines()]
    assert len(rows) == 15
    for row in rows:
        assert BAD[row["id"]] in row["error"]
        assert row["file"] == str(folder / f"{row['id']}.wav")
    readable.write_report(dataclasses.replace(data, unreadable={}), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("manifest", ["train.jsonl", "headers.jsonl"])
def test_more_than_the_limit_end_the_run_with_all_reasons(base, folder, tmp_path, manifest):
    found, total = BAD, 24
    if manifest == "headers.jsonl":  # its duration shows that 11 is too short
        found, total = {key: BAD[key] for key in ("3", "5", "7", "9")}, 23
    with pytest.raises(DataError) as error:
        read(recipe(base, folder / manifest, **{"data.max_unreadable": 0.1}), tmp_path)
    assert f"{len(found)} of {total} recordings cannot be read, more than max_unreadable: 0.1 allows" in str(
        error.value
    )
    for reason in found.values():
        assert reason in str(error.value)


def test_up_to_three_are_left_out_of_a_small_set_unless_none_may_be(base, folder, tmp_path):
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    write(folder / "small.jsonl", rows[3:8])
    small = recipe(base, folder / "small.jsonl", **{"data.max_unreadable": 0.1})
    assert ids(read(small, tmp_path).train[0][0]) == ["4", "6"]
    with pytest.raises(DataError, match="3 of 5 recordings cannot be read"):
        read(recipe(base, folder / "small.jsonl", **{"data.max_unreadable": 0}), tmp_path)


@pytest.mark.parametrize("bad", ["9", "3"])
def test_a_set_of_which_nothing_is_left_ends_the_run(base, folder, tmp_path, bad):
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    write(folder / "one.jsonl", [row for row in rows if row["id"] == bad])
    changes = {"data.test": [{"path": str(folder / "one.jsonl")}], "data.max_unreadable": 1.0}
    with pytest.raises(DataError, match="test: 1 of 1 recordings cannot be read, and none is left"):
        read(recipe(base, folder / "train.jsonl", **changes), tmp_path)


def test_a_short_run_decodes_only_what_it_reads(base, folder, tmp_path, monkeypatch):
    decoded = record_decoding(monkeypatch)
    short = recipe(base, folder / "good.jsonl", **{"optimizer.max_steps": 1, "data.dev": [], "data.test": []})
    data = read(short, tmp_path)
    planned = {example.audio for batch in readable.plan(short, data.train) for example in batch}
    assert sorted(decoded) == sorted(planned | {example.audio for example in data.dev["dev"]})
    assert len(decoded) < 19


def test_the_outcome_is_cached_until_a_file_changes(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MOWA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(unreadable, "MIN_CACHED_S", 0.0)
    calls = record_decoding(monkeypatch)
    examples = list(read_examples(folder / "train.jsonl", on_unreadable=lambda *_: None))
    first = unreadable.find_unreadable(examples, 16_000, threads=2)
    assert {Path(key[0]).stem for key in first} == set(BAD) - {"9"}
    assert len(calls) == 23
    assert unreadable.find_unreadable(examples, 16_000) == first
    assert len(calls) == 23
    soundfile.write(folder / "5.wav", clip(5, 8000), 16_000)
    assert {Path(key[0]).stem for key in unreadable.find_unreadable(examples, 16_000)} == set(BAD) - {"9", "5"}


def test_a_recording_that_disappears_during_the_run_is_one_line(base, folder, tmp_path, monkeypatch):
    def prepare(*arguments):
        run = setup.prepare(*arguments)
        for batch in run.batches[2:]:
            for example in batch:
                Path(example.audio).unlink(missing_ok=True)
        return run

    config = recipe(base, folder / "good.jsonl", **{"data.dev": [], "data.test": [], "optimizer.max_steps": 40})
    task = dataclasses.replace(trainer.TASK, prepare=prepare)
    with pytest.raises(AudioError) as error:
        loop.train(task, config, loading.load(config.model), tmp_path / "out", threads=1)
    (line,) = str(error.value).splitlines()
    assert line.startswith(str(folder))
    hint = f"{tmp_path / 'out'} has no checkpoint yet, so the same command starts again from step 0"
    assert line.endswith(f".wav: does not exist. Check the spelling; {hint}")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("DataLoader worker (pid 12) is killed by signal: Killed. ", " (Killed)"),
        (
            "DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that dataloader's workers are "
            "out of shared memory. Please try to raise your shared memory limit.",
            " (Bus error)",
        ),
        ("DataLoader worker (pid(s) 12, 13) exited unexpectedly", ""),
    ],
)
def test_a_killed_worker_is_one_line(tmp_path, message, reason):
    with pytest.raises(TrainingStopped) as error, readable.one_line_errors(tmp_path):
        raise RuntimeError(message)
    assert str(error.value).startswith(
        f"a process that loads recordings was killed{reason}, perhaps for lack of memory; {tmp_path} has no checkpoint"
    )


def test_other_errors_stay_as_they_are(tmp_path):
    with pytest.raises(RuntimeError, match=r"^a bug$"), readable.one_line_errors(tmp_path):
        raise RuntimeError("a bug")
    with pytest.raises(TrainingStopped, match=r"^loss is nan$"), readable.one_line_errors(tmp_path):
        raise TrainingStopped("loss is nan")


def test_a_run_with_bad_recordings_ends_well(base, folder, tmp_path, capfd):
    out = dispatch.train(recipe(base, folder / "train.jsonl", **{"data.test": []}), tmp_path / "out", threads=1)
    assert json.loads((out / "report.json").read_text())["metrics"]["dev"]["recordings"] == 19
    assert len((out / "unreadable.jsonl").read_text().splitlines()) == 10
    assert "left out, cannot be read: 5 of 24 recordings" in capfd.readouterr().err
