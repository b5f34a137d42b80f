import shutil

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from mowa.data.manifests.examples import read_examples
from mowa.data.text.normalize import normalize_text
from mowa.errors import DataError, MissingDependency
from projects.pl_tiny import festival, transliterate
from projects.pl_tiny.text import POLISH_ALPHABET

LINES = ["Źdźbło trawy rośnie.", "Chrząszcz brzmi w trzcinie, a ja słucham.", "Gdzie jest mój żółty kot?"]
CZECH = {
    "kot": "kot",
    "szczęście": "ščenščje",
    "rzeka": "žeka",
    "trzeba": "tšeba",
    "przez": "pšez",
    "człowiek": "čuovjek",
    "łódź": "uudž",
    "źdźbło": "ždžbuo",
    "chwila": "chfíla",
    "kwiat": "kfjat",
    "niebo": "ňebo",
    "koń": "koň",
    "siano": "šjano",
    "cicho": "čícho",
    "ciemno": "čjemno",
    "dzień": "džjeň",
    "idą": "ídom",
    "idę": "íde",
    "ząb": "zomb",
    "wziął": "vžjou",
    "księżyc": "kšjenžyc",
    "dżungla": "džungla",
    "marznąć": "marznoňč",
    "moich": "mojích",
    "partia": "partja",
    "taksówka": "taksuvka",
}
RUSSIAN = {
    "kot": "к+от",
    "matka": "м+атка",
    "jego": "й+эго",
    "szkoła": "шк+оўа",
    "człowiek": "тшў+овек",
    "rzeka": "ж+эка",
    "trzeba": "тш+эба",
    "koń": "к+онь",
    "niebo": "н+ебо",
    "siano": "щ+ано",
    "ciemno": "ч+емно",
    "dziadek": "дз+ядэк",
    "lato": "л+ято",
    "lody": "л+ёды",
    "piątek": "п+ёнтэк",
    "kiosk": "к+ёск",
    "idę": "+идэ",
    "dobrymi": "добр+ыми",
    "zjeść": "зй+эщч",
    "język": "й+энзык",
    "łódź": "ў+удзь",
    "biuro": "б+юро",
    "miś": "м+ищ",
    "się": "ще",
}


@pytest.mark.parametrize(("polish", "czech"), CZECH.items())
def test_czech_letters(polish, czech):
    assert transliterate.to_czech(polish) == czech


@pytest.mark.parametrize(("polish", "russian"), RUSSIAN.items())
def test_russian_letters(polish, russian):
    assert transliterate.to_russian(polish) == russian


def test_pauses_are_kept():
    assert transliterate.to_czech("Mieszkam w domu – z kotem; „a ty”?") == "mješkam vdomu, zkotem, a ty?"
    assert transliterate.to_russian("Tak… nie!") == "т+ак. не!"
    assert transliterate.to_czech("Idę z w") == "íde zv"
    assert transliterate.to_czech("") == transliterate.to_russian("?") == ""


@given(st.text(alphabet=POLISH_ALPHABET + POLISH_ALPHABET.upper() + " .,!?;:…„”–-'\""))
def test_output_has_only_letters_of_the_target_language(text):
    assert set(transliterate.to_czech(text)) <= transliterate.CZECH_LETTERS | set(" .,!?")
    assert set(transliterate.to_russian(text)) <= transliterate.RUSSIAN_LETTERS | set(" .,!?")
    transliterate.to_czech(text).encode("iso-8859-2")


@given(st.text())
def test_any_text_is_safe_inside_a_scheme_string(text):
    assert not set(transliterate.to_czech(text) + transliterate.to_russian(text)) & set('"\\\n')


@given(st.text(alphabet=POLISH_ALPHABET, min_size=1))
def test_a_russian_word_has_one_stress_at_most(word):
    assert transliterate.to_russian(word).count("+") <= 1


def test_plan_goes_through_all_lines_in_each_epoch():
    chosen = festival.plan_utterances(LINES, "czech_ph", count=7, seed=3)
    assert sorted(u.text for u in chosen[:3]) == sorted(LINES)
    assert chosen == festival.plan_utterances(LINES, "czech_ph", count=7, seed=3)
    assert all(0.83 < u.rate <= 1.25 and 0.85 <= u.pitch <= 1.2 for u in chosen)
    assert {(u.rate, u.pitch) for u in festival.plan_utterances(LINES, "msu_ru_nsh_clunits", count=7, seed=3)} == {
        (1.0, 1.0)
    }


def test_no_lines_and_unknown_voices_are_refused(tmp_path):
    with pytest.raises(DataError, match="no sentences"):
        festival.plan_utterances([], "czech_ph", count=1, seed=0)
    with pytest.raises(DataError, match="unknown festival voice"):
        festival.build_corpus(LINES, tmp_path, clips={"czech_nobody": 1})


def test_missing_festival_names_the_packages(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependency, match="apt-get install festival festvox-czech-ph"):
        festival.build_corpus(LINES, tmp_path / "out", clips={"czech_ph": 1})
    assert not (tmp_path / "out").exists()


def test_missing_voice_names_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr(festival, "_VOICES", tmp_path)
    monkeypatch.setattr(festival.shutil, "which", lambda _: "/usr/bin/festival")
    with pytest.raises(MissingDependency, match=r"apt-get install festvox-ru$"):
        festival.build_corpus(LINES, tmp_path / "out", clips={"msu_ru_nsh_clunits": 1})


INSTALLED = [name for name in festival.VOICES if list(festival._VOICES.glob(f"*/{name}"))]


@pytest.mark.skipif(shutil.which("festival") is None or not INSTALLED, reason="festival or its voices not installed")
@pytest.mark.parametrize("voice", INSTALLED)
def test_corpus_is_written_read_back_and_resumed(tmp_path, voice):
    hours = festival.build_corpus(LINES, tmp_path, clips={voice: 3}, seed=1)
    manifest = tmp_path / f"{voice}.jsonl"
    examples = list(read_examples(manifest))
    assert sorted(e.text for e in examples) == sorted(normalize_text(line) for line in LINES)
    assert sum(e.duration_s for e in examples) / 3600 == pytest.approx(hours[voice])
    for example in examples:
        samples, rate_hz = soundfile.read(example.audio)
        assert rate_hz == 16_000
        assert len(samples) / rate_hz == pytest.approx(example.duration_s, abs=1e-3)
        assert example.duration_s > 0.5
        assert 0.02 < np.abs(samples).max() <= 1
    before = manifest.read_text()
    kept, lost = sorted(tmp_path.rglob("*.wav"))[:2]
    stamp = kept.stat().st_mtime_ns
    lost.unlink()
    festival.build_corpus(LINES, tmp_path, clips={voice: 3}, seed=1)
    assert lost.exists()
    assert kept.stat().st_mtime_ns == stamp
    if voice == "msu_ru_nsh_clunits":  # festival-czech randomizes melody and pauses
        assert manifest.read_text() == before
    assert not list(tmp_path.rglob("*.part*"))
