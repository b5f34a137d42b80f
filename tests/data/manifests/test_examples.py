import csv
import hashlib
import io
import json
import sys
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mowa.data.manifests import discover, tables
from mowa.data.manifests.examples import list_examples, list_splits, read_examples
from mowa.errors import AudioError, DataError, HubUnreachable, MissingDependency
from mowa.types import Example

LAW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
RATE_HZ = 8_000


def sound(seconds=0.5, hz=300):
    return (0.3 * np.sin(2 * np.pi * hz * np.arange(int(seconds * RATE_HZ)) / RATE_HZ)).astype(np.float32)


def recording(path, seconds=0.5, hz=300):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, sound(seconds, hz), RATE_HZ)
    return path


def encoded(seconds=0.5, hz=300, format="WAV"):
    out = io.BytesIO()
    soundfile.write(out, sound(seconds, hz), RATE_HZ, format=format)
    return out.getvalue()


def lines(path, *objects):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in objects), encoding="utf-8")
    return path


def text(path, content, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(encoding))
    return path


def read(path, split="", **kwargs):
    return list(read_examples(path, split, **kwargs))


def read_error(path, split="", **kwargs):
    with pytest.raises(DataError) as caught:
        read(path, split, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- JSON lines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"id": "a", "audio": "clips/a.wav", "text": "tak", "duration_s": 0.25},
        {"audio_filepath": "clips/a.wav", "text": "tak", "duration": 0.25, "offset": 0},
        {"file_name": "clips/a.wav", "transcription": "tak", "duration": "0.25"},
        {"path": "clips/a.wav", "sentence": "tak", "duration_s": 0.25},
        {"Wav": "clips/a.wav", " Transcript ": "tak", "Duration": 0.25},
        {"file": "clips/a.wav", "normalized_text": "tak", "raw_text": "Tak!", "duration": 0.25},
        {"utt_id": "a", "path": "elsewhere.wav", "audio": "a.wav", "text": "tak", "sentence": "nie", "duration": 0.25},
    ],
)
def test_column_names(tmp_path, row):
    file = recording(tmp_path / "clips/a.wav", 0.25)
    assert read(lines(tmp_path / "m.jsonl", row)) == [Example("a", str(file), "tak", 0.25, {})]


def test_our_own_manifests(tmp_path, monkeypatch):
    row = {"id": "x-1", "audio": "audio/1.wav", "text": "tak", "duration_s": 0.5, "voice": "pl+f1", "rate": 150}
    manifest = lines(tmp_path / "train.jsonl", row)
    recording(tmp_path / "audio/1.wav")
    (ours,) = read(manifest)
    assert ours == Example("x-1", str(tmp_path / "audio/1.wav"), "tak", 0.5, {"voice": "pl+f1"})
    elsewhere = lines(tmp_path / "elsewhere/train.jsonl", row)  # its paths are relative to the working directory
    monkeypatch.chdir(tmp_path)
    assert read(elsewhere) == [ours]
    assert read("train.jsonl") == [ours]


def test_speakers_and_other_tags(tmp_path):
    recording(tmp_path / "a.wav")
    given = [
        {"speaker_id": 7, "sex": "female", "age": "", "accents": None, "locale": "pl"},
        {"client_id": "c0ffee", "gender": "male_masculine", "age": "twenties", "accent": "Podhale"},
        {"speaker": "EB0", "client_id": "other"},
    ]
    examples = read(lines(tmp_path / "m.jsonl", *({"path": "a.wav", "text": "tak"} | row for row in given)))
    assert [dict(example.tags) for example in examples] == [
        {"speaker": "7", "gender": "female", "language": "pl"},
        {"speaker": "c0ffee", "gender": "male_masculine", "age": "twenties", "accent": "Podhale"},
        {"speaker": "EB0"},
    ]


