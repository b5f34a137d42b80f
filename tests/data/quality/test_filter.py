import unicodedata
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mowa.data.quality import filter
from mowa.data.text.alphabet import SUBSTITUTES
from mowa.data.text.normalize import normalize_text
from mowa.errors import DataError
from mowa.types import Example

POLISH = tuple("aąbcćdeęfghijklłmnńoóprsśtuwyzźż")
THERE = __file__  # any file that is there: sift looks no further
MIXED = st.text(st.sampled_from("aąbXYŻż '’-–.,3²ßŁøёЁй\u0301e漢ﬁɣ|\n\u200b½") | st.characters(), max_size=30)

LAW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def example(text, duration_s=5.0, id="a", audio=THERE, **tags):
    return Example(id, audio, text, duration_s, tags)


def sifted(*texts, tokens=POLISH, frames=lambda s: 1000, **rules):
    examples = [example(text, id=str(at)) for at, text in enumerate(texts)]
    return filter.filter_examples(examples, filter.FilterConfig(**rules), characters=tokens, num_frames=frames)


def spelt(text, tokens=POLISH, **rules):
    return [kept.text for kept in sifted(text, tokens=tokens, **rules).kept]


# --- alphabet ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "letters"),
    [
        (["Zażółć gęślą jaźń!", "Pchnąć w tę łódź jeża lub ośm skrzyń fig."], "".join(sorted(POLISH))),
        (["Съешь ещё этих мягких французских булок, да выпей чаю."], "абвгдезийклмнопрстуфхцчшщъыьэюяё"),
        (["за́мок и замо́к"], "азикмо"),  # the stress marks of textbooks
        (["D-yusa ɣer uxxam-nneɣ, ẓriɣ-t."], "-adeimnrstuxyɣẓ"),
        (["‘Yan ƙasa sun ɗauki sana’a; ’yanci ɓe!"], "'aceiknsuyƙɓɗ"),
        (["ẹ̀kọ́ Yorùbá"], "".join(sorted("kybroáùẹọ\u0300\u0301"))),
        (["İstanbul 2024, IŞIK"], "abiklnstuş"),
        (["«Oui» – (non) … 50 %"], "inou"),
        (["", "  ", "?!"], ""),
    ],
)
def test_letters_of_a_new_vocabulary(texts, letters):
    assert filter.build_alphabet(texts) == letters
    decomposed = [unicodedata.normalize("NFD", text) for text in texts]
    assert filter.build_alphabet(decomposed) == letters


def test_rare_signs_and_letters_are_left_out():
    words = ["słowo"] * 198 + ["Kennedy'ego", "polsko-niemiecki"]
    assert "-" not in filter.build_alphabet(words)
    assert "'" in filter.build_alphabet(words)
    assert "'" not in filter.build_alphabet([*words, "słowo"])
    assert "-" in filter.build_alphabet([*words, "biało-czerwony", "czarno-biały"])
    assert filter.build_alphabet(["aaa bb x"], min_count=2) == "ab"
    assert filter.build_alphabet(["Ёж съел 3"], char_map={"ё": "е", "3": " три"}) == "ежилрстъ"


@LAW
@given(st.lists(MIXED, max_size=5))
def test_an_alphabet_writes_its_own_texts(texts):
    """Of what it was made from, a vocabulary lacks digits alone."""
    letters = filter.build_alphabet(texts)
    assert not any(c.isspace() or unicodedata.category(c)[0] == "N" for c in letters)
    assert list(letters) == sorted(set(letters))
    lacking = sifted(*texts, tokens=tuple(letters), strange="reject").oov_counts
    assert all(unicodedata.category(c)[0] == "N" for c in lacking)


# --- spelling ---------------------------------------------------------------------------------------------------------


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
def test_near_letters(text, written):
    assert spelt(text) == [written]


def test_the_nearest_letter_that_is_there():
    russian = tuple("абвгдежзийклмнопрстуфхцчшщъыьэюя")
    assert spelt("Ёлка, ещё! ко́шка", russian) == ["елка еще кошка"]
    assert spelt("їжак і ґанок", russian) == ["ижак и ганок"]
    assert spelt("γef εli", tuple("defiglɣɛ")) == ["ɣef ɛli"]
    assert spelt("γef εli", tuple("defigl")) == ["gef eli"]
    assert spelt("Ærø", tuple("äöaer")) == ["ärö"]


def test_case_follows_the_vocabulary():
    upper = tuple(c.upper() for c in POLISH)
    assert spelt("Łódź, Straße", upper) == ["ŁÓDŹ STRASSE"]
    assert spelt("Łódź Q", (*POLISH, *upper)) == ["Łódź"]
    assert not sifted("Łódź", tokens=upper).mapped_counts
    for turkish in ("İyi ISI", unicodedata.normalize("NFD", "İyi ISI")):
        assert spelt(turkish, tuple("iys"), strange="reject") == ["iyi isi"]
    assert spelt("i\u0307yi", tuple("iy"), strange="reject") == ["iyi"]


