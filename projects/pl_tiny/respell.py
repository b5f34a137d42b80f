"""Respell foreign text in Polish letters by its pronunciation: Russian `стоял у окна` → `stajal u akna`.

Pronunciations come from espeak-ng as IPA (one engine per process, shared with `synth`). A sound that the table lacks is
an error.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from mowa.errors import DataError
from projects.pl_tiny.synth import get_engine

LANGUAGES = ("cs", "en-us", "es", "es-419", "fr", "it", "ru")
STRESS = "+"  # before the stressed vowel of a Russian word; overrides espeak-ng

# A sound (espeak-ng's IPA, without stress and length) → Polish letters. Soft consonants are written as at the end of a
# word; `_SOFT` has their spelling before a vowel.
SOUNDS: dict[str, str] = {
    **{"p": "p", "b": "b", "t": "t", "d": "d", "k": "k", "ɡ": "g", "f": "f", "v": "w", "s": "s", "z": "z", "m": "m"},
    **{
        "n": "n",
        "l": "l",
        "ɭ": "l",
        "ɫ": "l",
        "ɬ": "l",
        "r": "r",
        "ɾ": "r",
        "ɹ": "r",
        "ʁ": "r",
        "x": "ch",
        "h": "h",
        "ɦ": "h",
    },
    **{"ts": "c", "dz": "dz", "tʃ": "cz", "dʒ": "dż", "tʂ": "cz", "dʐ": "dż", "ʃ": "sz", "ʒ": "ż", "ʂ": "sz", "ʐ": "ż"},
    **{
        "ɕ": "ś",
        "ʑ": "ź",
        "tɕ": "ć",
        "dʑ": "dź",
        "c": "ć",
        "ɟ": "dź",
        "ɲ": "ń",
        "ʎ": "lj",
        "ʝ": "j",
        "j": "j",
        "w": "ł",
    },
    **{"ɥ": "ł", "ŋ": "n", "θ": "f", "ð": "d", "β": "b", "ɣ": "g", "ʔ": "", "r̝": "rz", "ss": "s"},
    **{
        "sʲ": "ś",
        "zʲ": "ź",
        "nʲ": "ń",
        "tʲ": "ć",
        "dʲ": "dź",
        "tsʲ": "ć",
        "tʃʲ": "ć",
        "dʒʲ": "dź",
        "ʃʲ": "ś",
        "ʒʲ": "ź",
    },
    **{soft + "ʲ": soft for soft in "pbmfvkɡxrɭlh"},  # looked up again without its ʲ
    **{"a": "a", "ɑ": "a", "ɐ": "a", "ʌ": "a", "ɒ": "o", "o": "o", "ɔ": "o", "ɵ": "o", "u": "u", "ʊ": "u", "e": "e"},
    **{"ɛ": "e", "æ": "e", "ə": "e", "œ": "e", "ø": "e", "ɜ": "er", "ɚ": "er", "i": "i", "ɪ": "i", "ᵻ": "y", "ɨ": "y"},
    **{"y": "y", "ɛ̃": "ę", "œ̃": "ę", "ɔ̃": "ą", "ɑ̃": "ą", "n̩": "en", "l̩": "l", "r̩": "r", "m̩": "em"},
    **{"əl": "el", "iə": "ie", "aɪ": "aj", "eɪ": "ej", "ɔɪ": "oj", "oɪ": "oj", "aʊ": "au", "eʊ": "eu", "oʊ": "oł"},
    **{"əʊ": "oł"},
}
# Exceptions by language.
OVERRIDES: dict[str, dict[str, str]] = {
    "cs": {"ɣ": "h", "i": "y", "iː": "i"},
    "en-us": {"ɪ": "y", "ɾ": "d", "aʊ": "ał"},  # bridge is brydż in Polish
    "fr": {"y": "i"},
    "ru": {"ə": "a", "ɪ^": ""},
}
_SOFT = {"ś": "si", "ź": "zi", "ć": "ci", "dź": "dzi", "ń": "ni"}
_CZECH_HARD = frozenset("s z n c t d r sz ż cz".split())  # short i after these is spelt y
_VOWELS = frozenset("aąeęioóuy")
_IPA_VOWEL = re.compile(r"[aɑʌəeɛiɪoɵuyɔ]")
_MARKS = re.compile("[ˈˌˑ\"'-]|\u0325|\u030a|\u032a|\u0361")
_SWITCH = re.compile(r"\([a-z-]+\)")  # espeak-ng marks a word that it reads as another language
_CLAUSE = re.compile(r"[^\w\s'’+-]+|\s[-–—]+\s")
_CYRILLIC = re.compile("[\u0400-\u04ff]")
_CZECH_PREPOSITIONS = {"k": "k", "s": "s", "v": "w", "z": "z"}  # espeak-ng has z always devoiced
_RUSSIAN_STRESSED = dict(zip("аеёиоуыэюя", "aeoiouyeua", strict=True))
_RUSSIAN_UNSTRESSED = dict(zip("аеёиоуыэюя", "aioiauyiui", strict=True))


def respell(text: str, language: str) -> str:
    """Return the pronunciation of `text` in `language` (one of `LANGUAGES`) in lower-case Polish letters and spaces.

    Word boundaries are kept. Raise DataError for an unknown language, for Cyrillic letters in a language other than
    Russian (espeak-ng reads their names), and for a sound without a Polish spelling.
    """
    if language not in LANGUAGES:
        raise DataError(f"no Polish respelling for language {language!r}. Known: {', '.join(LANGUAGES)}.")
    if language != "ru" and (foreign := _CYRILLIC.search(text)):
        raise DataError(f"{foreign.group()!r} is not a letter of {language}: {text[:60]!r}. Leave the line out.")
    words: list[str] = []
    for clause in _CLAUSE.split(unicodedata.normalize("NFC", text).lower()):  # capitals would be spelt out
        words += _clause(_tokens(clause), language)
    return " ".join(word for word in words if word)


def _tokens(clause: str) -> list[str]:
    spaced = clause.replace("’", "'").replace("-", " ").replace("_", " ")
    return [word for word in (token.strip("'") for token in spaced.split()) if any(c.isalpha() for c in word)]


def _clause(words: list[str], language: str) -> Iterator[str]:
    """Respell the clause as a whole if espeak-ng returns as many words as it was given, else word by word."""
    pronounced = _phones(" ".join(words).replace(STRESS, ""), language)
    if len(pronounced) != len(words):
        yield from _one_by_one(words, language)
        return
    for word, phones in zip(words, pronounced, strict=True):
        if language == "cs" and len(words) > 1 and word in _CZECH_PREPOSITIONS:
            yield _CZECH_PREPOSITIONS[word]
        else:
            yield spell(_apply_stress(phones, word) if STRESS in word else phones, language)


def _one_by_one(words: list[str], language: str) -> Iterator[str]:
    """Respell word by word; prepositions of one consonant (Czech v, Russian с) are read with the next word."""
    clitic = ""
    for at, word in enumerate(words):
        if len(word) == 1 and language in ("cs", "ru") and word in "vszkвскб" and at + 1 < len(words):
            clitic = word
            continue
        pronounced = _phones(f"{clitic} {word.replace(STRESS, '')}".strip(), language)
        if clitic and len(pronounced) == 1:
            pronounced = [pronounced[0][:1], pronounced[0][1:]]
        clitic = ""
        if STRESS in word and len(pronounced) == 1:
            pronounced = [_apply_stress(pronounced[0], word)]
        yield from (spell(phones, language) for phones in pronounced)


def _phones(text: str, language: str) -> list[list[str]]:
    """Return the words that espeak-ng reads, each a list of IPA sounds without stress."""
    raw = get_engine().phonemes(text, language, separator="_")
    clauses = (_MARKS.sub("", unicodedata.normalize("NFD", _SWITCH.sub("", clause))) for clause in raw)
    words = [[phone for phone in word.split("_") if phone] for word in " ".join(clauses).split()]
    return [word for word in words if word]


def _apply_stress(phones: list[str], word: str) -> list[str]:
    """Change the vowels of a Russian word to fit the stress marked in it (`вол+ос`)."""
    letters = [(c, at) for at, c in enumerate(word) if c in _RUSSIAN_STRESSED]
    sounded = [at for at, phone in enumerate(phones) if _IPA_VOWEL.search(phone) and phone != "ɪ^"]
    marked = word.index(STRESS) + 1
    if len(letters) != len(sounded) or marked not in {at for _, at in letters}:
        return phones
    phones = list(phones)
    for (letter, at), place in zip(letters, sounded, strict=True):
        vowel = (_RUSSIAN_STRESSED if at == marked else _RUSSIAN_UNSTRESSED)[letter]
        if letter == "я" and at == len(word) - 1:
            vowel = "a"
        phones[place] = _IPA_VOWEL.sub(vowel, phones[place])
    return phones


def spell(phones: list[str], language: str) -> str:
    """Spell the IPA sounds of one word in Polish. Raise DataError for a sound without a spelling."""
    table = SOUNDS | OVERRIDES.get(language, {})
    if language == "fr":
        phones = [_glide(phone, after) for phone, after in zip(phones, [*phones[1:], ""], strict=True)]
    pieces = [piece for phone in phones for piece in _sound(phone, table, language) if piece[0]]
    out, last, soft = "", "", False  # `soft`: the last consonant softens a vowel that follows
    for at, (letters, softens) in enumerate(pieces):
        before_vowel = at + 1 < len(pieces) and pieces[at + 1][0][0] in _VOWELS
        if letters == "j" and last == "j":
            continue
        if letters == "i" and last in {"c", "dz"} and not soft:  # Polish would read `ci`, `dzi` as soft
            letters = "j" if before_vowel else "y"
        if letters == "y" and language == "cs" and last not in _CZECH_HARD:
            letters = "i"
        if letters[0] in _VOWELS and soft:
            stem = _SOFT.get(last, last if last == "l" else last + "i")
            out = out[: len(out) - len(last)] + (stem.removesuffix("i") if letters[0] == "i" else stem)
        if (
            letters == "i"
            and phones[-1].rstrip("ː") == "ɪ"
            and language == "it"
            and at + 1 == len(pieces)
            and last in _VOWELS
        ):
            letters = "j"
        out += letters
        last, soft = letters, softens
    return _yods(out.replace("err", "er") if language == "en-us" else out)  # ɚɹ is one r


def _glide(phone: str, after: str) -> str:
    """Return ɥ for French y before a vowel (the glide of nuit), which espeak-ng does not distinguish."""
    return "ɥ" if phone.rstrip("ː") == "y" and _IPA_VOWEL.match(after) else phone


def _yods(word: str) -> str:
    """Write j between a consonant and a vowel as i (pjeno → pieno), except after sibilants, which i would soften."""
    word = re.sub(r"(?<=[śźćń])j(?=[aąeęiou])", "ʲ", word)
    for letter, stem in _SOFT.items():
        word = word.replace(letter + "ʲi", stem).replace(letter + "ʲ", stem)
    word = word.replace("dźzi", "dzi")
    return re.sub(r"lj(?![aąeęou])", "l", re.sub(r"(?<=[bdfghklłmnprtw])j(?=[aąeęou])", "i", word))


def _sound(phone: str, table: dict[str, str], language: str) -> Iterator[tuple[str, bool]]:
    """Yield (letters, soft) for one espeak-ng sound, matching the longest pieces first."""
    if phone in table and not phone.endswith("ʲ"):
        yield table[phone], table[phone] in _SOFT
        return
    rest = phone.replace("^", "").replace("ː", "")
    while rest:
        for size in range(min(4, len(rest)), 0, -1):
            piece = rest[:size]
            if piece in table:
                letters = table[piece]
                plain = letters + "ʲ" == piece
                yield (table[letters] if plain else letters), letters in _SOFT or plain
                rest = rest[size:]
                break
        else:
            raise DataError(f"no Polish spelling for the sound {rest!r} of {phone!r} in {language}")