def test_ids_are_unique(tmp_path):
    recording(tmp_path / "a.wav")
    recording(tmp_path / "b/a.wav")
    given = [
        {"id": "x"},
        {"id": "x"},
        {"id": "x-2"},
        {"id": 0},
        {"id": ""},
        {"id": None, "audio": "b/a.wav"},
        {"id": "x"},
    ]
    examples = read(lines(tmp_path / "m.jsonl", *({"audio": "a.wav", "text": "tak"} | row for row in given)))
    assert [example.id for example in examples] == ["x", "x-2", "x-2-2", "0", "a", "a-2", "x-3"]


@LAW
@given(st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=5).filter(lambda t: any(map(str.strip, t))))
def test_texts_are_not_changed(tmp_path, texts):
    recording(tmp_path / "a.wav")
    given = [{"path": "a.wav", "sentence": text, "duration": 0.5} for text in texts]
    assert [example.text for example in read(lines(tmp_path / "m.jsonl", *given))] == texts
    for delimiter in ",;":
        with (tmp_path / "m.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(given[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(given)
        assert [example.text for example in read(tmp_path / "m.csv")] == texts


def test_splits_are_listed(tmp_path):
    recording(tmp_path / "a.wav")
    manifest = text(tmp_path / "m.csv", "path,text,split\na.wav,tak,train\na.wav,nie,validation\n")
    assert list_splits(manifest) == ["train", "validation"]
    assert list_splits(text(tmp_path / "n.csv", "path,text\na.wav,tak\n")) == []
    assert list_splits(tmp_path) == ["m", "n"]
    assert list_splits(tmp_path / "a.wav") == []


def test_rows_are_read_lazily(tmp_path):
    recording(tmp_path / "a.wav")
    manifest = lines(tmp_path / "m.jsonl", *[{"audio": "a.wav", "text": "tak"}] * 3)
    manifest.write_text(manifest.read_text() + "{broken\n")
    examples = read_examples(manifest)
    assert [example.id for example in islice(examples, 3)] == ["a", "a-2", "a-3"]
    with pytest.raises(DataError, match=r"m\.jsonl:4: broken JSON \(.*, column 2\)"):
        next(examples)


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.csv", 'path,sentence,duration\na.wav,"on rzekł: ""tak"", i już",0.5\n'),
        ("m.csv", '\ufeffpath;sentence;duration\r\na.wav;"on rzekł: ""tak"", i już";0.5\r\n'),
        ("m.CSV", 'sentence\tpath\tduration\n"on rzekł: ""tak"", i już"\ta.wav\t0.5\n'),
        ("m.tsv", 'path\tsentence\tduration\n\na.wav\ton rzekł: "tak", i już\t0.5\n'),
        ("m.tsv", '\ufeffPath\tSentence\tduration\tup\r\na.wav\ton rzekł: "tak", i już\t0.5\t2\r\n'),
        ("m.tsv", 'sentence\tpath\tduration\ton\non rzekł: "tak", i już\ta.wav\t0.5\n'),
    ],
)
def test_tables(tmp_path, name, content):
    file = recording(tmp_path / "a.wav")
    assert read(text(tmp_path / name, content)) == [Example("a", str(file), 'on rzekł: "tak", i już', 0.5, {})]


def test_quotes_in_a_tsv_are_text(tmp_path):
    recording(tmp_path / "a.wav")
    manifest = text(tmp_path / "m.tsv", 'path\tsentence\na.wav\t"tak\na.wav\tnie\u2028wiem\n')
    assert [example.text for example in read(manifest)] == ['"tak', "nie\u2028wiem"]


def test_errors_name_the_line_of_a_table(tmp_path):
    recording(tmp_path / "a.wav")
    manifest = text(tmp_path / "m.csv", 'path,text\na.wav,"dwie\nlinie"\nb.wav,tak\n')
    assert f"{manifest}:4: no recording b.wav" in read_error(manifest)


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def common_voice(tmp_path):
    folder = tmp_path / "cv/pl"
    header = "client_id\tpath\tsentence_id\tsentence\tup_votes\tage\tgender\taccents\tvariant\tlocale\tsegment\n"
    for at, split in enumerate(("train", "dev", "validated")):
        recording(folder / f"clips/{split}.mp3", 0.5 + at)
        row = f'c{at}\t{split}.mp3\thash\tTo "{split}".\t2\ttwenties\t\tPodhale\t\tpl\t\n'
        text(folder / f"{split}.tsv", header + row)
    text(folder / "reported.tsv", "sentence_id\tsentence\tlocale\treason\n")
    return folder


