"""Results logs: complete records survive any interruption, runs are not mixed, and only one process writes."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mowa.engines.results import ResultsFile, merge_results, parse_transcript, read_header, read_records
from mowa.errors import AudioError, DataError
from mowa.types import Example, Failure, Segment, Transcript, Word

HEADER = {"model": {"name": "tiny", "sha256": "ab"}, "settings": {"vad_threshold": 0.1}, "versions": {"mowa": "1"}}


def example(number: int) -> Example:
    return Example(f"clip-{number}", f"{number}.wav", "", 0.0)


def transcript(text: str) -> Transcript:
    word = Word(text, 0.0, 0.5, 0.9)
    return Transcript("x.wav", text, 1.0, (Segment(text, 0.0, 0.5, (word,), 0.9),))


def failed(number: int) -> Failure:
    return Failure(f"{number}.wav", AudioError(f"{number}.wav: is empty."))


def written(path: Path, texts: list[str]) -> bytes:
    path.unlink(missing_ok=True)
    with ResultsFile.open(path, HEADER) as results:
        for number, text in enumerate(texts):
            results.add(example(number), transcript(text) if text else failed(number))
    return path.read_bytes()


def test_records_of_a_transcript_and_an_error(tmp_path):
    written(tmp_path / "j.jsonl", ["dzień dobry", ""])
    header, first, second = map(json.loads, (tmp_path / "j.jsonl").read_text().splitlines())
    assert header["results"] == 2
    assert header["settings"] == {"vad_threshold": 0.1}
    assert (first["id"], first["file"], first["text"], first["duration_s"]) == ("clip-0", "0.wav", "dzień dobry", 1.0)
    assert second == {"id": "clip-1", "file": "1.wav", "error": "1.wav: is empty."}
    assert parse_transcript(first, header).words[0].text == "dzień dobry"


@given(texts=st.lists(st.text(max_size=8), min_size=1, max_size=6), share=st.floats(0, 1))
def test_a_log_cut_off_anywhere_can_be_resumed(tmp_path_factory, texts, share):
    path = tmp_path_factory.mktemp("torn") / "j.jsonl"
    complete = written(path, texts)
    path.write_bytes(complete[: int(share * len(complete))])
    with ResultsFile.open(path, HEADER) as results:
        for number, text in enumerate(texts):
            if f"clip-{number}" not in results.done_ids:
                results.add(example(number), transcript(text) if text else failed(number))
    assert path.read_bytes() == complete


def test_failed_recordings_are_retried_only_on_request(tmp_path):
    path = tmp_path / "j.jsonl"
    written(path, ["a", "", "b", ""])
    with ResultsFile.open(path, HEADER) as results:
        assert (len(results.done_ids), results.num_failed) == (4, 2)
    with ResultsFile.open(path, HEADER, retry_failed=True) as results:
        assert results.done_ids == {"clip-0", "clip-2"}
        with pytest.raises(DataError, match="another process is writing"):
            ResultsFile.open(path, HEADER)
        results.add(example(1), transcript("c"))
    assert [row["id"] for row in read_records(path)] == ["clip-0", "clip-2", "clip-1"]
    assert [file.name for file in tmp_path.iterdir()] == ["j.jsonl"]


def test_a_second_writer_is_refused_until_the_first_has_died(tmp_path):
    path = tmp_path / "j.jsonl"
    code = (
        "import os, sys, time; from pathlib import Path; from mowa.engines.results import ResultsFile\n"
        f"results = ResultsFile.open(Path({str(path)!r}), {HEADER!r}); print('open', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(DataError, match="another process is writing to it"):
            ResultsFile.open(path, HEADER)
    finally:
        other.kill()
        other.communicate()
    ResultsFile.open(path, HEADER).close()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"settings": {"vad_threshold": 0.5}}, r"vad_threshold: 0.1 → 0.5"),
        ({"model": {"name": "tiny", "sha256": "cd"}}, "sha256: ab → cd"),
        ({"shard": "2/4"}, "shard: none → 2/4"),
    ],
)
def test_other_settings_are_refused_and_the_log_is_unchanged(tmp_path, changed, reason):
    path = tmp_path / "j.jsonl"
    before = written(path, ["a"])
    with pytest.raises(DataError, match=reason):
        ResultsFile.open(path, HEADER | changed)
    assert path.read_bytes() == before
    ResultsFile.open(path, HEADER | {"versions": {"mowa": "2"}}).close()


@pytest.mark.parametrize(
    "content", [b"dear diary", b"dear\ndiary\n", b'{"file": "a"}\n', b"\0\0\0", b'{"results": true}\n']
)
def test_other_files_are_refused_and_unchanged(tmp_path, content):
    (tmp_path / "notes").write_bytes(content)
    with pytest.raises(DataError, match="is not a results log"):
        ResultsFile.open(tmp_path / "notes", HEADER)
    assert (tmp_path / "notes").read_bytes() == content


def test_other_format_versions_are_refused(tmp_path):
    (tmp_path / "j.jsonl").write_text('{"results": 9}\n')
    with pytest.raises(DataError, match=r"format 9, this mowa reads 2. Update mowa"):
        ResultsFile.open(tmp_path / "j.jsonl", HEADER)
    for damaged in ('{"results": 2}', '{"results": 2, "model": 5, "settings": [], "versions": {}}'):
        (tmp_path / "damaged.jsonl").write_text(damaged + "\n")
        with pytest.raises(DataError, match="its first line is damaged"):
            read_header(tmp_path / "damaged.jsonl")
    (tmp_path / "old.jsonl").write_text('{"journal": 1, "model": {}}\n')
    for read in (lambda path: ResultsFile.open(path, HEADER), read_header):
        with pytest.raises(DataError, match=r"was written by an older mowa .format 1, this version reads 2."):
            read(tmp_path / "old.jsonl")


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "j.jsonl"
    lines = written(path, ["a", "b"]).splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0\0\n" + lines[2])
    with pytest.raises(DataError, match=r"j.jsonl:2: is damaged"):
        ResultsFile.open(path, HEADER)


def test_a_full_disk_leaves_complete_records(tmp_path):
    """A file size limit fails like a full disk, in the middle of a record."""
    path = tmp_path / "j.jsonl"
    code = (
        "import resource, signal; from pathlib import Path; from tests.engines.test_results import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"written(Path({str(path)!r}), ['a' * 50] * 20)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert "cannot be written to (File too large)" in done.stderr.splitlines()[-2] + done.stderr.splitlines()[-1]
    assert path.read_bytes().endswith(b"\n")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000
    there = list(read_records(path))
    assert 0 < len(there) < 20
    with ResultsFile.open(path, HEADER) as results:
        assert len(results.done_ids) == len(there)


def test_shards_are_merged_and_transcripts_win_over_errors(tmp_path):
    for shard, numbers in (("1/2", (0, 2)), ("2/2", (1, 2))):
        with ResultsFile.open(tmp_path / shard[0], HEADER | {"shard": shard}) as results:
            for number in numbers:
                results.add(
                    example(number), failed(number) if (shard, number) == ("1/2", 2) else transcript(f"w{number}")
                )
    header, rows = merge_results([tmp_path / "1", tmp_path / "2"])
    assert header["settings"] == HEADER["settings"]
    assert "shard" not in header
    assert [(row["id"], row.get("text")) for row in rows] == [("clip-0", "w0"), ("clip-1", "w1"), ("clip-2", "w2")]
    with ResultsFile.open(tmp_path / "3", HEADER | {"settings": {"vad_threshold": 0.9}}):
        pass
    with pytest.raises(DataError, match="vad_threshold"):
        merge_results([tmp_path / "1", tmp_path / "3"])


def test_an_id_that_is_not_utf8_is_read_back(tmp_path):
    name = os.fsdecode(b"\xff.wav")
    with ResultsFile.open(tmp_path / "j.jsonl", HEADER) as results:
        results.mark_started(name)
        results.add(Example(name, name, "", 0.0), transcript("a"))
    with ResultsFile.open(tmp_path / "j.jsonl", HEADER) as results:
        assert results.done_ids == {name}


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        ResultsFile.open(tmp_path / "file" / "j.jsonl", HEADER)
    assert os.listdir(tmp_path) == ["file"]