def test_marks_of_their_own():
    """A vocabulary of decomposed letters loses nothing, and nothing counts as changed."""
    result = sifted("Zażółć ẹ̀", tokens=tuple("zaolcełe\u0300\u0301\u0307\u0323"))
    assert unicodedata.normalize("NFC", result.kept[0].text) == unicodedata.normalize("NFC", "zażółć ẹ̀")
    assert not result.mapped_counts


def test_punctuation_that_the_vocabulary_has():
    tokens = (*POLISH, "'", "-", ".", "|", " ")
    assert spelt("O’Hara - tak-to 'a' ' , | koniec.", tokens) == ["o'hara tak-to 'a' koniec."]
    assert spelt("п’ять", tuple("пять’")) == ["п’ять"]
    assert spelt("漢-a", ("a", "-")) == ["a"]


def test_what_becomes_of_strange_letters():
    texts = ("Ørsted", "mam 3 koty", "漢", "tak")
    mapped = sifted(*texts)
    assert [kept.text for kept in mapped.kept] == ["orsted", "tak"]
    assert mapped.dropped == {"letters outside the vocabulary": ("1",), "no letters left": ("2",)}
    assert (mapped.mapped_counts, mapped.mapped_to, mapped.oov_counts) == ({"ø": 1}, {"ø": "o"}, {"3": 1})
    dropped = sifted(*texts, strange="drop")
    assert [kept.text for kept in dropped.kept] == ["rsted", "mam koty", "tak"]
    assert (dropped.mapped_counts, dropped.mapped_to) == ({"ø": 1, "3": 1}, {"ø": "", "3": ""})
    rejected = sifted(*texts, strange="reject")
    assert [kept.text for kept in rejected.kept] == ["tak"]
    assert rejected.dropped == {"letters outside the vocabulary": ("0", "1", "2")}
    assert rejected.oov_counts == {"ø": 1, "3": 1, "漢": 1}
    assert spelt("mam 3 koty²", (*POLISH, "3", "2")) == ["mam 3 koty2"]
    with pytest.raises(DataError, match="'guess' is none of map, drop, reject"):
        filter.FilterConfig(oov="guess")


def test_letters_written_otherwise_come_first():
    letters = {"ё": "йо", "3": " trzy ", "sz": "š", "s": "z", "I": "ı"}
    assert spelt("Ёж", tuple("ожй"), letters=letters) == ["йож"]
    assert spelt("mam 3koty", letters=letters) == ["mam trzy koty"]
    assert spelt("Szas SZ", tuple("šaz"), letters={"sz": "š", "s": "z"}) == ["zzaz š"]  # Sz is neither sz nor SZ
    assert spelt("Issız", tuple("ısız"), letters={"I": "ı"}) == ["ıssız"]
    assert spelt("SS", tuple("s"), letters={"ß": "s"}) == ["ss"]
    assert not sifted("ёж", tokens=tuple("еж"), letters={"ё": "е"}).mapped_counts


@LAW
@given(MIXED, st.sampled_from(["map", "drop", "reject"]), st.sets(st.sampled_from("aeosłŁXx'-.|3йеѐ\u0301’ ")))
def test_only_tokens_and_single_spaces_are_left(text, strange, tokens):
    result = sifted(text, tokens=tuple(tokens), strange=strange)
    for kept in result.kept:
        assert set(kept.text) <= (tokens - {"|"}) | {" "}
        assert kept.text == " ".join(kept.text.split())
        again = sifted(kept.text, tokens=tuple(tokens), strange="reject")
        assert [other.text for other in again.kept] == [kept.text]
        assert not again.mapped_counts
    assert len(result.kept) + sum(map(len, result.dropped.values())) == 1
    if strange == "reject":
        assert not result.mapped_counts


def test_the_table_of_near_letters_is_needed():
    """Each of its letters is lower case, composed, and one that NFKD does not lead to its substitutes from."""
    for letter, near in SUBSTITUTES.items():
        assert letter == letter.lower() == unicodedata.normalize("NFKD", letter)
        assert near
        assert letter not in near


# --- what is left out -------------------------------------------------------------------------------------------------


def test_lengths_and_files(tmp_path):
    examples = [
        example("tak", 0.1, "short"),
        example("tak", 0.2, "just"),
        example("tak", 20.0, "still"),
        example("tak", 20.1, "long"),
        example("tak", float("nan"), "nan"),
        example("tak", 1.0, "gone", audio=str(tmp_path / "gone.wav")),
    ]
    result = filter.filter_examples(
        examples, filter.FilterConfig(0.2, 20.0), characters=POLISH, num_frames=lambda s: 50
    )
    assert [kept.id for kept in result.kept] == ["just", "still"]
    assert result.dropped == {"audio missing": ("gone",), "too short": ("short", "nan"), "too long": ("long",)}
    assert result.kept_hours == pytest.approx(20.2 / 3600)
    assert result.total_hours == pytest.approx(41.4 / 3600)