def test_common_voice(common_voice):
    (train,) = read(common_voice)
    assert train.audio == str(common_voice / "clips/train.mp3")
    assert (train.id, train.text) == ("train", 'To "train".')
    assert train.duration_s == pytest.approx(0.5, abs=0.15)  # MP3 pads
    assert train.tags == {"speaker": "c0", "age": "twenties", "accent": "Podhale", "language": "pl"}
    assert [example.id for example in read(common_voice, "validation")] == ["dev"]
    assert read(common_voice / "dev.tsv") == read(common_voice, "dev")
    text(common_voice / "clip_durations.tsv", "clip\tduration[ms]\ntrain.mp3\t4321\n")
    assert read(common_voice)[0].duration_s == 4.321
    message = read_error(common_voice, "test")
    assert message == f"{common_voice}: has no split test. Available splits: dev, train, validated."
    assert discover.detect_layout(common_voice).kind == "Common Voice"
    assert read(common_voice.parent) == read(common_voice)


def test_a_folder_with_transcripts(tmp_path):
    """The layout of nEMO: several text columns, of which the normalized one is used."""
    file = recording(tmp_path / "audio/EB0_1.flac")
    content = (
        "file\traw_text\tnormalized_text\tspeaker\tgender\tage\naudio/EB0_1.flac\tTak, tak.\ttak tak\tEB0\tfemale\t27\n"
    )
    text(tmp_path / "transcripts.tsv", content)
    expected = Example("EB0_1", str(file), "tak tak", 0.5, {"speaker": "EB0", "gender": "female", "age": "27"})
    assert read(tmp_path) == [expected]
    assert discover.detect_layout(tmp_path).kind == "folder with transcripts"
    assert "transcripts.tsv:2: split test was requested, but there is no column split" in read_error(tmp_path, "test")


def test_an_audiofolder(tmp_path):
    for split in ("train", "test"):
        recording(tmp_path / split / "a.wav")
        lines(tmp_path / split / "metadata.jsonl", {"file_name": "a.wav", "transcription": split})
    assert [example.text for example in read(tmp_path)] == ["train"]
    assert [example.text for example in read(tmp_path, "test")] == ["test"]
    assert [example.text for example in read(tmp_path / "test")] == ["test"]
    assert discover.detect_layout(tmp_path / "test").kind == "audiofolder"
    assert "has no split dev. Available splits: test, train" in read_error(tmp_path, "dev")


def test_a_folder_of_manifests(tmp_path):
    recording(tmp_path / "a.wav")
    for split in ("seen", "unseen"):
        lines(tmp_path / f"{split}.jsonl", {"audio": "a.wav", "text": split})
    assert [example.text for example in read(tmp_path, "unseen")] == ["unseen"]
    assert "has no split train. Available splits: seen, unseen" in read_error(tmp_path)
    lines(tmp_path / "train.jsonl", {"audio": "a.wav", "text": "train"})
    assert [example.text for example in read(tmp_path)] == ["train"]


def test_a_column_that_names_the_split(tmp_path):
    recording(tmp_path / "a.wav")
    manifest = text(tmp_path / "m.csv", "path,text,split\na.wav,tak,train\na.wav,nie,validation\n")
    assert [example.text for example in read(manifest, "dev")] == ["nie"]
    assert [example.text for example in read(manifest)] == ["tak", "nie"]
    assert "has no split test. Available splits: train, validation" in read_error(manifest, "test")


# --- files of the datasets library -----------------------------------------------------------------------------------

TEXTS = ["tak", "nie", "może"]


