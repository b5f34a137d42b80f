import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mowa.errors import DataError
from projects.pl_tiny.respell import LANGUAGES, OVERRIDES, SOUNDS, respell, spell
from projects.pl_tiny.text import POLISH_ALPHABET

RESPELT = {
    "ru": {
        "нет": "niet", "день": "dzien", "мать": "mać", "чай": "ciaj", "щука": "siuka", "люди": "ludzi",
        "тётя": "ciocia", "нянька": "nianka", "письмо": "piśmo", "съел": "sjel", "льёт": "liot", "вы": "wy",
        "улицу": "ulicu", "хлеб": "chlep", "семья": "simia", "жить": "żyć",
    },
    "it": {
        "prego": "prego", "gli": "li", "gnocchi": "nioki", "chiesa": "kieza", "grazie": "gracje",
        "stazione": "stacjone", "niente": "niente", "figlia": "filia", "cielo": "czelo", "giorno": "dżorno",
        "attivato": "atiwato", "voce": "wocze",
    },
    "es-419": {
        "niño": "ninio", "llama": "jama", "queso": "keso", "bueno": "błeno", "seis": "sejs", "zapato": "sapato",
        "jamón": "chamon", "hoy": "oj", "número": "numero", "noche": "nocze", "guerra": "gera", "dedo": "dedo",
    },
    "en-us": {
        "please": "pliz", "your": "jur", "pound": "pałnd", "key": "ki", "house": "hałs", "show": "szoł",
        "bird": "berd", "think": "fynk", "check": "czek", "choice": "czojs", "bank": "benk", "five": "fajw",
    },
    "fr": {
        "bonjour": "bążur", "un": "ę", "bon": "bą", "vin": "wę", "blanc": "blą", "moi": "mła", "nuit": "nłi",
        "fille": "fij", "peu": "pe", "oui": "łi", "rue": "ri", "merci": "mersi",
    },
    "cs": {
        "říká": "rzika", "žluťoučký": "żluciołczki", "kůň": "kuń", "děti": "dzieci", "nic": "nic", "syn": "syn",
        "cizí": "cyzi", "město": "mniesto", "chléb": "chlep", "prst": "prst", "vítejte": "witejte", "auto": "auto",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("language", "text", "respelt"), [(key, *pair) for key, words in RESPELT.items() for pair in words.items()]
)
def test_words_are_respelt_by_pronunciation(language, text, respelt):
    assert respell(text, language) == respelt


@pytest.mark.parametrize(
    ("language", "text", "respelt"),
    [
        ("ru", "Введите пароль, и нажмите решётку.", "wwidzici parol i nażmici riszotku"),
        ("it", "Quell'operatore è già loggato.", "kłelloperatore e dża logato"),
        ("en-us", "I want to go out of the house!", "aj łont tu goł ałt aw de hałs"),
        ("fr", "Les enfants, c'est vrai – oui.", "lez ąfą se wre łi"),
        ("cs", "Vítejte v městě, z lesa k domu.", "witejte w mniescie z lesa k domu"),
    ],
)
def test_word_boundaries_are_kept(language, text, respelt):
    assert respell(text, language) == respelt
    assert len(respelt.split()) == len(text.replace("–", " ").split())


def test_marked_stress_changes_vowels():
    assert respell("вол+ос", "ru") == "walos"
    assert respell("в+олос", "ru") == "wolas"


@pytest.mark.parametrize("text", ["", "  ", "... – !", "'"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_text_without_words_is_empty(text, language):
    assert respell(text, language) == ""


def test_unknown_language():
    with pytest.raises(DataError, match=r"'hu'.*Known: cs, en-us"):
        respell("jó napot", "hu")


def test_foreign_letters_are_refused():
    with pytest.raises(DataError, match="'П' is not a letter of cs"):
        respell("Подожди, počkej.", "cs")


def test_an_unknown_sound_is_named():
    with pytest.raises(DataError, match="no Polish spelling for the sound 'ǃ'"):
        spell(["a", "ǃ"], "ru")


def test_every_sound_has_polish_letters():
    for table in (SOUNDS, *OVERRIDES.values()):
        for sound, letters in table.items():
            assert set(letters) <= set(POLISH_ALPHABET) or sound == letters + "ʲ", sound
            assert not sound.endswith("ʲ") or sound != letters + "ʲ" or letters in SOUNDS


LETTERS = {
    "ru": "абвгдеёжзийклмнопрстуфхцчшщъыьэюя",
    "it": "abcdefghilmnopqrstuvzàèéìòù",
    "es": "abcdefghijlmnñopqrstuvxyzáéíóú",
    "es-419": "abcdefghijlmnñopqrstuvxyzáéíóú",
    "en-us": "abcdefghijklmnopqrstuvwxyz",
    "fr": "abcdefghijlmnopqrstuvxyzàâçèéêëîïôùûœ",
    "cs": "aábcčdďeéěfghiíjklmnňoóprřsštťuúůvyýzž",
}


@pytest.mark.parametrize("language", LANGUAGES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_output_has_only_polish_letters(language, data):
    words = st.lists(st.text(LETTERS[language], min_size=1, max_size=8), max_size=5)
    respelt = respell(" ".join(data.draw(words)), language)
    assert set(respelt) <= set(POLISH_ALPHABET + " ")
    assert respelt == " ".join(respelt.split())
