import unicodedata
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mowa.data.quality.filter import FilterConfig, OverlapCount, filter_examples, measure_overlap, split_held_out
from mowa.data.text.alphabet import SUBSTITUTES, build_alphabet
from mowa.data.text.normalize import normalize_text
from mowa.errors import DataError
from mowa.types import Example, Vocabulary

POLISH = tuple("aąbcćdeęfghijklłmnńoóprsśtuwyzźż")
THERE = __file__  # any existing file: its contents are not read
MIXED = st.text(st.sampled_from("aąbXYŻż '’-–.,3²ßŁøёЁй\u0301e漢ﬁɣ|\n\u200b½") | st.characters(), max_size=30)

LAW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def example(text, duration_s=5.0, id="a", audio=THERE, **tags):
    return Example(id, audio, text, duration_s, tags)


def vocabulary_of(tokens):
    return Vocabulary(("<pad>", "|", *(token for token in tokens if token not in " |")), blank=0, delimiter=1)


def filter_texts(*texts, tokens=POLISH, frames=lambda s: 1000, **rules):
    examples = [example(text, id=str(at)) for at, text in enumerate(texts)]
    return filter_examples(examples, FilterConfig(**rules), vocabulary=vocabulary_of(tokens), num_frames=frames)


def map_texts(text, tokens=POLISH, **rules):
    return [kept.text for kept in filter_texts(text, tokens=tokens, **rules).kept]


# --- alphabet ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "characters"),
    [
        (["Zażółć gęślą jaźń!", "Pchnąć w tę łódź jeża lub ośm skrzyń fig."], "".join(sorted(POLISH))),
        (["Съешь ещё этих мягких французских булок, да выпей чаю."], "абвгдезийклмнопрстуфхцчшщъыьэюяё"),
        (["за́мок и замо́к"], "азикмо"),  # stress marks of textbooks
        (["D-yusa ɣer uxxam-nneɣ, ẓriɣ-t."], "-adeimnrstuxyɣẓ"),
        (["‘Yan ƙasa sun ɗauki sana’a; ’yanci ɓe!"], "'aceiknsuyƙɓɗ"),
        (["ẹ̀kọ́ Yorùbá"], "".join(sorted("kybroáùẹọ\u0300\u0301"))),
        (["İstanbul 2024, IŞIK"], "abiklnstuş"),
        (["«Oui» – (non) … 50 %"], "inou"),
        (["", "  ", "?!"], ""),
    ],
)
def test_alphabet_of_a_new_vocabulary(texts, characters):
    assert build_alphabet(texts) == characters
    decomposed = [unicodedata.normalize("NFD", text) for text in texts]
    assert build_alphabet(decomposed) == characters


def test_rare_characters_are_left_out():
    words = ["słowo"] * 198 + ["Kennedy'ego", "polsko-niemiecki"]
    assert "-" not in build_alphabet(words)
    assert "'" in build_alphabet(words)
    assert "'" not in build_alphabet([*words, "słowo"])
    assert "-" in build_alphabet([*words, "biało-czerwony", "czarno-biały"])
    assert build_alphabet(["aaa bb x"], min_count=2) == "ab"
    assert build_alphabet(["Ёж съел 3"], char_map={"ё": "е", "3": " три"}) == "ежилрстъ"


@LAW
@given(st.lists(MIXED, max_size=5))
def test_an_alphabet_covers_its_own_texts(texts):
    """Only digits of the texts are outside the alphabet built from them."""
    letters = build_alphabet(texts)
    assert not any(c.isspace() or unicodedata.category(c)[0] == "N" for c in letters)
    assert list(letters) == sorted(set(letters))
    lacking = filter_texts(*texts, tokens=tuple(letters), oov="reject").oov_counts
    assert all(unicodedata.category(c)[0] == "N" for c in lacking)


