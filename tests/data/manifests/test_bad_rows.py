"""A line that cannot be used is reported with its position, and the lines around it are read."""

import csv
import io
import json
import tarfile
from itertools import islice

import numpy as np
import pytest
import soundfile

from mowa.data.manifests.examples import list_examples, read_examples
from mowa.data.manifests.text_tables import parse_table
from mowa.data.quality.corpus_report import check_corpus
from mowa.errors import DataError


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def entries(source, split="", **options):
    return [example.text or example.error for example in list_examples(source, split, **options)]


@pytest.fixture(autouse=True)
def recordings(tmp_path):
    for name in "abcd":
        soundfile.write(tmp_path / f"{name}.wav", np.sin(np.arange(8_000) / 5) / 2, 16_000)


UNCLOSED = "m.csv:3: has a quote that is not closed before the next row"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        # the quote is never closed: csv would put the rest of the file into one text
        ('a.wav,tak\nb.wav,"nie\nc.wav,może\nd.wav,już\n', ["tak", UNCLOSED, "może", "już"]),
        # the quote of a later row would close it, and the rows between would be text
        ('a.wav,tak\nb.wav,"nie\nc.wav,może\nd.wav,"już"\n', ["tak", UNCLOSED, "może", "już"]),
        ('a.wav,tak\nb.wav,"nie\nc.wav,"może"\nd.wav,"już"\n', ["tak", UNCLOSED, "może", "już"]),
        ('a.wav,tak\nb.wav,"nie\nc.wav,"może, później"\n', ["tak", UNCLOSED, "może, później"]),
        ('a.wav,tak\nb.wav,"nie', ["tak", "m.csv:3: has a quote that is not closed before the end of the file"]),
        ("a.wav,tak\nb.wav,nie, nie\nc.wav,może\n", ["tak", "m.csv:3: has 3 columns, the header 2. Quote", "może"]),
        ("a.wav,tak\nb.wav,ni\re\nc.wav,może\n", ["tak", "m.csv:3: broken table (new-line character", "może"]),
        # not broken: texts of several lines, quotes inside texts, empty columns at the end
        ('a.wav,"tak\ni ""nie"", i tak"\nb.wav,nie\n', ['tak\ni "nie", i tak', "nie"]),
        ('a.wav,5" tak\nb.wav,nie "nie"\n', ['5" tak', 'nie "nie"']),
        ("a.wav,tak,,\nb.wav,nie\n", ["tak", "nie"]),
    ],
)
def test_an_unbalanced_quote_costs_its_own_line_only(tmp_path, content, expected):
    found = entries(write(tmp_path / "m.csv", "path,text\n" + content))
    assert len(found) == len(expected)
    for text, wanted in zip(found, expected, strict=True):
        assert text == wanted or text.startswith(f"{tmp_path}/{wanted}")


def test_an_unbalanced_quote_is_found_without_names_of_audio_files(tmp_path):
    content = 'path,text\na,tak\nb,"nie\nc,może\nd,"już"\n'
    assert entries(write(tmp_path / "m.csv", content))[1:] == [
        f"{tmp_path}/m.csv:3: has a quote that is closed 2 lines later, inside a text. Close it, or double the quotes "
        "inside texts.",
        "może",
        "już",
    ]


def test_an_unbalanced_quote_is_found_where_the_text_comes_first(tmp_path):
    content = 'text,path\ntak,a.wav\n"nie,b.wav\nmoże,c.wav\njuż",d.wav\n'
    found = entries(write(tmp_path / "m.csv", content))
    assert found[0::2] == ["tak", "może"]
    assert found[1].startswith(f"{tmp_path}/{UNCLOSED}")
    assert found[3] == 'już"'
    legal = 'text,path\n"tak,\nnie",a.wav\n"może\nto, już",b.wav\n'
    assert entries(write(tmp_path / "n.csv", legal)) == ["tak,\nnie", "może\nto, już"]


def test_balanced_tables_are_read_as_the_csv_module_reads_them():
    rows = [["a.wav", 'x "y", z'], ["b.wav", "1\n2\r\n3"], ["c", ""], ["d.wav", 'b.mp3,"q"\nc.mp3'], ["e", ',;"\t|']]
    for dialect in ("excel", "unix"):
        with_lines = "".join(line for line in _written([["path", "text"], *rows], dialect))
        lines = with_lines.splitlines(keepends=True)
        found = [fields for _, fields in parse_table(iter(lines), "m.csv", tab_separated=False)]
        assert found == [dict(zip(("path", "text"), row, strict=True)) for row in rows]


