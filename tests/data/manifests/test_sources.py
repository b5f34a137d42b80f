"""Corpora as they are downloaded: JSON documents, Common Voice, recordings and supervisions of lhotse, shards."""

import gzip
import io
import json
import tarfile

import numpy as np
import pytest
import soundfile

from mowa.data.chat import files
from mowa.data.manifests import discover
from mowa.data.manifests.examples import list_examples, list_splits, read_examples
from mowa.errors import DataError

ROWS = [{"audio": "a.wav", "text": "tak"}, {"audio": "b.wav", "text": "nie"}]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def record(path, seconds=1.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.sin(np.arange(round(16_000 * seconds)) / 5) / 2, 16_000)
    return path


def tsv(*rows):
    return "".join("\t".join(map(str, row)) + "\n" for row in rows)


def texts(source, split="", **options):
    return [example.text or example.error for example in list_examples(source, split, **options)]


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m.json", "m.jsonl", "m.json.gz", "m.jsonl.gz"])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "wrap", [lambda rows: rows, lambda rows: {"version": 1, "data": rows}, lambda rows: {"rows": rows}]
)
def test_a_json_document_of_rows(tmp_path, name, indent, wrap):
    content = json.dumps(wrap(ROWS), indent=indent).encode()
    source = write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else b"\n" + content + b"\n")
    assert texts(source) == ["tak", "nie"]
    assert [example.error for example in list_examples(source)] == ["", ""]


def test_json_lines_are_not_a_document(tmp_path):
    rows = [{"audio": "a.wav", "text": "tak", "data": [1]}, {"audio": "b.wav", "text": "nie", "data": []}]
    assert texts(write(tmp_path / "m.json", "".join(json.dumps(row) + "\n" for row in rows))) == ["tak", "nie"]
    assert texts(write(tmp_path / "n.json", json.dumps(ROWS[0]))) == ["tak"]
    assert texts(write(tmp_path / "o.json", json.dumps(ROWS[0], indent=2))) == ["tak"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[\n{"audio": "a.wav"},\n\n{"audio": }\n]', "m.json:4: broken JSON (Expecting value). Write one list"),
        ('[{"audio": "a.wav"}', "m.json:1: broken JSON (Expecting ',' delimiter)"),
        ("[]", "is empty: it has no rows"),
        ('{"data": []}', "is empty: it has no rows"),
        ('{"data": [1]}', "m.json: row 1 is not a JSON object"),
    ],
)
def test_invalid_documents_raise(tmp_path, content, message):
    with pytest.raises(DataError) as caught:
        texts(write(tmp_path / "m.json", content))
    assert message in str(caught.value)


# --- Common Voice -----------------------------------------------------------------------------------------------------

COLUMNS = (
    "client_id audio_id audio_file duration_ms prompt_id prompt transcription votes age gender accents variant "
    "language prompt_upvotes prompt_reports is_edited split char_per_sec quality_tags"
).split()
"""Of the table of Common Voice Spontaneous Speech 3.0 (common-voice/cv-dataset, datasets/spontaneous-speech)."""


def spontaneous():
    rows = [
        ("s1", 1, "spontaneous-speech-pl-1.wav", 1000, 7, "Co jesz?", "no [disfluency] chleb", "train"),
        ("s2", 2, "spontaneous-speech-pl-2.wav", 500, 7, "Co jesz?", "jabłko", "test"),
        ("s3", 3, "spontaneous-speech-pl-3.wav", 700, 7, "Co jesz?", "", "unassigned"),
        ("s1", 4, "spontaneous-speech-pl-4.wav", 1500, 7, "Co jesz?", "masło", "train"),
    ]
    table = tsv(COLUMNS, *((*row[:7], 2, "twenties", "", "", "", "Polish", 0, 0, 0, row[7], 5.5, "") for row in rows))
    reported = tsv("client_id audio_id audio_file duration_ms reason".split(), ("s9", 9, "x.wav", 5, "other"))
    return table, reported, [(row[2], row[3] / 1000) for row in rows]


def spontaneous_folder(tmp_path):
    table, reported, clips = spontaneous()
    folder = tmp_path / "sps-corpus-3.0-2026-03-09-pl"
    write(folder / "ss-corpus-pl.tsv", table)
    write(folder / "ss-reported-audios-pl.tsv", reported)
    write(folder / "ss-corpus-pl.qa-summary.json", "{}")
    write(folder / "README.md", "#")
    for name, seconds in clips:
        record(folder / "audios" / name, seconds)
    return folder


def spontaneous_archive(tmp_path, *, tables_first=True):
    folder = spontaneous_folder(tmp_path)
    names = sorted(folder.rglob("*.*"), key=lambda path: ((path.suffix == ".wav") == tables_first, path))
    with tarfile.open(tmp_path / "sps.tar.gz", "w:gz") as tar:
        for path in names:
            tar.add(path, path.relative_to(tmp_path))
    return tmp_path / "sps.tar.gz"