# --- mapping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("Zażółć, gęślą – jaźń!", "zażółć gęślą jaźń"),
        (unicodedata.normalize("NFD", "Zażółć"), "zażółć"),
        ("biało-czerwony i Kennedy’ego", "biało czerwony i kennedyego"),
        ("Škoda Øre Straße Ærø", "skoda ore strasse aero"),
        ("ﬁnał …", "finał"),
        ("漢字 tak", "tak"),
        ("po\u00adcząt\u200bek | tu\tteraz", "początek tu teraz"),
        ("do Ŝtĭk", "do stik"),
    ],
)
def test_similar_characters(text, written):
    assert map_texts(text) == [written]


def test_the_first_substitute_in_the_vocabulary():
    russian = tuple("абвгдежзийклмнопрстуфхцчшщъыьэюя")
    assert map_texts("Ёлка, ещё! ко́шка", russian) == ["елка еще кошка"]
    assert map_texts("їжак і ґанок", russian) == ["ижак и ганок"]
    assert map_texts("γef εli", tuple("defiglɣɛ")) == ["ɣef ɛli"]
    assert map_texts("γef εli", tuple("defigl")) == ["gef eli"]
    assert map_texts("Ærø", tuple("äöaer")) == ["ärö"]


def test_case_follows_the_vocabulary():
    upper = tuple(c.upper() for c in POLISH)
    assert map_texts("Łódź, Straße", upper) == ["ŁÓDŹ STRASSE"]
    assert map_texts("Łódź Q", (*POLISH, *upper)) == ["Łódź"]
    assert not filter_texts("Łódź", tokens=upper).mapped_counts
    for turkish in ("İyi ISI", unicodedata.normalize("NFD", "İyi ISI")):
        assert map_texts(turkish, tuple("iys"), oov="reject") == ["iyi isi"]
    assert map_texts("i\u0307yi", tuple("iy"), oov="reject") == ["iyi"]


def test_combining_marks_in_the_vocabulary():
    """A vocabulary of decomposed letters loses nothing, and nothing counts as mapped."""
    result = filter_texts("Zażółć ẹ̀", tokens=tuple("zaolcełe\u0300\u0301\u0307\u0323"))
    assert unicodedata.normalize("NFC", result.kept[0].text) == unicodedata.normalize("NFC", "zażółć ẹ̀")
    assert not result.mapped_counts


def test_punctuation_that_the_vocabulary_has():
    tokens = (*POLISH, "'", "-", ".", "|", " ")
    assert map_texts("O’Hara - tak-to 'a' ' , | koniec.", tokens) == ["o'hara tak-to 'a' koniec."]
    assert map_texts("п’ять", tuple("пять’")) == ["п’ять"]
    assert map_texts("漢-a", ("a", "-")) == ["a"]


def test_oov_policies():
    texts = ("Ørsted", "mam 3 koty", "漢", "tak")
    mapped = filter_texts(*texts)
    assert [kept.text for kept in mapped.kept] == ["orsted", "tak"]
    assert mapped.dropped == {"characters outside the vocabulary": ("1",), "empty after normalization": ("2",)}
    assert (mapped.mapped_counts, mapped.mapped_to, mapped.oov_counts) == ({"ø": 1}, {"ø": "o"}, {"3": 1})
    dropped = filter_texts(*texts, oov="drop")
    assert [kept.text for kept in dropped.kept] == ["rsted", "mam koty", "tak"]
    assert (dropped.mapped_counts, dropped.mapped_to) == ({"ø": 1, "3": 1}, {"ø": "", "3": ""})
    rejected = filter_texts(*texts, oov="reject")
    assert [kept.text for kept in rejected.kept] == ["tak"]
    assert rejected.dropped == {"characters outside the vocabulary": ("0", "1", "2")}
    assert rejected.oov_counts == {"ø": 1, "3": 1, "漢": 1}
    assert map_texts("mam 3 koty²", (*POLISH, "3", "2")) == ["mam 3 koty2"]
    with pytest.raises(DataError, match="'guess' is none of map, drop, reject"):
        FilterConfig(oov="guess")


