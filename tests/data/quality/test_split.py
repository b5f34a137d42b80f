"""Splits share no speakers and no sentences, have the requested sizes, and are stable."""

import json
import random
from dataclasses import replace

import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from mowa.cli.main import main
from mowa.data.manifests.examples import list_examples, read_examples
from mowa.data.quality.filter import measure_overlap
from mowa.data.quality.split import SPLITS, split_corpus, write_split
from mowa.data.text.normalize import normalize_text
from mowa.errors import DataError
from mowa.types import Example
from tests.checkpoints import clip


def example(number, speaker, text, duration_s=2.0):
    return Example(str(number), f"/data/{number}.wav", text, duration_s, {"speaker": speaker} if speaker else {})


def own_sentences(speakers=40, each=10):
    return [example(f"{s}-{n}", f"s{s}", f"zdanie {s} {n}") for s in range(speakers) for n in range(each)]


def same_prompts(speakers=20, prompts=30):
    return [example(f"{s}-{n}", f"s{s}", f"Zdanie {n}!") for s in range(speakers) for n in range(prompts)]


def shared(split, key):
    groups = [{key(one) for one in split[name]} for name in SPLITS]
    return set().union(*(one & other for i, one in enumerate(groups) for other in groups[:i]))


def speaker(one):
    return one.tags.get("speaker") or one.id


def sentence(one):
    return normalize_text(one.text) or one.id


def test_speakers_with_their_own_sentences_lose_nothing():
    split = split_corpus(own_sentences(), dev="10%", test="10%")
    assert (len(split.train), len(split.dev), len(split.test)) == (320, 40, 40)
    assert split.disjoint == ("speakers", "sentences")
    assert not split.dropped
    assert not split.notes


def test_few_speakers_with_their_own_sentences_are_split_whole():
    split = split_corpus(own_sentences(speakers=5))
    assert [len(split[name]) for name in SPLITS] == [30, 10, 10]
    assert split.disjoint == ("speakers", "sentences")


def test_when_everybody_reads_the_same_prompts_speakers_are_disjoint_and_it_says_so():
    split = split_corpus(same_prompts(), dev="5%", test="10%")
    assert split.disjoint == ("speakers",)
    assert [len(split[name]) for name in SPLITS] == [510, 30, 60]
    assert split.notes == (
        "600 of 600 recordings are connected by shared speakers and sentences: speakers are disjoint, sentences are"
        " not",
    )


def test_two_speakers_of_the_same_prompts_leave_only_sentences():
    split = split_corpus(same_prompts(speakers=2, prompts=100))
    assert split.disjoint == ("sentences",)
    assert [len(split[name]) for name in SPLITS] == [180, 10, 10]
    assert "speakers are few" in split.notes[0]


def test_both_drops_what_would_be_in_two_splits():
    split = split_corpus(same_prompts(), dev="5%", test="5%", disjoint="both")
    assert split.disjoint == ("speakers", "sentences")
    assert not shared(split, speaker)
    assert not shared(split, sentence)
    assert min(len(split.dev), len(split.test)) >= 15
    assert len(split.dropped) + sum(len(split[name]) for name in SPLITS) == 600
    assert 0 < len(split.dropped) < 450


def test_both_drops_few_where_few_sentences_are_shared():
    examples = [*own_sentences(), *(example(f"hello {s}", f"s{s}", "Dzień dobry") for s in range(40))]
    split = split_corpus(examples, disjoint="both")
    assert split.disjoint == ("speakers", "sentences")
    assert 0 < len(split.dropped) <= 6


@pytest.mark.parametrize("disjoint", ["speakers", "sentences"])
def test_one_of_the_two_drops_nothing(disjoint):
    split = split_corpus(same_prompts(), disjoint=disjoint)
    assert split.disjoint == (disjoint,)
    assert not split.dropped