def _written(rows, dialect):
    lines = []
    csv.writer(type("Sink", (), {"write": staticmethod(lines.append)}), dialect).writerows(rows)
    return lines


def test_a_field_of_any_length_is_read(tmp_path):
    text = "tak " * 50_000
    assert entries(write(tmp_path / "m.csv", f'path,text\na.wav,"{text}"\nb.wav,nie\n')) == [text, "nie"]
    assert entries(write(tmp_path / "m.tsv", f"path\ttext\na.wav\t{text}\nb.wav\tnie\n")) == [text, "nie"]


def test_a_tab_in_a_tsv_costs_its_own_line_only(tmp_path):
    found = entries(write(tmp_path / "m.tsv", "path\ttext\na.wav\ttak\nb.wav\tnie\tnie\nc.wav\tmoże\t\n"))
    reason = "m.tsv:3: has 3 columns, the header 2. A text cannot contain a tab: replace it by a space."
    assert found == ["tak", f"{tmp_path}/{reason}", "może"]


def test_carriage_returns(tmp_path):
    """One in a TSV is part of the text; a file with nothing else at its line ends is of classic Mac OS."""
    assert entries(write(tmp_path / "m.tsv", "path\ttext\na.wav\tta\rk\nb.wav\tnie\n")) == ["ta\rk", "nie"]
    assert entries(write(tmp_path / "n.tsv", "path\ttext\ra.wav\ttak\rb.wav\tnie\r")) == ["tak", "nie"]
    assert entries(write(tmp_path / "n.csv", "path,text\ra.wav,tak\rb.wav,nie")) == ["tak", "nie"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"audio": "b.wav", "text": "ni', "broken JSON (Invalid control character at, column 31)"),
        ("[1]", "is not a JSON object"),
        ('{"audio": null, "text": "nie"}', "has no recording"),
        ('{"sound": "b.wav", "text": "nie"}', "no column for audio"),
        ('{"audio": "b.wav", "text": 5}', "text is 5, not a string"),
        ('{"audio": "b.wav", "text": "nie", "offset": 2}', "has an offset (2) without a duration"),
        ('{"audio": "b.wav", "start": "0:01", "end": 2}', "start is '0:01', not a number of seconds"),
        ('{"audio": "b.wav", "start": 2, "end": 2}', "2 to 2 s is no part of a recording"),
        ('{"audio": {"array": [0.5, 0.1], "path": "b"}, "text": "nie"}', "an array has no sampling rate"),
        ('{"audio": {"array": [[0.5], [0.1, 0.2]], "sampling_rate": 16000}}', "a list of lists of several lengths"),
        ('{"audio": {"array": [0.5, 0.1], "sampling_rate": "16k"}}', "sampling_rate is '16k'"),
        ('{"type": "MixedCut"}', "is a MixedCut, which needs lhotse"),
    ],
)
def test_one_broken_line_of_json(tmp_path, row, reason):
    good = '{"audio": "a.wav", "text": "tak"}\n'
    source = write(tmp_path / "m.jsonl", f"{good}{row}\n{good}")
    found = list(list_examples(source))
    assert [example.text for example in found] == ["tak", "", "tak"]
    assert reason in found[1].error
    assert found[1].audio == f"{source}:2"
    assert found[1].id == "m.jsonl:2"


def test_a_source_without_a_usable_row_ends_with_the_first_reason(tmp_path):
    source = write(tmp_path / "m.jsonl", '{"sound": "a.wav"}\n' * 3)
    with pytest.raises(DataError, match=r"m\.jsonl:1: no column for audio"):
        next(list_examples(source))
    source = write(tmp_path / "m.jsonl", '{"sound": "a.wav"}\n' * 100 + '{"audio": "a.wav"}\n')
    with pytest.raises(DataError, match=r"m\.jsonl:1: no column for audio"):
        next(list_examples(source))
    late = write(tmp_path / "late.jsonl", '{"sound": "a.wav"}\n' * 99 + '{"audio": "a.wav"}\n')
    assert [bool(example.error) for example in islice(list_examples(late), 98, None)] == [True, False]


