import gettext
import gzip
import io
import struct

import pytest

from mowa.errors import DataError
from projects.pl_tiny import text


@pytest.mark.parametrize(
    "sentence",
    [
        "Cóż to za dziwny statek?",
        "Nie łam się.",
        "Tak – to była „pieśń” o morzu!",
        "W tym pliku są źródła, i to z Rzymu.",
    ],
)
def test_readable_sentences(sentence):
    assert text.is_readable(sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "Rozdział 3 mówi o tym.",  # a digit
        "Plik HTML się otworzył.",  # an acronym
        "Zobacz np. ten ósmy plik.",  # an abbreviation
        "Wartość x_y jest większa.",  # a sign that is not read aloud
        "To jest bez takich liter.",  # no diacritic: possibly another language
        "Łódź bez końca",  # no end
        "Źle.",  # too short
        "Ślad " * 30 + "kończy się.",  # too long
        "Müller śpiewał tę pieśń.",  # a foreign letter
        "Wśród str krążą zjawy.",  # no vowel
    ],
)
def test_unreadable_sentences(sentence):
    assert not text.is_readable(sentence)


def test_sentences_are_unique():
    paragraphs = ["Cóż to za dziwny\nstatek? Nie łam się!", "„Nie łam się.” Rozdział 3 mówi o tym."]
    assert list(text.extract_sentences(paragraphs)) == ["Cóż to za dziwny statek?", "Nie łam się!"]


def test_normalize_text():
    assert text.normalize_text("  Cóż, to – „Statek”? ") == "cóż to statek"


def test_split_shares_no_four_words():
    words = "ala ma kota a pies śpi w kącie pod starym stołem obok drzwi".split()
    lines = [" ".join([*words[i % 7 : i % 7 + 5], f"koniec{'a' * (i % 50)}ż"]) for i in range(600)]
    lines += [f"zupełnie {'ą' * i} inne {'b' * i} zdanie {'c' * i}" for i in range(1, 200)]
    training, held_out = text.split_held_out(lines, held_out=0.1)
    grams = {g for line in training for g in text._grams(line, 4)}
    assert training
    assert held_out
    assert not any(grams & text._grams(line, 4) for line in held_out)
    assert text.split_held_out(lines, held_out=0.1) == (training, held_out)


def catalog(messages):
    """A compiled gettext catalogue (the GNU .mo layout)."""
    keys = sorted(messages)
    ids, strings, table = b"", b"", []
    for key in keys:
        one, other = key.encode(), messages[key].encode()
        table.append((len(one), len(ids), len(other), len(strings)))
        ids, strings = ids + one + b"\0", strings + other + b"\0"
    count, start = len(keys), 28
    ids_at = start + 16 * count
    head = struct.pack("<7I", 0x950412DE, 0, count, start, start + 8 * count, 0, 0)
    first = b"".join(struct.pack("<2I", length, ids_at + at) for length, at, _, _ in table)
    second = b"".join(struct.pack("<2I", length, ids_at + len(ids) + at) for _, _, length, at in table)
    return head + first + second + ids + strings


def test_readers():
    data = catalog({"": "Content-Type: text/plain; charset=UTF-8\n", "ship": "Cóż to za statek?\n\nDrugi akapit."})
    assert gettext.GNUTranslations(io.BytesIO(data)).gettext("ship").startswith("Cóż")
    assert "Drugi akapit." in list(text._catalog(data))
    assert list(text._markup("<p class='x'>To <b>jest</b> &bdquo;ł&rdquo;.</p><td>nie</td>".encode())) == [
        "To jest „ł”."
    ]
    manual = ".TH LS 1\nListuje \\fBpliki\\fR w kata\\-logu.\n.PP\nDrugi."
    assert [part.strip() for part in text._manual(gzip.compress(manual.encode()))] == [
        "Listuje pliki w kata-logu.", "Drugi.",
    ]  # fmt: skip
    assert list(text._dialogue('dialogStr("Cóż to?")\ndialogId("a", "b", "c")'.encode())) == ["Cóż to?"]
    assert list(text._fortunes(b"Raz.\n%\n- Dwa?\n- Trzy!")) == ["Raz.", "Dwa?", "Trzy!"]


def test_unknown_package(tmp_path):
    with pytest.raises(DataError, match="libreoffice-help-pl"):
        next(text.read_debian_package("kernel", tmp_path))