def test_sizes_in_hours_minutes_and_recordings():
    split = split_corpus(own_sentences(speakers=400, each=10), dev="20min", test="100")
    assert sum(one.duration_s for one in split.dev) == 1200
    assert len(split.test) == 100
    assert len(split_corpus(own_sentences(speakers=1800, each=2), dev="1h", test="0").dev) == 1800
    assert not split_corpus(own_sentences(), dev="0", test="0").dev


@pytest.mark.parametrize("size", ["x", "5 %%", "-1", "100%", "9999", "2h"])
def test_a_size_that_cannot_be_is_an_error(size):
    with pytest.raises(DataError, match=r"^dev:"):
        split_corpus(own_sentences(), dev=size)


def test_without_speakers_sentences_are_disjoint():
    examples = [example(n, "", f"zdanie {n % 50}") for n in range(100)]
    split = split_corpus(examples)
    assert split.disjoint == ("sentences",)
    assert split.notes == ("no recording has a speaker",)
    with pytest.raises(DataError, match="no recording has a speaker"):
        split_corpus(examples, disjoint="both")


def test_recordings_without_a_speaker_stay_in_train():
    split = split_corpus([*own_sentences(), example("x", "", "inne zdanie")])
    assert "x" in {one.id for one in split.train}
    assert split.notes == ("1 recordings have no speaker and are in train",)


def test_too_few_speakers_are_an_error():
    with pytest.raises(DataError, match="too few"):
        split_corpus(same_prompts(speakers=1), disjoint="speakers")
    with pytest.raises(DataError, match="too few"):
        split_corpus(same_prompts(speakers=2), disjoint="both")


def test_order_does_not_matter_and_the_seed_does():
    examples = own_sentences()
    shuffled = random.Random(0).sample(examples, len(examples))
    names = [{one.id for one in split_corpus(given).test} for given in (examples, shuffled)]
    assert names[0] == names[1]
    assert names[0] != {one.id for one in split_corpus(examples, seed=1).test}


def test_adding_data_moves_few_recordings():
    before = split_corpus(own_sentences(speakers=100))
    after = split_corpus(own_sentences(speakers=110))
    where = {one.id: name for name in SPLITS for one in after[name]}
    moved = sum(where[one.id] != name for name in SPLITS for one in before[name])
    assert moved <= 0.03 * 1000


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 12), st.floats(0.1, 20)), min_size=1, max_size=60),
    st.sampled_from(["auto", "speakers", "sentences", "both"]),
    st.sampled_from(["5%", "30%", "3", "0"]),
    st.integers(0, 3),
)
def test_no_two_splits_share_what_is_disjoint(rows, disjoint, size, seed):
    examples = [example(n, f"s{s}" if s else "", f"Zdanie, {t}" if t else "") for n, (s, t, _) in enumerate(rows)]
    try:
        split = split_corpus(examples, dev=size, test=size, disjoint=disjoint, seed=seed)
    except DataError:
        return
    kept = [one.id for name in SPLITS for one in split[name]]
    assert sorted([*kept, *split.dropped], key=int) == [one.id for one in examples]
    required = {"auto": split.disjoint, "both": ("speakers", "sentences")}.get(disjoint, (disjoint,))
    assert required
    for kind in {*required, *split.disjoint}:
        assert not shared(split, speaker if kind == "speakers" else sentence)
    assert disjoint == "both" or not split.dropped
    if size != "0":
        assert split.train
        assert split.dev
        assert split.test


def test_manifests_are_read_back(tmp_path):
    rows = []
    for number in range(12):
        soundfile.write(tmp_path / f"{number}.wav", clip(number, 8000), 16_000)
        rows.append({"path": f"{number}.wav", "sentence": f"zdanie {number}", "client_id": f"c{number % 6}"})
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    split = split_corpus(read_examples(tmp_path / "all.jsonl"), dev="2", test="2")
    write_split(split, tmp_path / "split")
    assert [one.id for one in read_examples(tmp_path / "split", "test")] == [one.id for one in split.test]
    assert {one.tags["speaker"] for one in read_examples(tmp_path / "split", "dev")} == {split.dev[0].tags["speaker"]}
    with pytest.raises(DataError, match=r"train.jsonl exists"):
        write_split(split, tmp_path / "split")


