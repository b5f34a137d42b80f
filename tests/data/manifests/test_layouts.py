"""Every supported layout, as real files: the same three recordings and texts are read from all of them."""

import csv
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mowa
from mowa.data import audio
from mowa.data.audio.decoders import AudioBytes
from mowa.data.manifests import discover, kaldi
from mowa.data.manifests.examples import list_examples, list_splits, read_examples
from mowa.errors import DataError
from mowa.types import Example
from tests.unprivileged import unprivileged

LAW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
FILES = ("a.flac", "b.mp3", "c.wav")
IDS = ("a", "b", "c")
TEXTS = ("tak", 'nie "ma"', "może, później")
SPEAKERS = ("s1", "s2", "s1")
LHOTSE_CUTS = [json.loads(line) for line in Path(__file__).with_name("lhotse-cuts.jsonl").read_text().splitlines()]
"""Written by lhotse 1.33.0 (CutSet.to_file): three whole recordings, an excerpt, a MultiCut of two channels, one of two
channels, a MixedCut, a padded cut, one with changed speed and a resampled one."""


@pytest.fixture(scope="session")
def spoken():
    samples, rate_hz = soundfile.read(Path(mowa.__file__).parent / "assets/sample.flac", dtype="float32")
    third = len(samples) // 3
    return [samples[at * third : (at + 1) * third] for at in range(3)], rate_hz