def table(audio="audio", **columns):
    """Return three recordings as bytes, and a data set of them whose names do not show the format."""
    import datasets

    sounds = [encoded(0.5), encoded(0.75, format="FLAC"), encoded(1.0, 500)]
    names = ["x/one.wav", "two.wav", None]
    cells = [{"bytes": data, "path": name} for data, name in zip(sounds, names, strict=True)]
    data = datasets.Dataset.from_dict({audio: cells, "sentence": TEXTS, **columns})
    return sounds, data.cast_column(audio, datasets.Audio())


def check(examples, sounds, cache):
    assert [example.text for example in examples] == TEXTS
    assert [example.duration_s for example in examples] == [0.5, 0.75, 1.0]
    assert [example.id for example in examples] == ["one", "two", "3"]
    for example, data, suffix in zip(examples, sounds, [".wav", ".flac", ".wav"], strict=True):
        file = Path(example.audio)
        assert file.is_relative_to(cache)
        assert file.read_bytes() == data
        assert file.suffix == suffix
        assert hashlib.sha256(data).hexdigest().startswith(file.stem)
    assert len([*cache.rglob("*.*")]) == 3


@pytest.mark.parametrize("audio", ["audio", "nagranie"])
def test_parquet(tmp_path, audio):
    sounds, data = table(audio, client_id=["a", "b", "b"], unused=[1, 2, 3])
    data.to_parquet(tmp_path / "x.parquet")
    cache = tmp_path / "cache"
    examples = read(tmp_path / "x.parquet", cache_dir=cache)
    check(examples, sounds, cache)
    assert [example.tags for example in examples] == [{"speaker": "a"}, {"speaker": "b"}, {"speaker": "b"}]
    before = {file: file.stat().st_mtime_ns for file in cache.rglob("*.*")}
    assert read(tmp_path / "x.parquet", cache_dir=cache) == examples
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*.*")} == before


def test_a_folder_of_parquet(tmp_path):
    sounds, data = table()
    for at in range(3):
        (tmp_path / "hub/data").mkdir(parents=True, exist_ok=True)
        (tmp_path / "parts").mkdir(exist_ok=True)
        data.select([at]).to_parquet(tmp_path / f"hub/data/train-0000{at}-of-00003.parquet")
        data.select([at]).to_parquet(tmp_path / f"parts/part-{at}.parquet")
    data.select([1]).to_parquet(tmp_path / "hub/data/validation-00000-of-00001.parquet")
    for folder in ("hub", "parts"):
        examples = read(tmp_path / folder, cache_dir=tmp_path / folder / "cache")
        assert [example.text for example in examples] == TEXTS
        assert [Path(example.audio).read_bytes() for example in examples] == sounds
    assert [example.text for example in read(tmp_path / "hub", "dev", cache_dir=tmp_path)] == ["nie"]


@pytest.mark.parametrize("kept_as", ["bytes", "files"])
def test_saved_to_disk(tmp_path, kept_as):
    import datasets

    sounds, data = table(extra=[1, 2, 3])
    if kept_as == "files":
        names = ["one.wav", "two.wav", "3.wav"]
        for name, content in zip(names, sounds, strict=True):
            (tmp_path / name).write_bytes(content)
        cells = {"audio": [str(tmp_path / name) for name in names], "sentence": TEXTS}
        data = datasets.Dataset.from_dict(cells).cast_column("audio", datasets.Audio(sampling_rate=16_000))
    data.with_format("pandas").save_to_disk(tmp_path / "one")
    check(read(tmp_path / "one", cache_dir=tmp_path / "cache"), sounds, tmp_path / "cache")
    datasets.DatasetDict({"train": data, "test": data.select([2])}).save_to_disk(tmp_path / "several")
    check(read(tmp_path / "several", cache_dir=tmp_path / "cache"), sounds, tmp_path / "cache")
    assert [example.text for example in read(tmp_path / "several", "test", cache_dir=tmp_path / "cache")] == ["może"]
    assert "has no split dev. Available splits: test, train" in read_error(tmp_path / "several", "dev")
    (file,) = (tmp_path / "one").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:100])
    assert f"{tmp_path / 'one'}: is damaged (" in read_error(tmp_path / "one")