def test_the_command(tmp_path, capsys):
    rows = []
    for number in range(20):
        soundfile.write(tmp_path / f"{number}.wav", clip(number, 8000), 16_000)
        row = {"audio": f"{number}.wav", "text": f"zdanie {number % 5}", "reader": f"r{number // 5}"}
        rows.append(json.dumps(row) + "\n")
    (tmp_path / "all.jsonl").write_text("".join(rows))
    options = ["--speaker-by", "reader", "--dev", "5", "--test", "5"]
    with pytest.raises(SystemExit) as end:
        main(["data", "split", str(tmp_path / "all.jsonl"), "-o", str(tmp_path / "out"), *options])
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert "train  0.00   10 (50.0%)  2         5" in out
    assert "no two splits share speakers\n" in out
    assert "note: 20 of 20 recordings are connected" in out
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"train.jsonl", "dev.jsonl", "test.jsonl"}


def test_the_number_0_is_a_speaker():
    rows = [
        Example(f"{s}-{n}", f"/{s}-{n}.wav", f"zdanie {s} {n}", 2.0, {"speaker": s}) for s in range(9) for n in range(4)
    ]
    split = split_corpus(rows, dev="4", test="4", disjoint="speakers")
    assert not split.notes
    assert {one.tags["speaker"] for name in SPLITS for one in split[name]} == set(range(9))


def test_the_offset_of_an_excerpt_is_written(tmp_path):
    rows = [replace(one, offset_s=float(number), is_excerpt=True) for number, one in enumerate(own_sentences(9, 2))]
    files = write_split(split_corpus(rows, dev="2", test="2"), tmp_path)
    found = {one.id: one for file in files for one in list_examples(file)}
    assert {(one.id, one.offset_s, one.is_excerpt) for one in rows} == {
        (one.id, one.offset_s, one.is_excerpt) for one in found.values()
    }


@pytest.mark.parametrize("duration_s", [0.0, float("nan")])
def test_percentages_are_of_the_recordings_if_durations_are_missing(duration_s):
    rows = [replace(one, duration_s=duration_s) for one in own_sentences()[:1]] + own_sentences()[1:]
    split = split_corpus(rows, dev="10%", test="10%")
    assert any("1 of 400 recordings have no duration" in note for note in split.notes)
    everywhere = split_corpus([replace(one, duration_s=duration_s) for one in rows], dev="10%", test="10%")
    assert 20 <= len(everywhere.dev) <= 60
    assert [one.id for one in everywhere.dev] == [one.id for one in split.dev]


def test_names_of_speakers_are_compared_by_their_characters(tmp_path):
    """Two Unicode forms of a name are one speaker; names that differ in case are two, since case matters in ids."""
    names = ["Zoé", "Zoe\u0301", " Zoé ", "zoé", "aB3", "ab3"]
    rows = [{"audio": f"{at}.wav", "text": f"zdanie {at}", "speaker": name} for at, name in enumerate(names)]
    source = tmp_path / "m.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(list_examples(source))
    assert [one.tags["speaker"] for one in found] == ["Zoé", "Zoé", "Zoé", "zoé", "aB3", "ab3"]
    split = split_corpus(found, dev="1", test="1", disjoint="speakers")
    speakers = [{one.tags["speaker"] for one in split[name]} for name in SPLITS]
    assert sum(map(len, speakers)) == 4
    overlap = measure_overlap(found[:1], found[1:])
    assert overlap.speakers.ids == ("1", "2")


def test_the_number_0_is_a_speaker_everywhere():
    rows = [Example(str(at), f"/{at}.wav", f"zdanie {at}", 2.0, {"speaker": 0}) for at in range(2)]
    assert measure_overlap(rows[:1], rows[1:]).speakers.count == 1
