"""Texts that are the same in Unicode's sense compare as equal, and marks that tell words apart are kept."""

import unicodedata
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mowa.data.quality.corpus_report import check_corpus
from mowa.data.quality.filter import measure_overlap, split_held_out
from mowa.data.quality.split import split_corpus
from mowa.data.text.alphabet import build_alphabet
from mowa.data.text.normalize import normalize_text
from mowa.tasks.metrics import error_rates
from mowa.types import Example

PARTS = st.sampled_from(
    "aIiİıẞßΣςеиЙё\u0300\u0301\u0307\u0323\u0308\u200d\u200c\u00ad\ufe0f\u034f'-. =\u0338ªकिมาം\u064b漢½²ﬁ👍🏽"
)
TEXTS = st.lists(PARTS | st.characters(exclude_categories=["Cs"]), max_size=12).map("".join)
EUROPEAN = {
    "Polish": "Zażółć, gęślą – „jaźń”! Kennedy’ego biało-czerwony: 3,14 §5 ½ łódź…",
    "German": "Die Straße – »größer« als 20 €/m²; Müller's Äpfel, E-Mail & Co.",
    "English": "“Don't,” O'Hara said — it's a state-of-the-art naïve café (№ 5).",
    "Russian": "Ёлка, ещё! «Съешь же ещё этих мягких французских булок», — сказал кто-то: №7.",
    "Czech": "Příliš žluťoučký kůň úpěl ďábelské ódy; 5. května ’45 – „ano“?",
}


def without_marks(text):
    """The rule before marks were kept."""
    kept = "".join(c if c.isalnum() or c.isspace() else " " for c in text.lower())
    return " ".join(kept.split())


@pytest.mark.parametrize("language", EUROPEAN)
def test_european_texts_are_normalized_as_before(language):
    assert normalize_text(EUROPEAN[language]) == without_marks(EUROPEAN[language])


@given(st.text("aąbcćdeęłńóśźżäöüßéèčďěňřšťůабвгдеёжзийъыьэюя AĄŁŻÄÖÜÉČŘЁЙЯ0189.,;:!?–—-'’„”\"()/%&€№…\n\t"))
def test_the_letters_of_these_languages_are_normalized_as_before(text):
    assert normalize_text(text) == without_marks(text)


@settings(max_examples=300)
@given(TEXTS)
@example("е\u0301\u0308\u0301")
@example("i\u0307\u200d\u0307")
def test_normalizing_is_idempotent_and_ignores_the_unicode_form(text):
    found = normalize_text(text)
    assert normalize_text(found) == found
    for form in ("NFC", "NFD"):
        assert normalize_text(unicodedata.normalize(form, text)) == found
    assert found == unicodedata.normalize("NFC", found)
    assert found == " ".join(found.split())


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("हिन्दी, में!", "हिन्दी में"),
        ("ที่นี่ กำลัง", "ที่นี่ กำลัง"),
        ("മലയാളം.", "മലയാളം"),
        ("العَرَبِيَّةُ؟", "العَرَبِيَّةُ"),
        ("Ọjọ́ dára, ẹ̀kọ́", "ọjọ́ dára ẹ̀kọ́"),
        ("שָׁלוֹם", unicodedata.normalize("NFC", "שָׁלוֹם")),
    ],
)
def test_marks_are_kept(text, normal):
    assert normalize_text(text) == unicodedata.normalize("NFC", normal)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("İSTANBUL İyi", "istanbul iyi"),
        ("ISPARTA ılık", "isparta ılık"),  # the language is unknown, so I becomes i
        ("Straße STRASSE", "straße strasse"),
        ("ко́шка за́мок Й й", "кошка замок й й"),
        ("O'Hara’s tak-to", "o hara s tak to"),
        ("क्‍ष می\u200cخواهم Trenn\u00adstrich", "क्ष میخواهم trennstrich"),
        ("tak ❤️ 1️⃣ 👍🏽 nie", "tak 1 nie"),
        ("۝text\u200ftext", "texttext"),
        ("½ x² ﬁn", "½ x² ﬁn"),
        ("a\u0338 ≠ b", "a\u0338 b"),
        ("", ""),
    ],
)
def test_cases_of_each_rule(text, normal):
    assert normalize_text(text) == normal


def test_the_same_text_has_the_same_length():
    assert len(normalize_text("İ")) == len(normalize_text("i")) == 1