# --- the Hub, replaced by a folder ------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return a folder that datasets reads instead of owner/name on the Hub, and the calls of the builder."""
    import datasets

    repo, calls = tmp_path / "repo", []
    build = datasets.load_dataset_builder

    def load_dataset_builder(name, config=None, *, revision=None):
        calls.append((name, config, revision))
        return build(str(repo), config, cache_dir=str(tmp_path / "hf"))

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    monkeypatch.chdir(tmp_path)
    (repo / "data").mkdir(parents=True)
    return repo, calls


def test_a_stream_of_parquet(hub, tmp_path):
    repo, calls = hub
    sounds, data = table(unused=[1, 2, 3])
    data.to_parquet(repo / "data/train-00000-of-00001.parquet")
    data.select([1]).to_parquet(repo / "data/validation-00000-of-00001.parquet")
    check(read("hub:owner/name", cache_dir=tmp_path / "cache"), sounds, tmp_path / "cache")
    assert [example.text for example in read("hub:owner/name@v1.0:default", "dev", cache_dir=tmp_path)] == ["nie"]
    assert calls == [("owner/name", None, None), ("owner/name", "default", "v1.0")]
    message = read_error("hub:owner/name", "test")
    assert message == "hub:owner/name: has no split test. Available splits: train, validation."
    assert read_error("hub:owner/name:pl").startswith(
        "hub:owner/name:pl: cannot be streamed (BuilderConfig 'pl' not found"
    )


def test_a_stream_of_an_audiofolder(hub, tmp_path):
    """An audiofolder read through datasets equals the same folder read directly."""
    repo, _ = hub
    rows = []
    for at, word in enumerate(TEXTS):
        recording(repo / f"data/{at}.wav", 0.5 + at)
        rows.append({"file_name": f"{at}.wav", "transcription": word, "speaker_id": at})
    lines(repo / "data/metadata.jsonl", *rows)
    examples = read("hub:owner/name", cache_dir=tmp_path / "cache")
    assert [example.text for example in examples] == TEXTS
    assert examples == read(repo / "data")