def test_char_map_is_applied_first():
    char_map = {"ё": "йо", "3": " trzy ", "sz": "š", "s": "z", "I": "ı"}
    assert map_texts("Ёж", tuple("ожй"), char_map=char_map) == ["йож"]
    assert map_texts("mam 3koty", char_map=char_map) == ["mam trzy koty"]
    assert map_texts("Szas SZ", tuple("šaz"), char_map={"sz": "š", "s": "z"}) == ["zzaz š"]  # Sz is neither sz nor SZ
    assert map_texts("Issız", tuple("ısız"), char_map={"I": "ı"}) == ["ıssız"]
    assert map_texts("SS", tuple("s"), char_map={"ß": "s"}) == ["ss"]
    assert not filter_texts("ёж", tokens=tuple("еж"), char_map={"ё": "е"}).mapped_counts


@LAW
@given(MIXED, st.sampled_from(["map", "drop", "reject"]), st.sets(st.sampled_from("aeosłŁXx'-.|3йеѐ\u0301’ ")))
def test_only_tokens_and_single_spaces_are_left(text, oov, tokens):
    result = filter_texts(text, tokens=tuple(tokens), oov=oov)
    for kept in result.kept:
        assert set(kept.text) <= (tokens - {"|"}) | {" "}
        assert kept.text == " ".join(kept.text.split())
        again = filter_texts(kept.text, tokens=tuple(tokens), oov="reject")
        assert [other.text for other in again.kept] == [kept.text]
        assert not again.mapped_counts
    assert len(result.kept) + sum(map(len, result.dropped.values())) == 1
    if oov == "reject":
        assert not result.mapped_counts


def test_substitutes_are_not_redundant():
    """Each key is in lower case and is not decomposed by NFKD."""
    for character, substitutes in SUBSTITUTES.items():
        assert character == character.lower() == unicodedata.normalize("NFKD", character)
        assert substitutes
        assert character not in substitutes


# --- dropped recordings -----------------------------------------------------------------------------------------------


def test_durations_and_missing_files(tmp_path):
    examples = [
        example("tak", 0.1, "short"),
        example("tak", 0.2, "just"),
        example("tak", 20.0, "still"),
        example("tak", 20.1, "long"),
        example("tak", float("nan"), "nan"),
        example("tak", 1.0, "gone", audio=str(tmp_path / "gone.wav")),
    ]
    result = filter_examples(
        examples, FilterConfig(0.2, 20.0), vocabulary=vocabulary_of(POLISH), num_frames=lambda s: 50
    )
    assert [kept.id for kept in result.kept] == ["just", "still"]
    assert result.dropped == {"audio missing": ("gone",), "too short": ("short", "nan"), "too long": ("long",)}
    assert result.kept_hours == pytest.approx(20.2 / 3600)
    assert result.total_hours == pytest.approx(41.4 / 3600)


@LAW
@given(st.text(st.sampled_from("ab "), min_size=1, max_size=12).map(str.split).map(" ".join).filter(bool))
def test_required_frames_are_those_of_ctc(text):
    """torch's CTC loss is finite exactly if the recording is kept."""
    import torch
    import torch.nn.functional as F

    labels = torch.tensor([[" ab".index(c) + 1 for c in text]])
    for frames in range(1, 2 * len(text) + 2):
        scores = torch.zeros(frames, 1, 4).log_softmax(-1)
        loss = F.ctc_loss(scores, labels, torch.tensor([frames]), torch.tensor([len(text)]), reduction="sum")
        kept = filter_texts(text, tokens=("a", "b"), frames=lambda s, frames=frames: frames).kept
        assert bool(kept) == bool(loss.isfinite())


def test_summary():
    result = filter_texts("Ørsted ø", "3", "...", "漢", "?", "!", "sss", frames=lambda s: 5)
    assert result.summary().splitlines() == [
        "read                               7  0.01 h",
        "kept                               1  0.00 h",
        "characters outside the vocabulary  1  1",
        "empty after normalization          4  2, 3, 4, and 1 more",
        "more tokens than frames            1  0",
        "characters outside the vocabulary: 3 in 1",
    ]
    lines = filter_texts("Ørsted øø 漢", "tak").summary().splitlines()
    assert lines == ["read  2  0.00 h", "kept  2  0.00 h", "mapped characters: ø → o 3×, 漢 → nothing 1×"]