def test_kaldi_lines_that_cannot_be_used(tmp_path, monkeypatch):
    """Commands are never run: this one would leave a file."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "kaldi"
    write(folder / "wav.scp", f"r1 {tmp_path}/a.wav\nr2 touch ran |\nr3\nr4 x.ark:12\n")
    write(folder / "text", "u1 tak\nu2 nie\nu3 może\nr1 tak\n")
    assert entries(folder) == [
        "tak",
        f"{folder}/wav.scp:2: is a command (touch ran |), and commands are not run. Write its output to a file once, "
        "and put the path of that file here.",
        f"{folder}/wav.scp:3: has no recording. Add its path, or delete the line.",
        f"{folder}/wav.scp:4: x.ark:12 is inside a Kaldi archive. Extract files with wav-copy.",
    ]
    write(folder / "segments", "u1 r1 0 0.4\nu2 r1 0.2 0.2\nu4\nu3 r2 0 1\nu5 r1 0.1 0.3\n")
    found = list(list_examples(folder))
    assert [(example.id, example.text or example.error.removeprefix(f"{folder}/")[:50]) for example in found] == [
        ("u1", "tak"),
        ("u2", "segments:2: 0.2 to 0.2 s is not a segment. Start a"),
        ("u4", "segments:3: is not a segment. Expected: utterance,"),
        ("u3", f"segments:4: recording r2 ({folder}/wav.scp:2) is a "[:50]),
        ("u5", ""),
    ]
    assert not (tmp_path / "ran").exists()


def archive(tmp_path, table):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in (("pl/train.tsv", table), ("pl/clips/a.wav", (tmp_path / "a.wav").read_bytes())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_a_line_without_a_recording_of_a_table_in_an_archive(tmp_path):
    archive(tmp_path, b"client_id\tpath\tsentence\n1\ta.wav\ttak\n1\n1\t\tnie\n")
    reason = "has no recording. Add its path, or delete the row."
    lines = [f"{tmp_path}/x.tar/pl/train.tsv:{number}: {reason}" for number in (3, 4)]
    assert entries(tmp_path / "x.tar") == [*lines, "tak"]


def test_names_in_an_archive_that_are_not_utf8_are_passed_over(tmp_path):
    sound = (tmp_path / "a.wav").read_bytes()
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in (
            ("train.tsv", b"path\tsentence\na.wav\ttak\n"),
            ("clips/z\udcf1.wav", sound),
            ("a.wav", sound),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert entries(tmp_path / "x.tar") == ["tak"]


def test_an_archive_may_list_parts_of_one_recording(tmp_path):
    archive(tmp_path, b"path\tsentence\tstart\tend\na.wav\ttak\t0\t0.2\na.wav\tnie\t0.2\t0.5\n")
    found = list(read_examples(tmp_path / "x.tar", cache_dir=tmp_path / "cache"))
    assert [(one.id, one.text, round(one.duration_s, 3)) for one in found] == [("a", "tak", 0.2), ("a-2", "nie", 0.3)]


def test_a_broken_line_of_a_table_in_an_archive(tmp_path):
    table = b"path\tsentence\na.wav\ttak\nb.wav\tnie\tnie\n"
    archive(tmp_path, table)
    found = entries(tmp_path / "x.tar")
    assert found == [f"{tmp_path}/x.tar/pl/train.tsv:3: has 3 columns, the header 2. A text cannot contain a tab: "
                     "replace it by a space.", "tak"]  # fmt: skip


def test_readers_of_whole_recordings_raise_or_leave_out(tmp_path):
    source = write(tmp_path / "m.csv", "path,text\na.wav,tak\nb.wav,nie,nie\ngone.wav,nic\nc.wav,może\n")
    with pytest.raises(DataError, match=r"m\.csv:3: has 3 columns"):
        list(read_examples(source))
    left_out = []
    kept = read_examples(source, on_unreadable=lambda example, error: left_out.append((example.id, str(error))))
    assert [example.text for example in kept] == ["tak", "może"]
    assert [name for name, _ in left_out] == ["m.csv:3", "gone"]
    assert "m.csv:4: no recording gone.wav in" in left_out[1][1]


def test_a_report_counts_them_as_unreadable(tmp_path):
    source = write(tmp_path / "m.csv", "path,text\na.wav,tak\nb.wav,nie,nie\n")
    report = check_corpus(list_examples(source))
    assert (report.recordings, report.unreadable.count, report.empty_text.count) == (2, 1, 0)
    assert report.unreadable.examples[0][0] == "m.csv:3"
    json.dumps(report.unreadable.examples)