@pytest.mark.parametrize(
    "make",
    [spontaneous_folder, spontaneous_archive, lambda path: spontaneous_archive(path, tables_first=False)],
    ids=["folder", "archive", "archive with the tables last"],
)
def test_common_voice_spontaneous_speech(tmp_path, make):
    source = make(tmp_path)
    assert list_splits(source) == ["test", "train", "unassigned"]
    found = list(list_examples(source))  # as of other corpora with splits: train
    assert [(example.id.rpartition("/")[2], example.text, example.duration_s) for example in found] == [
        ("spontaneous-speech-pl-1", "no [disfluency] chleb", 1.0),
        ("spontaneous-speech-pl-4", "masło", 1.5),
    ]
    assert found[0].tags == {"speaker": "s1", "age": "twenties", "language": "Polish"}
    assert texts(source, "test") == ["jabłko"]
    (test,) = read_examples(source, "test", cache_dir=tmp_path / "cache")
    assert soundfile.info(test.audio).duration == 0.5
    with pytest.raises(DataError, match=r"has no split dev\. Available splits: test, train, unassigned"):
        texts(source, "dev")


@pytest.mark.parametrize("make", [spontaneous_folder, spontaneous_archive])
def test_spontaneous_speech_without_splits(tmp_path, monkeypatch, make):
    monkeypatch.setattr(f"{__name__}.COLUMNS", [name.replace("split", "part") for name in COLUMNS])
    source = make(tmp_path)
    assert list_splits(source) == []
    assert len(texts(source)) == 4
    with pytest.raises(DataError, match="split"):
        texts(source, "test")


def test_the_table_of_spontaneous_speech_alone_has_all_splits(tmp_path):
    folder = spontaneous_folder(tmp_path)
    assert discover.detect_layout(folder).kind == "Common Voice, spontaneous"
    assert len(list(list_examples(folder / "ss-corpus-pl.tsv"))) == 4
    assert texts(folder / "ss-corpus-pl.tsv", "test") == ["jabłko"]


def common_voice(folder, *, language="pl"):
    for split in ("train", "dev", "test"):
        record(folder / language / f"clips/{split}.wav")
        write(folder / language / f"{split}.tsv", tsv(("client_id", "path", "sentence"), ("s", f"{split}.wav", split)))
    return folder


def test_a_split_of_the_root_of_a_download(tmp_path):
    root = common_voice(tmp_path / "cv-corpus-21.0-2025-03-14")
    assert texts(root) == ["train"]
    assert texts(root, "test") == ["test"]
    assert texts(root, "validation") == ["dev"]
    assert list_splits(root) == ["dev", "test", "train"]
    with pytest.raises(DataError, match=r"pl: has no split other\. Available splits: dev, test, train"):
        texts(root, "other")
    common_voice(root, language="cs")
    assert list_splits(root) == ["cs", "pl"]
    assert texts(root, "pl") == ["train"]
    with pytest.raises(DataError, match=r"has no split test\. Available splits: cs, pl"):
        texts(root, "test")


def test_the_only_folder_named_like_a_split_is_that_split(tmp_path):
    write(tmp_path / "train/metadata.jsonl", json.dumps({"file_name": "a.wav", "text": "tak"}))
    assert list_splits(tmp_path) == ["train"]
    with pytest.raises(DataError, match=r"has no split test\. Available splits: train"):
        texts(tmp_path, "test")


# --- lhotse -----------------------------------------------------------------------------------------------------------