@pytest.mark.parametrize(
    ("reference", "hypothesis", "wer", "cer"),
    [
        ("कि वह", "के वह", 0.5, 1 / 5),  # CER counts code points: one of क ि space व ह
        ("zażółć gęślą jaźń", unicodedata.normalize("NFD", "zażółć gęślą jaźń"), 0, 0),
        ("ọjọ́ dára", "ọjọ dára", 0.5, 1 / 9),
        ("İyi", "iyi", 0, 0),
        ("มา ที่นี่", "มา ทีนี่", 0.5, 1 / 9),
    ],
)
def test_error_rates_in_other_scripts(reference, hypothesis, wer, cer):
    assert error_rates([reference], [hypothesis]) == pytest.approx({"wer": wer, "cer": cer})


@given(TEXTS)
def test_an_alphabet_of_normalized_texts_has_no_invisible_characters(text):
    assert not set(build_alphabet([normalize_text(text)])) & set("\u200c\u200d\u00ad")


SCRIPTS = {
    "Hindi": ("कि वह घर में है", "के वह घर मे है"),
    "Thai": ("ที่นี่ มา กำลัง", "ทีนี่ มา กาลัง"),
    "Malayalam": ("മലയാളം ഭാഷ ആണ്", "മലയളം ഭാഷ ആണ"),
    "vocalised Arabic": ("كَتَبَ الوَلَدُ", "كُتِبَ الوَلَدُ"),
    "Yoruba": ("ọjọ́ dára ẹ̀kọ́", "ọjọ dára ẹ́kọ́"),
    "Turkish": ("istanbul iyi ılık", "ıstanbul iyi ilık"),
    "Polish": ("zażółć gęślą jaźń", "zażołć gęślą jazń"),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("forms", [("NFC", "NFC"), ("NFC", "NFD"), ("NFD", "NFC")], ids="/".join)
def test_error_rates_are_those_of_jiwer_on_nfc_text(script, forms):
    jiwer = pytest.importorskip("jiwer")
    composed = [unicodedata.normalize("NFC", text) for text in SCRIPTS[script]]
    reference, hypothesis = (
        unicodedata.normalize(form, text) for form, text in zip(forms, SCRIPTS[script], strict=True)
    )
    found = error_rates([reference], [hypothesis])
    assert found["wer"] > 0
    assert found == pytest.approx({"wer": jiwer.wer(*composed), "cer": jiwer.cer(*composed)})
    assert error_rates([reference], [unicodedata.normalize("NFD", reference)]) == {"wer": 0, "cer": 0}


# --- what compares texts, and names of speakers -----------------------------------------------------------------------


def forms_of(text, speaker):
    """The same recording twice, with text and speaker in NFC and in NFD."""

    def example(form):
        tags = {"speaker": unicodedata.normalize(form, speaker)}
        return Example(form, f"{form}.wav", unicodedata.normalize(form, text), 1.0, tags)

    return [example("NFC"), example("NFD")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_overlap_is_found_in_every_script_and_form(script):
    same, other = SCRIPTS[script]
    one, two = forms_of(f"{same} {same}", "Józef")
    found = measure_overlap([one], [two])
    assert (found.sentences.count, found.speakers.count) == (1, 1)
    assert not measure_overlap([one], [Example("x", "x.wav", f"{other} {same}", 1.0)])


def test_the_same_sentence_in_another_form_is_not_held_out_alone():
    examples = [one for text, _ in SCRIPTS.values() for one in forms_of(text, "")]
    train, dev = split_held_out(examples, 0.3, 0)
    assert {normalize_text(one.text) for one in train}.isdisjoint(normalize_text(one.text) for one in dev)
    assert len(dev) % 2 == 0
    assert dev


def test_a_split_divides_neither_forms_of_a_sentence_nor_of_a_speaker():
    names = ["Józef", "Zoë", "Đặng", "Ọlá", "İnci", "Мария", "हिन्दी"]
    examples = [one for name, (text, _) in zip(names, SCRIPTS.values(), strict=True) for one in forms_of(text, name)]
    for disjoint in ("speakers", "sentences"):
        found = split_corpus(examples, dev="4", test="4", disjoint=disjoint)
        for part in (found.train, found.dev, found.test):
            assert len(part) == 2 * len({normalize_text(one.text) for one in part})


def test_the_report_counts_forms_as_duplicates_and_marks_as_characters(tmp_path):
    examples = []
    for one in forms_of("कि वह zażółć", "Józef"):
        soundfile.write(tmp_path / one.audio, np.full(1600, 0.1 * len(one.text)), 16_000)
        examples.append(replace(one, audio=str(tmp_path / one.audio)))
    report = check_corpus(examples)
    assert report.duplicate_text.examples == (("NFD", "NFC"),)
    assert report.speakers == {"Józef": 2}
    assert report.characters["ि"] == 2
