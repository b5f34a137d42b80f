"""What reads a corpus goes on after a line that cannot be used, and reads parts of recordings as such."""

import json

import numpy as np
import pytest
import soundfile

import mowa
from mowa import loading
from mowa.cli.main import main
from mowa.data.manifests.examples import list_examples, read_examples
from mowa.engines import batch, ray_data
from mowa.engines.batch import build_header, transcribe_corpus
from mowa.engines.results import ResultsFile, read_records
from mowa.engines.settings import TranscriptionSettings
from mowa.evaluation.scoring import evaluate_speech
from tests.checkpoints import clip, tiny

SETTINGS = TranscriptionSettings(vad_threshold=0)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return mowa.open_engine(loading.load(str(tiny(tmp_path_factory.mktemp("base")))))


@pytest.fixture
def corpus(tmp_path):
    """Two recordings, a row with an unbalanced quote, and a part of a recording."""
    for index in range(2):
        soundfile.write(tmp_path / f"{index}.wav", clip(index, 48_000), 16_000)
    rows = ["path,text,start,end", "0.wav,a b,,", '1.wav,"a b,,', "1.wav,b a,0.5,1.75"]
    (tmp_path / "m.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "m.csv"


def test_a_bad_line_is_a_failed_record(engine, corpus, tmp_path):
    failures = []
    with ResultsFile.open(tmp_path / "out.jsonl", build_header(engine, SETTINGS)) as results:
        counts = transcribe_corpus(list_examples(corpus), engine, SETTINGS, results, on_failure=failures.append)
    assert counts == {"done": 2, "failed": 1}
    records = {record["id"]: record for record in read_records(tmp_path / "out.jsonl")}
    assert set(records) == {"0", "1", "m.csv:3"}
    assert records["m.csv:3"]["error"].startswith(f"{corpus}:3: has a quote that is not closed before the next row")
    assert records["m.csv:3"]["file"] == f"{corpus}:3"
    assert (records["1"]["offset_s"], records["1"]["duration_s"]) == (0.5, 1.25)
    assert str(failures[0].error) == records["m.csv:3"]["error"]


def test_a_bad_line_is_resumed_and_retried_like_any_failure(engine, corpus, tmp_path):
    header = build_header(engine, SETTINGS)
    with ResultsFile.open(tmp_path / "out.jsonl", header) as results:
        transcribe_corpus(list_examples(corpus), engine, SETTINGS, results)
    with ResultsFile.open(tmp_path / "out.jsonl", header) as results:
        assert transcribe_corpus(list_examples(corpus), engine, SETTINGS, results) == {"done": 0, "failed": 0}
    corpus.write_text(corpus.read_text().replace('"a b', "a b"))
    with ResultsFile.open(tmp_path / "out.jsonl", header, retry_failed=True) as results:
        assert transcribe_corpus(list_examples(corpus), engine, SETTINGS, results) == {"done": 1, "failed": 0}


def test_a_bad_line_is_not_evaluated_and_named(engine, corpus):
    found = evaluate_speech(engine, corpus, settings=SETTINGS)
    assert found.samples == 2
    assert len(found.failures) == 1
    assert f"{corpus}:3: has a quote" in str(found)


def test_a_bad_line_reaches_the_workers_of_a_cluster(corpus):
    pytest.importorskip("pyarrow")
    examples = list(list_examples(corpus))
    table = ray_data._table(examples)
    assert [bool(row["error"]) for row in table.to_pylist()] == [False, True, False]


def test_a_bad_line_is_suspect_like_a_recording(corpus):
    bad = next(example for example in list_examples(corpus) if example.error)
    assert batch.try_decode_in_subprocess(bad) is None


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def test_parts_of_recordings_are_checked_and_split_as_parts(tmp_path, capsys):
    soundfile.write(tmp_path / "long.wav", clip(3, 160_000), 16_000)
    rows = [
        {
            "id": str(n),
            "audio": "long.wav",
            "text": f"zdanie {n}",
            "speaker": f"s{n}",
            "start": n / 2,
            "end": n / 2 + 0.4,
        }
        for n in range(12)
    ]
    source = tmp_path / "parts.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("data", "check", source, "--json") == 0
    (report,) = json.loads(capsys.readouterr().out)["splits"].values()
    assert report["total_duration_s"] == pytest.approx(4.8)
    assert report["duplicate_audio"]["count"] == 0
    assert run("data", "split", source, "-o", tmp_path / "out", "--dev", "2", "--test", "2") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dev.jsonl", "test.jsonl", "train.jsonl"]
    found = {one.id: one for name in ("train", "dev", "test") for one in list_examples(tmp_path / f"out/{name}.jsonl")}
    assert {name: (one.offset_s, round(one.duration_s, 6)) for name, one in found.items()} == {
        row["id"]: (row["start"], 0.4) for row in rows
    }
    samples = soundfile.read(tmp_path / "long.wav", dtype="float32")[0]
    for one in read_examples(tmp_path / "out/train.jsonl", cache_dir=tmp_path / "cache"):
        first = round(found[one.id].offset_s * 16_000)
        np.testing.assert_array_equal(soundfile.read(one.audio, dtype="float32")[0], samples[first : first + 6_400])