def test_a_stream_of_tars(hub, tmp_path):
    repo, _ = hub
    sounds = [encoded(0.5), encoded(0.75, format="FLAC")]
    with tarfile.open(repo / "data/train-0000.tar", "w") as tar:
        for at, data in enumerate(sounds):
            for suffix, content in (("wav", data), ("txt", TEXTS[at].encode())):
                member = tarfile.TarInfo(f"s{at}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    examples = read("hub:owner/name", cache_dir=tmp_path / "cache")
    assert [(example.id, example.text) for example in examples] == [("s0", "tak"), ("s1", "nie")]
    assert [Path(example.audio).read_bytes() for example in examples] == sounds


def test_a_remote_recording(hub, tmp_path):
    import datasets
    import fsspec

    repo, _ = hub
    memory = fsspec.filesystem("memory")
    memory.pipe("/mowa-test/a.wav", encoded())
    data = datasets.Dataset.from_dict({"audio": ["memory://mowa-test/a.wav"], "text": ["tak"]})
    data.to_parquet(repo / "data/train-00000-of-00001.parquet")
    (example,) = read("hub:owner/name", cache_dir=tmp_path / "cache")
    assert (example.id, Path(example.audio).read_bytes()) == ("a", encoded())
    message = read_error(repo / "data/train-00000-of-00001.parquet")
    assert "memory://mowa-test/a.wav is a URL, and URLs in manifests are not read" in message
    memory.rm("/mowa-test", recursive=True)


def test_listing_the_hub(hub, tmp_path):
    """Bytes are listed undecoded and not cached; URLs are fetched, or kept if that fails."""
    import datasets
    import fsspec

    repo, _ = hub
    sounds, data = table()
    data.to_parquet(repo / "data/train-00000-of-00001.parquet")
    found = list(list_examples("hub:owner/name"))
    assert [(example.id, example.text, example.audio_bytes) for example in found] == list(
        zip(("one", "two", "3"), TEXTS, sounds, strict=True)
    )
    assert [example.audio for example in found] == ["x/one.wav", "two.wav", "hub:owner/name: row 3"]
    fsspec.filesystem("memory").pipe("/mowa-test/a.wav", encoded())
    addresses = ["memory://mowa-test/a.wav", "memory://mowa-test/gone.wav"]
    remote = datasets.Dataset.from_dict({"audio": addresses, "sentence": ["tak", "nie"]})
    remote.to_parquet(repo / "data/test-00000-of-00001.parquet")
    assert list_splits("hub:owner/name") == ["test", "train"]
    found = list(list_examples("hub:owner/name", "test"))
    assert [(example.audio, example.audio_bytes) for example in found] == [
        (addresses[0], encoded()),
        (addresses[1], None),
    ]
    local = list(list_examples(repo / "data/test-00000-of-00001.parquet"))
    assert [(example.audio, example.audio_bytes) for example in local] == [(address, None) for address in addresses]
    fsspec.filesystem("memory").rm("/mowa-test", recursive=True)


def test_an_unreachable_hub(tmp_path, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachable, match="hub:owner/name-of-nothing: the Hub cannot be reached"):
        read("hub:owner/name-of-nothing")
    assert "is not a Hub data set. Write hub:owner/name" in read_error("hub:a/b/c")
    (tmp_path / "owner/name").mkdir(parents=True)
    assert "hub:owner/name: the folder owner/name exists here" in read_error("hub:owner/name")


@pytest.mark.parametrize(("missing", "name"), [("datasets", "hub:owner/name"), ("pyarrow.parquet", "x.parquet")])
def test_the_library_is_optional(tmp_path, monkeypatch, missing, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.parquet").touch()
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingDependency, match=r"pip install 'mowa\[data\]'"):
        read(name)


# --- durations --------------------------------------------------------------------------------------------------------


def test_durations(tmp_path):
    recording(tmp_path / "a.wav", 1.25)
    given = [{"duration": 0.5}, {"duration": None}, {"duration": "?"}, {"duration": 0}, {"duration": float("nan")}, {}]
    manifest = lines(tmp_path / "m.jsonl", *({"audio": "a.wav", "text": "tak"} | row for row in given))
    assert [example.duration_s for example in read(manifest)] == [0.5, 1.25, 1.25, 1.25, 1.25, 1.25]
    lines(manifest, {"audio": "a.wav", "text": "tak", "duration": 1250})
    message = read_error(manifest)
    assert message == f"{manifest}:1: duration is 1250, but the recording has 1.25 s. Write it in seconds."


def test_a_header_without_duration(tmp_path):
    import av

    with av.open(str(tmp_path / "a.aac"), "w", format="adts") as container:
        track = container.add_stream("aac", rate=RATE_HZ, layout="mono")
        samples = sound(1.5)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = RATE_HZ
        for part in (frame, None):
            container.mux(track.encode(part))
    (example,) = read(lines(tmp_path / "m.jsonl", {"audio": "a.aac", "text": "tak"}))
    assert example.duration_s == pytest.approx(1.5, abs=0.3)


def test_a_recording_that_is_not_audio(tmp_path):
    text(tmp_path / "a.wav", "to nie jest dźwięk")
    manifest = lines(tmp_path / "m.jsonl", {"audio": "a.wav", "text": "tak"})
    with pytest.raises(AudioError, match=r"m\.jsonl:1: .*a\.wav: is not audio"):
        read(manifest)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", ": is empty: it has no rows"),
        ("\n\n", ": is empty: it has no rows"),
        ("[1]\n", ": row 1 is not a JSON object"),
        ("1\n", ":1: is not a JSON object"),
        ('{"audio": "a.wav"', ":1: broken JSON"),
        ('{"sound": "a.wav", "text": "tak"}', ":1: no column for audio. Recognized names: audio, audio_fil"),
        ('{"sound": "a.wav", "text": "tak"}', "Columns: 'sound', 'text'."),
        ('{"audio": "a.wav", "words": "tak"}', ":1: no column for text. Recognized names: text, sentence, tran"),
        ('{"audio": "a.wav", "text": 5}', ":1: text is 5, not a string"),
        ('{"audio": "a.wav", "text": ""}\n{"audio": "a.wav", "text": null}', ": text is empty in all 2 rows read"),
        ('{"audio": "a.wav", "text": " "}\n' * 200, ": text is empty in all 100 rows read"),
        ('{"audio": "b.wav", "text": "tak"}', ":1: no recording b.wav in "),
        ('{"audio": "", "text": "tak"}', ":1: has no recording"),
        ('{"audio": ["a.wav"], "text": "tak"}', ":1: has no recording"),
        ('{"audio": "https://x.org/a.wav", "text": "tak"}', ":1: https://x.org/a.wav is a URL"),
        ('{"audio": "a.wav", "text": "tak", "offset": 2.5}', ":1: has an offset (2.5) without a duration"),
    ],
)
def test_invalid_lines_raise(tmp_path, content, message):
    recording(tmp_path / "a.wav")
    assert message in read_error(text(tmp_path / "m.jsonl", content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", ": is empty: it has no rows"),
        ("path,text\n", ": is empty: it has no rows"),
        ("path,text\na.wav,tak, tak\n", ":2: has 3 columns, the header 2. Quote texts"),
        ("path,text\na.wav\n", ":2: no column for text"),
        ("a.wav,tak\na.wav,nie\n", "Columns: 'a.wav', 'tak'"),
    ],
)
def test_invalid_tables_raise(tmp_path, content, message):
    recording(tmp_path / "a.wav")
    assert message in read_error(text(tmp_path / "m.csv", content))