# --- overlap and held-out ---------------------------------------------------------------------------------------------


def test_overlap_of_two_lists():
    train = [
        example("Ala ma kota.", id="1", audio="/a/1.wav", speaker="s1"),
        example("Tak, tak", id="2", audio="/a/2.wav"),
        example("", id="3", audio="/a/3.wav", speaker=""),
    ]
    dev = [
        example("ala MA kota", id="x", audio="/b/1.wav", speaker="s2"),
        example("tak tak", id="y", audio="/b/2.wav"),  # two words may agree by chance
        example("", id="z", audio="/a/3.wav", speaker=""),
        *(example("inne zdanie tutaj", id=f"s{at}", audio=f"/c/{at}", speaker="s1") for at in range(5)),
    ]
    found = measure_overlap(train, dev)
    assert found.recordings == OverlapCount(1, ("z",))
    assert found.sentences == OverlapCount(1, ("x",))
    assert found.speakers == OverlapCount(5, ("s0", "s1", "s2"))
    assert found
    assert str(found) == (
        "1 of 8 share recordings with the other list (z); 1 of 8 share sentences with the other list (x); "
        "5 of 8 share speakers with the other list (s0, s1, s2, …)"
    )
    assert not measure_overlap(train, dev[1:2])
    assert str(measure_overlap(train, dev[1:2])) == "none of 1 shares anything with the other list"


SPOKEN = st.builds(
    lambda words, speaker: (" ".join(words), speaker),
    st.lists(st.sampled_from(["Ala", "ma", "kota!"]), max_size=4),
    st.sampled_from(["", "s1", "s2", "s3", "s4", "s5", "s6"]),
)


@LAW
@given(st.lists(SPOKEN, max_size=40), st.floats(0, 0.99), st.integers(0, 5))
def test_held_out_groups_are_disjoint(spoken, ratio, seed):
    everything = [
        example(text, id=str(at), audio=f"/{at}.wav", speaker=speaker) for at, (text, speaker) in enumerate(spoken)
    ]
    speakers = {speaker for _, speaker in spoken if speaker}
    sentences = {normalize_text(text) for text, _ in spoken}
    groups = speakers if len(speakers) >= 5 else sentences
    if ratio and everything and len(groups) < 2:
        with pytest.raises(DataError, match="have the same text"):
            split_held_out(everything, ratio, seed)
        return
    train, dev = split_held_out(everything, ratio, seed)
    assert sorted([*train, *dev], key=lambda e: int(e.id)) == everything
    assert [*train] == sorted(train, key=lambda e: int(e.id))
    assert bool(dev) == bool(ratio and everything)
    assert bool(train) == bool(everything)
    common = measure_overlap(train, dev)
    assert not common.recordings.count
    if len(speakers) >= 5:
        assert not common.speakers.count
        assert all(e.tags["speaker"] for e in dev)
    else:
        assert not {normalize_text(e.text) for e in train} & {normalize_text(e.text) for e in dev}
        assert not common.sentences.count
    assert split_held_out(everything, ratio, seed) == (train, dev)
    reversed_order = split_held_out(everything[::-1], ratio, seed)
    assert {e.id for e in reversed_order[1]} == {e.id for e in dev}


def test_held_out_ratio():
    everything = [example(f"zdanie numer {at}", id=str(at), speaker=f"s{at % 50}") for at in range(1000)]
    for examples in (everything, [replace(e, tags={}) for e in everything]):
        train, dev = split_held_out(examples, 0.1, 0)
        assert (len(train), len(dev)) == (900, 100)
        assert {e.id for e in split_held_out(examples, 0.1, 1)[1]} != {e.id for e in dev}
    with pytest.raises(DataError, match=r"hold_out is 1\.5"):
        split_held_out(everything, 1.5, 0)