@LAW
@given(st.text(st.sampled_from("ab "), min_size=1, max_size=12).map(str.split).map(" ".join).filter(bool))
def test_frames_are_those_that_ctc_needs(text):
    """torch's own CTC loss is finite exactly where sift keeps the recording."""
    import torch
    import torch.nn.functional as F

    labels = torch.tensor([[" ab".index(c) + 1 for c in text]])
    for frames in range(1, 2 * len(text) + 2):
        scores = torch.zeros(frames, 1, 4).log_softmax(-1)
        loss = F.ctc_loss(scores, labels, torch.tensor([frames]), torch.tensor([len(text)]), reduction="sum")
        kept = sifted(text, tokens=("a", "b"), frames=lambda s, frames=frames: frames).kept
        assert bool(kept) == bool(loss.isfinite())


def test_the_report():
    result = sifted("Ørsted ø", "3", "...", "漢", "?", "!", "sss", frames=lambda s: 5)
    assert result.summary().splitlines() == [
        "read                            7  0.01 h",
        "kept                            1  0.00 h",
        "letters outside the vocabulary  1  1",
        "no letters left                 4  2, 3, 4, and 1 more",
        "more letters than frames        1  0",
        "letters outside the vocabulary: 3 in 1",
    ]
    told = sifted("Ørsted øø 漢", "tak").summary().splitlines()
    assert told == ["read  2  0.00 h", "kept  2  0.00 h", "letters written otherwise: ø → o 3×, 漢 → nothing 1×"]


# --- two lists --------------------------------------------------------------------------------------------------------


def test_what_two_lists_share():
    train = [
        example("Ala ma kota.", id="1", audio="/a/1.wav", speaker="s1"),
        example("Tak, tak", id="2", audio="/a/2.wav"),
        example("", id="3", audio="/a/3.wav", speaker=""),
    ]
    dev = [
        example("ala MA kota", id="x", audio="/b/1.wav", speaker="s2"),
        example("tak tak", id="y", audio="/b/2.wav"),  # two words: chance
        example("", id="z", audio="/a/3.wav", speaker=""),
        *(example("inne zdanie tutaj", id=f"s{at}", audio=f"/c/{at}", speaker="s1") for at in range(5)),
    ]
    found = filter.measure_overlap(train, dev)
    assert found.recordings == filter.OverlapCount(1, ("z",))
    assert found.sentences == filter.OverlapCount(1, ("x",))
    assert found.speakers == filter.OverlapCount(5, ("s0", "s1", "s2"))
    assert found
    assert str(found) == (
        "1 of 8 are recordings of the other list (z); 1 of 8 say a sentence of it (x); "
        "5 of 8 have a speaker of it (s0, s1, s2, …)"
    )
    assert not filter.measure_overlap(train, dev[1:2])
    assert str(filter.measure_overlap(train, dev[1:2])) == "none of 1 has anything in common with the other list"


SPOKEN = st.builds(
    lambda words, speaker: (" ".join(words), speaker),
    st.lists(st.sampled_from(["Ala", "ma", "kota!"]), max_size=4),
    st.sampled_from(["", "s1", "s2", "s3", "s4", "s5", "s6"]),
)


@LAW
@given(st.lists(SPOKEN, max_size=40), st.floats(0, 0.99), st.integers(0, 5))
def test_held_out_is_unheard(spoken, share, seed):
    everything = [
        example(text, id=str(at), audio=f"/{at}.wav", speaker=speaker) for at, (text, speaker) in enumerate(spoken)
    ]
    speakers = {speaker for _, speaker in spoken if speaker}
    sentences = {normalize_text(text) for text, _ in spoken}
    groups = speakers if len(speakers) >= 5 else sentences
    if share and everything and len(groups) < 2:
        with pytest.raises(DataError, match="say the same"):
            filter.split_held_out(everything, share, seed)
        return
    train, dev = filter.split_held_out(everything, share, seed)
    assert sorted([*train, *dev], key=lambda e: int(e.id)) == everything
    assert [*train] == sorted(train, key=lambda e: int(e.id))
    assert bool(dev) == bool(share and everything)
    assert bool(train) == bool(everything)
    common = filter.measure_overlap(train, dev)
    assert not common.recordings.count
    if len(speakers) >= 5:
        assert not common.speakers.count
        assert all(e.tags["speaker"] for e in dev)
    else:
        assert not {normalize_text(e.text) for e in train} & {normalize_text(e.text) for e in dev}
        assert not common.sentences.count
    assert filter.split_held_out(everything, share, seed) == (train, dev)
    turned = filter.split_held_out(everything[::-1], share, seed)
    assert {e.id for e in turned[1]} == {e.id for e in dev}


def test_as_much_is_held_out_as_was_asked():
    everything = [example(f"zdanie numer {at}", id=str(at), speaker=f"s{at % 50}") for at in range(1000)]
    for examples in (everything, [replace(e, tags={}) for e in everything]):
        train, dev = filter.split_held_out(examples, 0.1, 0)
        assert (len(train), len(dev)) == (900, 100)
        assert {e.id for e in filter.split_held_out(examples, 0.1, 1)[1]} != {e.id for e in dev}
    with pytest.raises(DataError, match=r"hold_out is 1\.5"):
        filter.split_held_out(everything, 1.5, 0)
