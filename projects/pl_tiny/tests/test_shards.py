import io
import json
import re
import tarfile

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from mowa.data.manifests.examples import read_examples
from mowa.errors import DataError
from projects.pl_tiny.cli import cli
from projects.pl_tiny.shards import unpack_corpus

TEXTS = {"ada-0": "Dzień dobry.", "bob-1": "Do widzenia!", "ada-2": "Zażółć gęślą jaźń."}


@pytest.fixture
def corpus(tmp_path):
    """A folder as that of rhvoice-pl: Opus at 24 kHz in two shards, transcripts beside them, and a manifest."""
    source = tmp_path / "source"
    source.mkdir()
    tone = (0.3 * np.sin(np.arange(24_000) / 20)).astype(np.float32)
    recording = io.BytesIO()
    soundfile.write(recording, tone, 24_000, format="OGG", subtype="OPUS")
    rows = []
    for number, (name, text) in enumerate(TEXTS.items()):
        shard = f"part-0{number % 2}.tar"
        with tarfile.open(source / shard, "a") as archive:
            for member, content in ((f"{name}.opus", recording.getvalue()), (f"{name}.txt", text.encode())):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        rows.append({"id": name, "shard": shard, "text": text, "duration_s": 1.0, "voice": name[:3], "rate": 1.1})
    write_manifest(source, rows)
    return source


def write_manifest(source, rows):
    (source / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(source):
    return [json.loads(line) for line in (source / "manifest.jsonl").read_text().splitlines()]


def test_each_voice_gets_a_manifest_with_normalized_text(corpus, tmp_path):
    out = tmp_path / "out"
    done = CliRunner().invoke(cli, ["shards", str(corpus), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "ada: 0.00 h" in done.output
    examples = read_examples(str(out / "ada.jsonl"))
    assert [(one.id, one.text) for one in examples] == [("ada-0", "dzień dobry"), ("ada-2", "zażółć gęślą jaźń")]
    assert all(soundfile.info(one.audio).duration == pytest.approx(1.0, abs=0.05) for one in examples)
    assert [one.id for one in read_examples(str(out / "bob.jsonl"))] == ["bob-1"]


def test_a_complete_voice_is_not_unpacked_again(corpus, tmp_path):
    unpack_corpus(corpus, tmp_path / "out")
    kept, lost = tmp_path / "out/audio/bob-1.opus", tmp_path / "out/audio/ada-0.opus"
    written = kept.stat().st_mtime_ns
    lost.unlink()
    assert unpack_corpus(corpus, tmp_path / "out") == pytest.approx({"ada": 2 / 3600, "bob": 1 / 3600})
    assert kept.stat().st_mtime_ns == written
    assert lost.exists()
    rows = rows_of(corpus)
    write_manifest(corpus, [{**rows[0], "text": "Dobranoc."}, *rows[1:]])
    unpack_corpus(corpus, tmp_path / "out")
    assert next(iter(read_examples(str(tmp_path / "out/ada.jsonl")))).text == "dobranoc"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"id": "../../escaped"}, "id is '../../escaped', which cannot be a file name"),
        ({"voice": "../evil"}, "voice is '../evil', which cannot be a file name"),
        ({"voice": None}, "voice is None, not a text"),
        ({"shard": 3}, "shard is 3, not a text"),
        ({"duration_s": -5}, "duration_s is -5, not a number of seconds above 0"),
        ({"duration_s": "1.0"}, "duration_s is '1.0', not a number"),
        ({"id": "ada-2"}, "the id ada-2 is there twice"),
    ],
)
def test_a_line_that_is_not_valid(corpus, tmp_path, change, problem):
    rows = rows_of(corpus)
    write_manifest(corpus, [*rows[:1], {**rows[1], **change}, rows[2]])
    with pytest.raises(DataError, match=rf"manifest\.jsonl:[23]: {re.escape(problem)}"):
        unpack_corpus(corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_corpus_is_one_clear_error_and_leaves_no_manifest(corpus, tmp_path):
    rows = rows_of(corpus)
    write_manifest(corpus, [{**rows[0], "id": "eve-9"}, *rows[1:]])
    with pytest.raises(DataError, match=r"part-00\.tar: 1 of the 2 recordings .* such as eve-9\.opus"):
        unpack_corpus(corpus, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.jsonl"))
    write_manifest(corpus, [{"id": "x", "text": "y"}])
    with pytest.raises(DataError, match=r"manifest\.jsonl:1: shard, duration_s, voice missing"):
        unpack_corpus(corpus, tmp_path / "out")
    (corpus / "manifest.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no recordings"):
        unpack_corpus(corpus, tmp_path / "out")
    (corpus / "manifest.jsonl").unlink()
    with pytest.raises(DataError, match="not found"):
        unpack_corpus(corpus, tmp_path / "out")
    write_manifest(corpus, rows)
    (corpus / "part-01.tar").write_bytes(b"not a tar file")
    with pytest.raises(DataError, match="cannot be read as a tar file"):
        unpack_corpus(corpus, tmp_path / "out")
    (corpus / "part-01.tar").unlink()
    with pytest.raises(DataError, match=r"part-01\.tar: not found, and manifest\.jsonl lists 1 recordings"):
        unpack_corpus(corpus, tmp_path / "out")