@pytest.fixture(scope="session")
def clips(spoken, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for name, samples in zip(FILES, spoken[0], strict=True):
        soundfile.write(folder / name, samples, spoken[1])
    return folder


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def tsv(rows):
    return "".join("\t".join(map(str, row)) + "\n" for row in rows)


def write_tar(path, members, mode="w"):
    """Write a tar of (name, bytes), in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def sounds(folder):
    return [(folder / name).read_bytes() for name in FILES]


def rows(audio="audio", **more):
    return [
        {audio: name, "text": text, "speaker": speaker} | more
        for name, text, speaker in zip(FILES, TEXTS, SPEAKERS, strict=True)
    ]


COMMON_VOICE = tsv(
    [("client_id", "path", "sentence_id", "sentence", "up_votes", "locale")]
    + [(who, name, "hash", text, 2, "pl") for name, text, who in zip(FILES, TEXTS, SPEAKERS, strict=True)]
)
SHORT = tsv([("client_id", "path", "sentence"), ("s1", "a.flac", TEXTS[0])])


def mozilla(clips, *, tables_first):
    root = "cv-corpus-21.0-2025-03-14/pl"
    listed = [(f"{root}/train.tsv", COMMON_VOICE.encode()), (f"{root}/dev.tsv", SHORT.encode())]
    listed.append((f"{root}/clip_durations.tsv", b"clip\tduration[ms]\na.flac\t4118\n"))
    other = [(f"{root}/clips/.hidden.mp3", b"?"), (f"{root}/clips/other.mp3", b"not in this split")]
    recordings = other + [(f"{root}/clips/{name}", data) for name, data in zip(FILES, sounds(clips), strict=True)]
    return listed + recordings if tables_first else recordings + listed


def shard(clips, *, as_json=False):
    members = []
    for name, data, text, speaker in zip(FILES, sounds(clips), TEXTS, SPEAKERS, strict=True):
        key = name[0]
        fields = json.dumps({"text": text, "speaker": speaker, "audio": "old/path.wav", "offset": 31.5}).encode()
        beside = [(f"{key}.json", fields)] if as_json else [(f"{key}.txt", text.encode())]
        members += [(name, data), *beside]
    return members


def by_jsonl(tmp, clips):
    return write(clips / "ours.jsonl", jsonl(rows(id=None)))


def by_nemo(tmp, clips):
    given = [{"audio_filepath": str(clips / row["audio"]), "text": row["text"], "duration": 4.118} for row in rows()]
    return write(tmp / "manifest.json", jsonl(given))


def by_packed_jsonl(tmp, clips):
    return write(tmp / "m.jsonl.gz", gzip.compress(jsonl(at(clips)).encode()))


def at(clips, audio="audio"):
    return [{**row, audio: str(clips / row["audio"])} for row in rows()]


def by_csv(tmp, clips):
    out = io.StringIO()
    writer = csv.DictWriter(out, ["audio", "text", "speaker"])
    writer.writeheader()
    writer.writerows(at(clips))
    return write(tmp / "m.csv", out.getvalue())


def by_tsv(tmp, clips):
    return write(tmp / "m.tsv", tsv([("path", "sentence"), *((row["audio"], row["text"]) for row in at(clips))]))


def by_parquet(tmp, clips):
    data_set(clips).to_parquet(tmp / "train.parquet")
    return tmp / "train.parquet"


def data_set(clips):
    import datasets

    cells = [{"bytes": data, "path": name} for name, data in zip(FILES, sounds(clips), strict=True)]
    return datasets.Dataset.from_dict({"audio": cells, "text": list(TEXTS), "speaker_id": list(SPEAKERS)}).cast_column(
        "audio", datasets.Audio()
    )


def by_saved(tmp, clips):
    import datasets

    datasets.DatasetDict({"train": data_set(clips), "test": data_set(clips)}).save_to_disk(tmp / "saved")
    return tmp / "saved"


def by_arrow(tmp, clips):
    data_set(clips).save_to_disk(tmp / "saved")
    (file,) = (tmp / "saved").glob("*.arrow")
    return file.rename(tmp / "set-train.arrow")


def by_arrow_folder(tmp, clips):
    by_arrow(tmp, clips)
    shutil.rmtree(tmp / "saved")
    shutil.copy(tmp / "set-train.arrow", tmp / "set-test.arrow")
    return tmp


def by_audiofolder(tmp, clips):
    shutil.copytree(clips, tmp / "train")
    write(tmp / "train/metadata.jsonl", jsonl(rows("file_name")).replace('"text"', '"transcription"'))
    return tmp


def by_common_voice(tmp, clips):
    shutil.copytree(clips, tmp / "pl/clips")
    write(tmp / "pl/train.tsv", COMMON_VOICE)
    write(tmp / "pl/dev.tsv", SHORT)
    return tmp / "pl"


def by_common_voice_tar(tmp, clips):
    return write_tar(tmp / "cv.tar", mozilla(clips, tables_first=True))


def by_common_voice_tar_last(tmp, clips):
    return write_tar(tmp / "cv.tar", mozilla(clips, tables_first=False))


def by_common_voice_tar_gz(tmp, clips):
    return write_tar(tmp / "cv.tar.gz", mozilla(clips, tables_first=True), "w:gz")


def by_common_voice_tgz_last(tmp, clips):
    return write_tar(tmp / "cv.tgz", mozilla(clips, tables_first=False), "w:gz")


def by_shard(tmp, clips):
    return write_tar(tmp / "x.tar", shard(clips))


def by_shards(tmp, clips):
    members = shard(clips, as_json=True)
    for number in range(3):
        write_tar(tmp / f"shards/train-{number:06}.tar", members[2 * number : 2 * number + 2])
    return str(tmp / "shards/train-{000000..000002}.tar")


def by_folder_of_shards(tmp, clips):
    by_shards(tmp, clips)
    write_tar(tmp / "shards/test-000000.tar.gz", shard(clips)[:2], "w:gz")
    return tmp / "shards"


def by_kaldi(tmp, clips):
    folder = tmp / "data/train"
    write(folder / "wav.scp", "".join(f"{id} {clips / name}\n" for id, name in zip(IDS, FILES, strict=True)))
    write(folder / "text", "".join(f"{id} {text}\n" for id, text in zip(IDS, TEXTS, strict=True)))
    write(folder / "utt2spk", "".join(f"{id} {who}\n" for id, who in zip(IDS, SPEAKERS, strict=True)))
    return folder


def by_kaldi_segments(tmp, clips):
    folder = by_kaldi(tmp, clips)
    write(folder / "segments", "".join(f"{id} {id} 0.00 4.10\n" for id in IDS))
    return folder


def by_kaldi_unsorted(tmp, clips):
    folder = by_kaldi(tmp, clips)
    write(folder / "text", "".join(f"{id}\t{text}\n" for id, text in zip(IDS[::-1], TEXTS[::-1], strict=True)))
    return tmp / "data"


def by_cuts(tmp, clips):
    return write(clips / "whole.jsonl", jsonl(with_texts(LHOTSE_CUTS[:3])))


def by_packed_cuts(tmp, clips):
    shutil.copytree(clips, tmp / "x", ignore=shutil.ignore_patterns("*.jsonl"))
    write(tmp / "x/pl_cuts_train.jsonl.gz", gzip.compress(jsonl(with_texts(LHOTSE_CUTS[:3])).encode()))
    write(tmp / "x/pl_supervisions_train.jsonl.gz", gzip.compress(b'{"id": "a"}\n'))
    return tmp / "x"


def with_texts(cuts):
    for cut, text in zip(cuts, TEXTS, strict=True):
        cut["supervisions"][0]["text"] = text
    return cuts


FORMATS = [value for name, value in list(globals().items()) if name.startswith("by_")]


def entries(sources, split="", **kwargs):
    return list(list_examples(sources, split, **kwargs))


def load(example):
    source = example.audio if example.audio_bytes is None else AudioBytes(example.audio, example.audio_bytes)
    return audio.load_audio(
        source, offset_s=example.offset_s, duration_s=example.duration_s if example.is_excerpt else None
    )


def read_error(sources, split="", **kwargs):
    with pytest.raises(DataError) as caught:
        entries(sources, split, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("shape", FORMATS, ids=lambda shape: shape.__name__.removeprefix("by_"))
def test_every_layout_is_read_alike(tmp_path, clips, spoken, shape):
    name = shape(tmp_path, clips)
    found = entries(name)
    assert [(example.id, example.text) for example in found] == list(zip(IDS, TEXTS, strict=True))
    for example, samples in zip(found, spoken[0], strict=True):
        got = load(example)
        assert abs(len(got) - len(samples)) < 0.15 * spoken[1]
        length = min(len(got), len(samples))
        assert np.corrcoef(got[:length], samples[:length])[0, 1] > (0.999 if "b." not in example.audio else 0.9)
    if speakers := [example.tags["speaker"] for example in found if "speaker" in example.tags]:
        assert speakers == list(SPEAKERS)
    files = list(read_examples(name, cache_dir=tmp_path / "cache"))
    assert [(example.id, example.text) for example in files] == list(zip(IDS, TEXTS, strict=True))
    assert all(Path(example.audio).is_file() and example.audio_bytes is None for example in files)
    assert [example.duration_s for example in files] == pytest.approx([len(s) / spoken[1] for s in spoken[0]], abs=0.1)


def test_layout_kinds(tmp_path, clips):
    kinds = {
        shape.__name__[3:]: discover.detect_layout(shape(tmp_path / shape.__name__, clips)).kind for shape in KINDS
    }
    assert kinds == {
        "common_voice": "Common Voice",
        "kaldi": "Kaldi directory",
        "shard": "archive",
        "folder_of_shards": "archives",
        "packed_cuts": "folder of manifests",
    }


KINDS = [by_common_voice, by_kaldi, by_shard, by_folder_of_shards, by_packed_cuts]


@pytest.mark.parametrize("shape", [by_common_voice, by_common_voice_tar, by_common_voice_tgz_last, by_folder_of_shards])
def test_splits(tmp_path, clips, shape):
    name = shape(tmp_path, clips)
    other = "test" if shape is by_folder_of_shards else "dev"
    assert [example.text for example in entries(name, other)] == [TEXTS[0]]
    assert list_splits(name) == sorted(["train", other])
    assert f"has no split odd. Available splits: {', '.join(sorted(['train', other]))}" in read_error(name, "odd")


# --- audio files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path, clips, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for at, name in enumerate(("b/2.wav", "b/10.wav", "a.FLAC", "b/a/x.wav", ".hidden/y.wav", "b/.z.wav")):
        write(tmp_path / "in" / name, sounds(clips)[at % 3])
    write(tmp_path / "in/README.txt", "not audio")
    os.symlink(tmp_path / "in/b", tmp_path / "in/b/loop")
    return tmp_path / "in"


def test_audio_folders(tree):
    found = entries("in")
    assert [example.id for example in found] == ["a", "b/10", "b/2", "b/a/x"]
    assert [example.audio for example in found] == [
        str(tree / name) for name in ("a.FLAC", "b/10.wav", "b/2.wav", "b/a/x.wav")
    ]
    assert all((example.text, example.duration_s, example.audio_bytes) == ("", 0, None) for example in found)
    assert entries(tree) == found
    assert "in: has no split test: recordings without a table have none" in read_error("in", "test")
    assert [example.id for example in read_examples("in", require_text=False)] == ["a", "b/10", "b/2", "b/a/x"]
    with pytest.raises(DataError, match="in: is not a supported source"):
        next(read_examples("in"))


def test_files_and_patterns(tree):
    def ids(*names):
        return [example.id for example in entries(names)]

    assert ids("in/a.FLAC", "in/b") == ["in/a", "10", "2", "a/x"]
    assert ids("in/b/*.wav") == ids("in/b/*") == ["in/b/10", "in/b/2"]
    assert ids("in/**/*.wav")[:3] == ["in/b/10", "in/b/2", "in/b/a/x"]
    assert ids("in/{a,b/{2..2}}.*") == ["in/a", "in/b/2"]
    assert ids("in/b/{2,10}.wav") == ["in/b/2", "in/b/10"]
    assert ids("in/[b]") == ["10", "2", "a/x"]
    assert ids("in/b/2.wav", "in/b/2.wav", "in/b") == ["in/b/2", "in/b/2-2", "10", "2", "a/x"]
    assert "in/*.ogg: matches nothing. Check the spelling" in read_error("in/*.ogg")
    assert "in/*.txt: matches no supported file" in read_error("in/*.txt")
    assert "in/nothing: no such file or folder" in read_error("in/nothing")
    (tree / "[b].wav").write_bytes(b"")
    assert ids("in/[b].wav") == ["in/[b]"]  # an existing name is not a pattern


def test_listing_opens_no_recording(tree):
    (gone,) = entries("gone.wav")
    assert gone == Example("gone", str(tree.parent / "gone.wav"), "", 0)
    write(tree / "broken.wav", b"")
    os.mkfifo(tree / "pipe.wav")  # opening it would hang
    assert {"broken", "pipe"} < {example.id for example in entries("in")}
    manifest = write(tree.parent / "m.jsonl", jsonl([{"audio": "in/pipe.wav"}, {"audio": "in/gone.wav"}]))
    assert [example.audio for example in entries(manifest)] == [str(tree / "pipe.wav"), str(tree / "gone.wav")]


def test_unreadable_files_and_folders_raise(tree):
    manifest = write(tree.parent / "m.jsonl", jsonl([{"audio": "in/a.FLAC"}]))
    archive = write_tar(tree.parent / "x.tar", [("a.wav", b"?")])
    for path in (manifest, archive, tree / "b"):
        path.chmod(0)
    try:
        with unprivileged():
            assert read_error(manifest) == f"{manifest}: cannot be read (Permission denied). Check its permissions."
            assert read_error(archive) == f"{archive}: cannot be read (Permission denied). Check its permissions."
            for source in ("in", "in/b", "in/b/2.wav"):
                assert ": cannot be read (Permission denied). Check its permissions." in read_error(source)
    finally:
        (tree / "b").chmod(0o700)


def test_several_sources_in_a_row(tmp_path, clips):
    names = [by_common_voice(tmp_path / "1", clips), by_shard(tmp_path / "2", clips), str(clips / "a.flac")]
    assert [example.id for example in entries(names)] == [*IDS, "a-2", "b-2", "c-2", str(clips / "a")]
    broken = iter(list_examples([names[0], tmp_path / "gone.jsonl"]))
    assert [example.id for example in islice(broken, 3)] == list(IDS)
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file"):
        next(broken)


def test_a_results_log_is_not_a_manifest(tree):
    write(tree / "out.jsonl", '{"results": 2, "model": {}}\n{"id": "a", "file": "a.FLAC", "text": "tak"}\n')
    assert [example.id for example in entries("in")] == ["a", "b/10", "b/2", "b/a/x"]


# --- columns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "tar"])
def test_columns_are_named(tmp_path, clips, kind):
    import datasets

    given = [{"clip": str(clips / row["audio"]), "said": row["text"], "path": "x", "text": "no"} for row in rows()]
    if kind == "jsonl":
        name = write(tmp_path / "m.jsonl", jsonl(given))
    elif kind == "csv":
        name = write(tmp_path / "m.tsv", tsv([list(given[0]), *(row.values() for row in given)]))
    elif kind == "tar":
        short = [{**row, "clip": Path(row["clip"]).name} for row in given]
        table = tsv([list(given[0]), *(row.values() for row in short)]).encode()
        members = [(f"audio/{file}", data) for file, data in zip(FILES, sounds(clips), strict=True)]
        name = write_tar(tmp_path / "x.tar", [("audio/train.tsv", table), *members])
    else:
        datasets.Dataset.from_list(given).to_parquet(tmp_path / "m.parquet")
        name = tmp_path / "m.parquet"
    found = entries(name, columns={"audio": "clip", "text": "said"})
    assert [(example.id, example.text) for example in found] == list(zip(IDS, TEXTS, strict=True))
    assert all(len(load(example)) for example in found)
    assert "there is no column words, requested as text. Columns: " in read_error(
        name, columns={"audio": "clip", "text": "words"}
    )
    assert "unknown column role sound. Roles: audio, text, id" in read_error(name, columns={"sound": "clip"})


def test_a_named_audio_column(tmp_path, clips):
    data = data_set(clips).rename_column("audio", "nagranie").add_column("path", ["x"] * 3)
    data.to_parquet(tmp_path / "m.parquet")
    found = entries(tmp_path / "m.parquet", columns={"audio": "nagranie"})
    assert [example.audio_bytes for example in found] == sounds(clips)


def test_require_text(tmp_path, clips):
    name = write(clips / "mute.jsonl", jsonl({"audio": name} for name in FILES))
    assert [example.text for example in entries(name)] == ["", "", ""]
    assert "no column for text" in read_error(name, require_text=True)


# --- excerpts ---------------------------------------------------------------------------------------------------------


def test_excerpts(tmp_path, clips, spoken):
    given = [{"offset": 0, "duration": 1.5}, {"offset": "1.5", "duration": 0.5}, {"offset": None}, {"duration": 4.1}]
    name = write(clips / "parts.jsonl", jsonl({"audio_filepath": "a.flac"} | row for row in given))
    found = entries(name)
    assert [(example.offset_s, example.duration_s, example.is_excerpt) for example in found] == [
        (0, 1.5, True),
        (1.5, 0.5, True),
        (0, 0, False),
        (0, 4.1, False),
    ]
    np.testing.assert_allclose(load(found[1]), spoken[0][0][24_000:32_000], atol=2**-15)
    for row in ({"offset": 1}, {"offset": 1, "duration": 0}, {"offset": -1, "duration": 2}):
        write(clips / "wrong.jsonl", jsonl([{"audio": "a.flac"} | row]))
        assert f"wrong.jsonl:1: has an offset ({row['offset']}) without" in read_error(clips / "wrong.jsonl")


# --- Kaldi ------------------------------------------------------------------------------------------------------------


def test_kaldi_segments(tmp_path, clips):
    folder = write(tmp_path / "wav.scp", f"r1 {clips / 'a.flac'}\nr2  {clips / 'c.wav'}\n").parent
    write(folder / "segments", "u1 r2 0.5 1.25\nu2 r1 0.0 -1\nu3 r2 2 -1\nu4 r1 1e-1 3\n")
    write(folder / "reco2dur", "r1 4.118\nr2 4.118\n")
    write(folder / "text", "u1 tak nie\nu3\nu4 może\nu9 nikt\n")
    found = entries(folder)
    assert [
        (example.id, example.text, example.offset_s, example.duration_s, example.is_excerpt) for example in found
    ] == [
        ("u1", "tak nie", 0.5, 0.75, True),
        ("u2", "", 0, 4.118, False),
        ("u3", "", 2, 2.118, True),
        ("u4", "może", 0.1, 2.9, True),
    ]
    assert len(load(found[0])) == 12_000


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("wav.scp", "b sox b.mp3 -t wav - |\n", "wav.scp:1: is a command (sox b.mp3 -t wav - |), and commands"),
        ("wav.scp", "a |cat a.wav\n", "wav.scp:1: is a command"),
        ("wav.scp", "a wav.ark:1234\n", "wav.scp:1: wav.ark:1234 is inside a Kaldi archive"),
        ("wav.scp", "a\n", "wav.scp:1: has no recording"),
        ("segments", "u a 0\n", "segments:1: is not a segment. Expected: utterance"),
        ("segments", "u a null 2\n", "segments:1: null is not a number of seconds. Write seconds"),
        ("segments", "u a 0 nan\n", "segments:1: 0 to nan s is not a segment"),
        ("segments", "u\n", "segments:1: is not a segment. Expected: utterance"),
        ("segments", "u a 2 1\n", "segments:1: 2 to 1 s is not a segment"),
        ("segments", "u b 0 1\n", "segments:1: recording b is not in wav.scp"),
        ("segments", "u a 1 -1\n", "segments:1: ends with its recording (-1), whose duration is not in reco2dur"),
        ("text", "a \udcff\n", "text:1: is not UTF-8 (byte 0xff)"),
        ("wav.scp", "", ": is empty"),
    ],
)
def test_invalid_kaldi_directories_raise(tmp_path, file, content, message):
    write(tmp_path / "wav.scp", "a a.wav\n")
    write(tmp_path / file, content.encode(errors="surrogateescape"))
    assert message in read_error(tmp_path)


def test_sorted_kaldi_files_are_not_kept_in_memory(tmp_path):
    """Sorted files are not read further than needed."""
    count = 5_000
    write(tmp_path / "wav.scp", "".join(f"u{at:06} {at}.wav\n" for at in range(count)))
    write(tmp_path / "text", "".join(f"u{at:06} tekst {at}\n" for at in range(count)))
    found = kaldi.read_kaldi(tmp_path)
    assert [fields["text"] for _, _, fields in islice(found, 3)] == ["tekst 0", "tekst 1", "tekst 2"]
    look_up = kaldi._open_lookup(tmp_path / "text")
    closure = look_up.__closure__
    assert [look_up(f"u{at:06}") for at in (0, 7, 3, 8)] == ["tekst 0", "tekst 7", "tekst 3", "tekst 8"]
    sizes = [len(cell.cell_contents) for cell in closure if isinstance(cell.cell_contents, dict)]
    assert sizes == [5]


# --- lhotse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (5, "is channel 1 of 2, and single channels are not supported"),
        (6, "is a MixedCut, which needs lhotse"),
        (7, "is a MixedCut"),
        (8, "its recording has transforms (Speed), which need lhotse"),
    ],
)
def test_cuts_that_need_lhotse_raise(tmp_path, number, message):
    assert f"m.jsonl:1: {message}" in read_error(write(tmp_path / "m.jsonl", jsonl([LHOTSE_CUTS[number]])))


def test_excerpts_and_channels_of_cuts(tmp_path, clips):
    part, channels, resampled = entries(
        write(clips / "m.jsonl", jsonl([LHOTSE_CUTS[3], LHOTSE_CUTS[4], LHOTSE_CUTS[9]]))
    )
    assert (part.id, part.offset_s, part.duration_s, part.is_excerpt) == ("a-1", 0.25, 0.5, True)
    assert part.tags == {"speaker": "s1", "language": "pl", "gender": "f"}
    assert len(load(part)) == 8_000
    assert (channels.id, channels.is_excerpt, Path(channels.audio).name) == ("st", False, "stereo.wav")
    assert (resampled.is_excerpt, Path(resampled.audio).name) == (False, "a.flac")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recording": None}, "is a cut without a recording"),
        ({"start": None}, "is not a complete cut (TypeError"),
        ({"recording": {"duration": 1}}, "is not a complete cut (KeyError('sources'))"),
        ({"type": "url"}, "its audio source is a url, and only files are supported"),
        ({"type": "command"}, "its audio source is a command, and only files are supported"),
        ({"two": True}, "its channels are in 2 files"),
    ],
)
def test_invalid_cuts_raise(tmp_path, change, message):
    cut = json.loads(json.dumps(LHOTSE_CUTS[0]))
    if change.get("type"):
        cut["recording"]["sources"][0]["type"] = change["type"]
    elif change.get("two"):
        cut["recording"]["sources"] *= 2
    else:
        cut |= change
    assert f"m.jsonl:1: {message}" in read_error(write(tmp_path / "m.jsonl", jsonl([cut])))


# --- archives ---------------------------------------------------------------------------------------------------------


def collect(examples, found):
    for example in examples:
        found.append(example)  # keeps what came before an error


@pytest.mark.parametrize("shape", [by_common_voice_tar, by_common_voice_tar_gz, by_shard])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_truncated_archives(tmp_path, clips, shape, share):
    """Recordings before the end are yielded, then an error is raised."""
    path = shape(tmp_path, clips)
    whole = entries(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    found, listed = [], list_examples(path)
    with pytest.raises(DataError, match=r"is not a tar archive, damaged or cut off \(.+\)\. Copy or download it again"):
        collect(listed, found)
    assert found == whole[: len(found)]
    assert len(found) < 3
    assert found or share < 0.9


def test_an_archive_without_its_end(tmp_path, clips):
    path = by_shard(tmp_path, clips)
    with tarfile.open(path) as tar:
        end = tar.getmembers()[1].offset
    path.write_bytes(path.read_bytes()[:end])  # between two members, where tarfile sees no error
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == 1
    assert "damaged or cut off" in read_error(path)


def test_a_damaged_header(tmp_path, clips):
    path = by_shard(tmp_path, clips)
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        data[tar.getmembers()[2].offset + 150] ^= 0xFF  # its checksum
    path.write_bytes(data)
    found = iter(list_examples(path))
    assert next(found).text == TEXTS[0]
    with pytest.raises(DataError, match="damaged or cut off"):
        next(found)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "contains no recordings"),
        ([("README", b"")], "contains no recordings"),
        ([("pl/train.tsv", b"path\tsentence\nx.mp3\ttak\n")], "none of its 1 recordings is in"),
        ([("pl/train.tsv", b"path\tsentence\n"), ("pl/clips/x.mp3", b"")], "pl/train.tsv: is empty: it has no rows"),
        ([("train.tsv", b"clip\tsentence\nx.mp3\ttak\n")], "train.tsv:2: no column of recordings"),
        ([("x.wav", b"x"), ("x.json", b"{")], "x.json: broken JSON"),
        ([("x.wav", b"x"), ("x.txt", b"\xff")], "x.txt:1: is not UTF-8"),
        (
            [("pl/train.tsv", b"path\tsentence\nx.mp3\ttak\n"), ("pl/clips/x.mp3", b"x"), ("cs/clips/x.mp3", b"x")],
            "contains other corpora than pl: cs/clips/x.mp3",
        ),
    ],
)
def test_invalid_archives_raise(tmp_path, members, message):
    assert message in read_error(write_tar(tmp_path / "x.tar", members))


def test_files_that_are_not_archives_raise(tmp_path):
    for name, data in (("x.tar", b""), ("x.tar", b"no tar" * 200), ("x.tar.gz", gzip.compress(b"?")), ("x.tgz", b"?")):
        assert f"{name}: is not a tar archive, damaged or cut off" in read_error(write(tmp_path / name, data))
    assert "split test was requested, but the archive has no tables" in read_error(
        write_tar(tmp_path / "y.tar", [("a.wav", b"?")]), "test"
    )


def test_rows_without_a_recording_come_last(tmp_path, clips):
    members = [member for member in mozilla(clips, tables_first=True) if not member[0].endswith("b.mp3")]
    found = entries(write_tar(tmp_path / "cv.tar", members))
    assert [example.id for example in found] == ["a", "c", "b"]
    assert found[2].audio_bytes is None
    assert found[2].audio.endswith("cv.tar/cv-corpus-21.0-2025-03-14/pl/clips/b.mp3")


def test_names_in_archives(tmp_path, clips):
    path = write_tar(
        tmp_path / "x.tar", [(f"./mowa/{file}", data) for file, data in zip(FILES, sounds(clips), strict=True)]
    )
    found = entries(path)
    assert [(example.id, example.audio) for example in found] == [
        (f"mowa/{id}", f"{path}/mowa/{file}") for id, file in zip(IDS, FILES, strict=True)
    ]
    assert [example.audio_bytes for example in found] == sounds(clips)


WORDS = st.sampled_from(
    "audio path text offset duration type recording sources supervisions start channel id file MonoCut a.wav".split()
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=3),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(WORDS, inside, max_size=4),
    max_leaves=6,
)


@settings(LAW, max_examples=50)
@given(st.lists(st.dictionaries(WORDS, VALUES, max_size=8), min_size=1, max_size=2))
def test_any_object_is_a_row_or_raises(tmp_path, given):
    with suppress(DataError):
        entries(write(tmp_path / "m.jsonl", jsonl(given)))


@LAW
@given(data=st.data(), packing=st.sampled_from([by_common_voice_tar, by_common_voice_tgz_last, by_shard]))
def test_any_archive_is_read_or_raises(archives_of, data, packing):
    path, whole = archives_of[packing]
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        # headers and tables are small: half of the changes go there
        at = data.draw(st.integers(0, 1023) | st.integers(0, len(whole) - 1))
        changed[at] = data.draw(st.integers(0, 255))
    path.write_bytes(changed[: data.draw(st.just(len(whole)) | st.integers(0, len(whole)))])
    with suppress(DataError):
        entries(path)


@pytest.fixture(scope="module")
def archives_of(tmp_path_factory, clips):
    made = {shape: shape(tmp_path_factory.mktemp("made"), clips) for shape in ARCHIVES}
    return {shape: (path, path.read_bytes()) for shape, path in made.items()}


ARCHIVES = [by_common_voice_tar, by_common_voice_tgz_last, by_shard]


# --- memory -----------------------------------------------------------------------------------------------------------

STREAM = """
import resource, sys
from mowa.data.manifests.examples import list_examples
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, count, size = peak(), 0, 0
for example in list_examples(sys.argv[1]):
    count, size = count + 1, size + len(example.audio_bytes)
    assert example.text and example.tags["speaker"]
print(count, size, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cv.tar", "cv.tar.gz"])
def test_two_gigabytes_in_flat_memory(tmp_path, name):
    """Common Voice as distributed: 20 000 clips of 100 kB, a table after them, and as many rows of other splits."""
    count, size = 20_000, 100_000
    head = "client_id\tpath\tsentence\n"
    listed = "".join(f"{at % 500:0128x}\tclip_{at}.mp3\tZdanie numer {at}.\n" for at in range(count))
    clip = bytes(size)
    with tarfile.open(tmp_path / name, "w:gz" if name.endswith("gz") else "w", **TAR_OPTIONS.get(name, {})) as tar:
        for at in range(count):
            member = tarfile.TarInfo(f"cv/pl/clips/clip_{at}.mp3")
            member.size = size
            tar.addfile(member, io.BytesIO(clip))
            tar.members.clear()
        for split in ("other", "train"):
            data = (head + listed).encode()
            member = tarfile.TarInfo(f"cv/pl/{split}.tsv")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    done = subprocess.run(
        [sys.executable, "-c", STREAM, str(tmp_path / name)], capture_output=True, text=True, check=True
    )
    (tmp_path / name).unlink()
    seen, read, grown_mb = done.stdout.split()
    assert (int(seen), int(read)) == (count, count * size)
    assert float(grown_mb) < 100


TAR_OPTIONS = {"cv.tar.gz": {"compresslevel": 1}}


def test_the_folder_of_a_pattern_is_not_entered_twice(tree):
    found = [source for source in discover.expand_pattern("in/**/*") if "loop" not in source]
    assert found == ["in/a.FLAC", "in/b/10.wav", "in/b/2.wav", "in/b/a/x.wav"]
