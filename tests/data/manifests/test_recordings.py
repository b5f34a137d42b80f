"""What a row may name as its recording: paths of any system, decoded samples, and parts of a recording."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from mowa.data import audio
from mowa.data.manifests import recordings
from mowa.data.manifests.examples import list_examples, read_examples
from mowa.data.manifests.recordings import ExcerptCutter
from mowa.errors import AudioError, DataError
from mowa.types import Example

RATE_HZ = 16_000


def tone(seconds, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * RATE_HZ)).astype(np.float32)


def record(path, seconds=1.0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(seconds), RATE_HZ, **options)
    return path


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def only(source, **options):
    (example,) = list_examples(source, **options)
    return example


# --- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        r"clips\a b.wav",
        r".\clips\a b.wav",
        r"C:\Users\me\corpus\clips\a b.wav",
        "D:/corpus/clips/a b.wav",
        r"\\server\share\corpus\clips\a b.wav",
        "file:///C:/corpus/clips/a%20b.wav",
        "file://{folder}/clips/a%20b.wav",
        "file://localhost{folder}/clips/a%20b.wav",
        "FILE://{folder}/clips/a b.wav",
        "~/clips/a b.wav",
        "{folder}/clips/a b.wav",
        "a b.wav",
    ],
)
def test_paths_of_other_systems_are_found(tmp_path, monkeypatch, name):
    file = record(tmp_path / "clips/a b.wav")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = only(write(tmp_path / "m.jsonl", {"audio": name.format(folder=tmp_path), "text": "tak"}))
    assert (found.audio, found.id) == (str(file), "a b")


def test_the_longest_end_of_a_windows_path_wins(tmp_path):
    record(tmp_path / "a.wav")
    inner = record(tmp_path / "clips/a.wav")
    source = write(tmp_path / "m.jsonl", {"audio": r"C:\corpus\clips\a.wav"})
    assert only(source).audio == str(inner)


def test_a_backslash_in_a_name_here_is_a_backslash(tmp_path):
    file = record(tmp_path / r"clips\a.wav")
    record(tmp_path / "clips/a.wav")
    assert only(write(tmp_path / "m.jsonl", {"audio": r"clips\a.wav"})).audio == str(file)


def test_drives_of_the_linux_subsystem_of_windows():
    paths = list(recordings._plain_paths(r"C:\corpus\a.wav"))
    assert paths == [r"C:\corpus\a.wav", "/mnt/c/corpus/a.wav", "corpus/a.wav", "a.wav"]


@pytest.mark.parametrize(
    ("name", "label"),
    [(r"C:\x\b.wav", "C:/x/b.wav"), (r"x\b.wav", "x/b.wav"), ("~/b.wav", "~/b.wav"), ("file:///x/b.wav", "/x/b.wav")],
)
def test_missing_recordings_of_other_systems_are_named(tmp_path, name, label):
    record(tmp_path / "a.wav")
    source = write(tmp_path / "m.jsonl", {"audio": "a.wav", "text": "a"}, {"audio": name, "text": "b"})
    assert [example.id for example in list_examples(source)] == ["a", "b"]
    with pytest.raises(DataError, match=rf"m\.jsonl:2: no recording {label} in "):
        list(read_examples(source))


def test_urls_of_other_machines_stay_urls(tmp_path):
    for url in ("file://server/share/a.wav", "https://example.org/a.wav", "s3://bucket/a.wav"):
        assert only(write(tmp_path / "m.jsonl", {"audio": url})).audio == url


# --- decoded samples --------------------------------------------------------------------------------------------------


def test_rows_with_decoded_samples(tmp_path):
    """The form in which `datasets` decodes audio: an array and its sampling rate."""
    samples = tone(0.5)
    cell = {"array": samples.tolist(), "sampling_rate": RATE_HZ, "path": "x/a.flac"}
    source = write(tmp_path / "m.jsonl", {"audio": cell, "text": "a"}, {"audio": {**cell, "path": None}, "text": "b"})
    found = list(list_examples(source))
    assert [example.id for example in found] == ["a", "2"]
    for example in found:
        np.testing.assert_array_equal(soundfile.read(_file(tmp_path, example), dtype="float32")[0], samples)
    (first, _) = read_examples(source, cache_dir=tmp_path / "cache")
    assert first.duration_s == 0.5
    np.testing.assert_array_equal(audio.load_audio(first.audio), samples)


def _file(folder, example):
    file = folder / f"{example.id}.bytes"
    file.write_bytes(example.audio_bytes)
    return file


@pytest.mark.parametrize("kind", ["parquet", "saved"])
@pytest.mark.parametrize("column", ["audio", "nagranie"])
def test_decoded_samples_in_files_of_datasets(tmp_path, kind, column):
    datasets = pytest.importorskip("datasets")
    cell = {"array": tone(0.25).tolist(), "sampling_rate": RATE_HZ, "path": "a.flac"}
    data = datasets.Dataset.from_list([{column: cell, "text": "tak"}])
    if kind == "parquet":
        data.to_parquet(tmp_path / "x.parquet")
    else:
        data.save_to_disk(tmp_path / "saved")
    (found,) = read_examples(tmp_path / ("x.parquet" if kind == "parquet" else "saved"), cache_dir=tmp_path / "cache")
    np.testing.assert_allclose(audio.load_audio(found.audio), tone(0.25), atol=1e-7)


# --- parts of a recording ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"start": 0.25, "end": 0.75},
        {"start": "0.25", "end": "0.75", "duration": 60},  # the duration of the recording
        {"start_s": 0.25, "end_s": 0.75},
        {"start_time": 0.25, "end_time": 0.75},
        {"offset": 0.25, "end": 0.75},
        {"offset": 0.25, "duration": 0.5},
        {"start": 0.25, "duration": 0.5},
        {"offset": 0.25, "duration_ms": 500},
    ],
)
def test_columns_of_a_part(tmp_path, row):
    record(tmp_path / "a.wav", 60)
    source = write(tmp_path / "m.jsonl", {"audio": "a.wav", "text": "tak", **row})
    found = only(source)
    assert (found.offset_s, found.duration_s, found.is_excerpt) == (0.25, 0.5, True)
    part = audio.load_audio(found.audio, offset_s=found.offset_s, duration_s=found.duration_s)
    (cut,) = read_examples(source, cache_dir=tmp_path / "cache")
    assert (cut.duration_s, cut.offset_s, cut.is_excerpt) == (0.5, 0, False)
    np.testing.assert_array_equal(audio.load_audio(cut.audio), part)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"start": 3}, (0.0, 0.0, False)),  # without an end it may be anything
        ({"end": 3}, (0.0, 0.0, False)),
        ({"start": "", "end": ""}, (0.0, 0.0, False)),
        ({"start": None, "end": None, "duration": 2}, (0.0, 2.0, False)),
        ({"start": 0, "end": 2}, (0.0, 2.0, True)),
        ({"duration_ms": 1500}, (0.0, 1.5, False)),
        ({"duration_ms": 1500, "duration": 2}, (0.0, 2.0, False)),
    ],
)
def test_rows_that_are_no_parts(tmp_path, row, expected):
    found = only(write(tmp_path / "m.jsonl", {"audio": "a.wav", **row}))
    assert (found.offset_s, found.duration_s, found.is_excerpt) == expected


def test_named_columns_of_parts(tmp_path):
    source = write(tmp_path / "m.jsonl", {"audio": "a.wav", "von": 1, "bis": 2.5})
    found = only(source, columns={"offset": "von", "end": "bis"})
    assert (found.offset_s, found.duration_s) == (1, 1.5)


def test_a_part_that_is_the_whole_recording_is_not_copied(tmp_path):
    file = record(tmp_path / "a.wav", 2)
    rows = [{"audio": "a.wav", "text": "tak", "offset": 0, "duration": seconds} for seconds in (2, 1.95, 1)]
    found = list(read_examples(write(tmp_path / "m.jsonl", *rows), cache_dir=tmp_path / "cache"))
    assert [example.audio == str(file) for example in found] == [True, True, False]
    assert len(audio.load_audio(found[2].audio)) == RATE_HZ


@pytest.mark.parametrize(("name", "options"), [("a.wav", {}), ("a.mp3", {"format": "MP3"})])
def test_parts_are_cut_in_one_pass_over_the_recording(tmp_path, monkeypatch, name, options):
    file = record(tmp_path / name, 40, **options)
    opened = []
    stream = audio.stream_audio
    monkeypatch.setattr(audio, "stream_audio", lambda *given, **more: opened.append(given) or stream(*given, **more))
    cutter = ExcerptCutter(tmp_path / "cache")
    parts = [(0.5, 1), (1, 2), (1, 0.5), (9.5, 1), (31, 4), (3, 1)]  # overlapping, over a block's end, and backwards
    for offset_s, duration_s in parts:
        cut = cutter.cut(Example("x", str(file), "", duration_s, offset_s=offset_s, is_excerpt=True), file)
        expected = audio.load_audio(file, offset_s=offset_s, duration_s=duration_s)
        np.testing.assert_allclose(audio.load_audio(cut), np.clip(expected, -1, 1), atol=2**-22)
    assert len(opened) == 2


def test_parts_are_cut_once(tmp_path):
    file = record(tmp_path / "a.wav", 3)
    example = Example("x", str(file), "", 1.0, offset_s=1.0, is_excerpt=True)
    first = ExcerptCutter(tmp_path / "cache").cut(example, file)
    changed = first.stat().st_mtime_ns
    assert ExcerptCutter(tmp_path / "cache").cut(example, file) == first
    assert first.stat().st_mtime_ns == changed
    assert ExcerptCutter(tmp_path / "cache").cut(replace(example, offset_s=1.5), file) != first
    os.utime(file, ns=(1, 1))  # another recording of the same name
    assert ExcerptCutter(tmp_path / "cache").cut(example, file) != first


def test_a_part_beyond_the_end_is_reported_with_its_line(tmp_path):
    record(tmp_path / "a.wav", 3)
    rows = [{"audio": "a.wav", "text": "tak", "start": start, "end": start + 1} for start in (1, 2.5, 9, 2)]
    source, errors = write(tmp_path / "m.jsonl", *rows), []
    found = read_examples(
        source, cache_dir=tmp_path / "cache", on_unreadable=lambda example, error: errors.append(str(error))
    )
    assert [example.id for example in found] == ["a", "a-4"]
    assert "m.jsonl:2: " in errors[0]
    assert "ends inside the excerpt from 2.5 s to 3.5 s" in errors[0]
    assert "m.jsonl:3: " in errors[1]
    with pytest.raises(AudioError, match=r"m\.jsonl:2: .*ends inside the excerpt"):
        list(read_examples(source, cache_dir=tmp_path / "other"))