# as lhotse 1.33 writes them (RecordingSet.to_file, SupervisionSet.to_file)
RECORDING = {
    "id": "r1",
    "sources": [{"type": "file", "channels": [0], "source": "r1.wav"}],
    "sampling_rate": 16000,
    "num_samples": 64000,
    "duration": 4.0,
    "channel_ids": [0],
}
SUPERVISIONS = [
    {"id": "u1", "recording_id": "r1", "start": 0.5, "duration": 1.25, "channel": 0, "text": "tak", "speaker": "s1"},
    {"id": "u2", "recording_id": "r1", "start": 0.0, "duration": 4.0, "channel": 0, "text": "nie", "language": "pl"},
    {"id": "u3", "recording_id": "r9", "start": 0.0, "duration": 4.0, "channel": 0, "text": "nic"},
]


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("recordings", "supervisions"),
    [
        ("recordings.jsonl", "supervisions.jsonl"),
        ("corpus_pl_recordings_train.jsonl.gz", "corpus_pl_supervisions_train.jsonl.gz"),
        ("pl-recordings.json", "pl-supervisions.json"),
        ("x_recordings_train.jsonl.gz", "x_supervisions_train.jsonl"),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_supervisions_beside_recordings(tmp_path, recordings, supervisions, whole):
    record(tmp_path / "r1.wav", 4.0)
    for name, rows in ((recordings, [RECORDING]), (supervisions, SUPERVISIONS)):
        content = (json.dumps(rows) if name.endswith(".json") else jsonl(*rows)).encode()
        write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    found = list(list_examples(tmp_path if whole else tmp_path / supervisions))
    assert [(one.id, one.text, one.offset_s, one.duration_s, one.is_excerpt) for one in found[:2]] == [
        ("u1", "tak", 0.5, 1.25, True),
        ("u2", "nie", 0.0, 4.0, False),
    ]
    assert found[0].audio == str(tmp_path / "r1.wav")
    assert (found[0].tags, found[1].tags) == ({"speaker": "s1"}, {"language": "pl"})
    assert found[2].id == "u3"
    assert "recording r9 is not in the manifest of recordings" in found[2].error


def test_cuts_come_before_supervisions_and_recordings_are_a_source(tmp_path):
    record(tmp_path / "r1.wav", 4.0)
    write(tmp_path / "recordings.jsonl", jsonl(RECORDING))
    write(tmp_path / "supervisions.jsonl", jsonl(*SUPERVISIONS))
    (alone,) = list_examples(tmp_path / "recordings.jsonl")
    assert (alone.id, alone.duration_s, alone.is_excerpt) == ("r1", 4.0, False)
    cut = {"id": "c", "start": 0, "duration": 4.0, "channel": 0, "recording": RECORDING, "type": "MonoCut"}
    write(tmp_path / "cuts.jsonl", jsonl({**cut, "supervisions": [SUPERVISIONS[1]]}))
    assert [example.id for example in list_examples(tmp_path)] == ["c"]


# --- shards -----------------------------------------------------------------------------------------------------------


def shard(path, number):
    """Write a shard of one row in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"audio": f"{number}.wav", "text": str(number)}
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist([row]), path)
    elif path.suffix == ".tar":
        with tarfile.open(path, "w") as tar:
            for name, data in ((f"{number}.txt", str(number).encode()), (f"{number}.wav", b"?")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    else:
        write(path, json.dumps(row) + "\n")


@pytest.mark.parametrize("suffix", [".parquet", ".tar", ".jsonl"])
@pytest.mark.parametrize("is_pattern", [True, False])
def test_missing_shards_are_named(tmp_path, suffix, is_pattern):
    for number in (0, 1, 4):
        shard(tmp_path / f"data/train-{number:05}-of-00005{suffix}", number)
    shard(tmp_path / f"data/test-00000-of-00001{suffix}", 9)
    source = str(tmp_path / f"data/train-*{suffix}") if is_pattern else tmp_path / "data"
    names = f"train-00002-of-00005{suffix}, train-00003-of-00005{suffix}"
    reason = f"{tmp_path}/data: 2 shards are missing: {names}. Download again, or name the files to read."
    found = list(list_examples(source))
    assert [example.text for example in found if not example.error] == ["0", "1", "4"]
    assert [(one.id, one.error) for one in found if one.error] == [(f"train-00002-of-00005{suffix}", reason)]
    assert texts(tmp_path / "data", "test") == ["9"]
    assert texts(str(tmp_path / f"data/train-0000[01]*{suffix}")) == ["0", "1"]  # not missing: not asked for
    shard(tmp_path / f"data/train-00002-of-00005{suffix}", 2)
    shard(tmp_path / f"data/train-00003-of-00005{suffix}", 3)
    assert texts(source) == ["0", "1", "2", "3", "4"]


def test_shards_of_relative_patterns(tmp_path, monkeypatch):
    for number in (0, 2):
        shard(tmp_path / f"data/train-{number:05}-of-00003.jsonl", number)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in ("./data/train-*.jsonl", "data/*", "~/data/*.jsonl", "*/train-?????-of-*"):
        assert "a shard is missing: train-00001-of-00003.jsonl" in texts(source)[2]
    shard(tmp_path / "other/train-00000-of-999999999999.jsonl", 0)  # a number, but hardly of shards
    assert texts("other") == ["0"]


def test_shards_are_numbered_from_zero_or_one(tmp_path):
    for number in (1, 3):
        shard(tmp_path / f"train-{number:05}-of-00003.jsonl", number)
    assert [file.name for file in discover.find_missing_shards(tmp_path.iterdir())] == ["train-00002-of-00003.jsonl"]


def test_missing_shards_of_texts_raise(tmp_path):
    for number in (0, 2):
        shard(tmp_path / f"train-{number:05}-of-00003.jsonl", number)
    with pytest.raises(DataError, match=r"a shard is missing: train-00001-of-00003\.jsonl"):
        list(files.read_rows(tmp_path))