def test_text_that_is_not_utf8(tmp_path):
    recording(tmp_path / "a.wav")
    manifest = text(tmp_path / "m.tsv", "path\tsentence\na.wav\ttak\na.wav\tżółw\n", "cp1250")
    assert f"{manifest}:3: is not UTF-8 (byte 0xbf). Save it as UTF-8" in read_error(manifest)
    manifest = text(tmp_path / "m.csv", "path,sentence\na.wav,tak\n", "utf-16")
    assert f"{manifest}:1: is not UTF-8 (byte 0xff)" in read_error(manifest)


def test_texts_are_optional_without_require_text(tmp_path):
    recording(tmp_path / "a.wav")
    manifest = lines(tmp_path / "m.jsonl", {"audio": "a.wav"}, {"audio": "a.wav", "text": None})
    assert [example.text for example in read(manifest, require_text=False)] == ["", ""]
    some = lines(tmp_path / "some.jsonl", {"audio": "a.wav", "text": ""}, {"audio": "a.wav", "text": "tak"})
    assert [example.text for example in read(some)] == ["", "tak"]


def test_unsupported_sources_raise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_error("gone.jsonl") == "gone.jsonl: no such file or folder. Check the spelling."
    assert "or write hub:owner/name if it is on the Hub" in read_error("owner/name")
    recording(tmp_path / "sounds/a.wav")
    for source in ("sounds", "sounds/a.wav", "."):
        assert f"{source}: is not a supported source. Supported: {discover.SUPPORTED_DATASETS}" in read_error(source)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    assert "x.parquet: is not a parquet file, or is damaged" in read_error("x.parquet")


def test_a_cache_that_cannot_be_written(tmp_path):
    _, data = table()
    data.to_parquet(tmp_path / "x.parquet")
    (tmp_path / "cache").touch()
    assert "cache: cannot be written" in read_error(tmp_path / "x.parquet", cache_dir=tmp_path / "cache")


def test_column_aliases_are_distinct():
    names = [name for known in tables.COLUMN_ALIASES.values() for name in known]
    assert len(names) == len(set(names))
    assert all(name == name.strip().lower() for name in names)
