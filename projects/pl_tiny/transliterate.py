"""Transliterate Polish into Czech or Russian spelling by its sounds, for synthesizers of those languages.

The accent is foreign by construction: Czech has no ś ć ź and no y distinct from i, Russian has no dż or cz as single
sounds.
"""

from __future__ import annotations

import re
from collections.abc import Callable

# Polish graphemes → sounds. A sound is written as Polish would write it alone; w̯ is ł, x is ch, ' is the softening of
# a consonant by `i` before a vowel.
_GRAPHEMES = {
    **{"dż": "dż", "dź": "dź", "dz": "dz", "cz": "cz", "sz": "sz", "rz": "ż", "ch": "x", "h": "x", "ó": "u"},
    **{"ł": "w̯", "q": "k", "v": "w"},
}
_SOFT = {"s": "ś", "z": "ź", "c": "ć", "n": "ń", "dz": "dź"}
_VOICELESS = frozenset("p t k f s sz ś x c cz ć".split())
_VOWELS = frozenset("aeiouy")
_LETTER = "aąbcćdeęfghijklłmnńoóprsśtuwyzźżqvx"
# Words in which r and z are two sounds.
_SEPARATE_RZ = re.compile(r"(?<=ma)r(?=z(?:n|ł))|(?<=^mie)r(?=zi)|(?<=ta)r(?=zan)|(?<=^e)r(?=zac)")
_NASAL_BEFORE = {
    **dict.fromkeys(("p", "b"), "m"),
    **dict.fromkeys(("ć", "dź"), "ń"),
    **dict.fromkeys(("l", "w̯"), ""),
}
# Clitics: words without a stress of their own in Russian.
_CLITICS = frozenset(
    "a i o u w z że się mi ci go mu jej je na do od po za ze we ku bez dla nad pod przed przez przy nie ni by no to "
    "lub bo czy jak".split()
)


def to_phones(word: str) -> list[str]:
    """Return the sounds of one Polish word. Letters outside the Polish alphabet (with q, v, x) are dropped.

    Voicing across words and at word ends is left to the voices, whose languages treat it as Polish does.
    """
    word = _SEPARATE_RZ.sub("r-", "".join(c for c in word.lower() if c in _LETTER).replace("x", "ks"))
    sounds: list[str] = []
    at = 0
    while at < len(word):
        letters = word[at : at + 2] if word[at : at + 2] in _GRAPHEMES else word[at]
        at += len(letters)
        following = word[at : at + 1]
        if letters == "-":
            continue
        sound = _GRAPHEMES.get(letters, letters)
        if letters in ("rz", "w", "v") and sounds and sounds[-1] in _VOICELESS:
            sound = "sz" if letters == "rz" else "f"
        if sound == "i" and sounds and sounds[-1] in _VOWELS | {"ą", "ę"}:
            sounds.append("j")
        if following == "i" and sound not in _VOWELS and sound not in "ąęj":
            before_vowel = word[at + 1 : at + 2] in tuple("aąeęoóuy")
            if sound in _SOFT:
                sounds.append(_SOFT[sound])
                at += before_vowel
            elif before_vowel:
                sounds += [sound, "'"]
                at += 1
            else:
                sounds.append(sound)
        else:
            sounds.append(sound)
    return _split_nasals(sounds)


def _split_nasals(sounds: list[str]) -> list[str]:
    """Replace ą by on, om, oń or o and ę by en, em, eń or e, by what follows; at a word's end by om and e."""
    out: list[str] = []
    for sound, following in zip(sounds, [*sounds, ""][1:], strict=True):
        if sound not in ("ą", "ę"):
            out.append(sound)
            continue
        out.append("o" if sound == "ą" else "e")
        nasal = _NASAL_BEFORE.get(following, "n") if following else ("m" if sound == "ą" else "")
        out += [nasal] if nasal else []
    return out


_CZECH = {
    **{"sz": "š", "ś": "š", "cz": "č", "ć": "č", "ż": "ž", "ź": "ž", "dż": "dž", "dź": "dž", "dz": "dz", "ń": "ň"},
    **{"w": "v", "w̯": "u", "x": "ch", "'": "j", "i": "í"},
}
_RUSSIAN = {
    **{"a": "а", "e": "э", "i": "и", "o": "о", "u": "у", "y": "ы", "b": "б", "c": "ц", "ć": "ч", "cz": "тш", "d": "д"},
    **{"dz": "дз", "dź": "дзь", "dż": "дж", "f": "ф", "g": "г", "x": "х", "j": "й", "k": "к", "l": "ль", "w̯": "ў"},
    **{"m": "м", "n": "н", "ń": "нь", "p": "п", "r": "р", "s": "с", "ś": "щ", "sz": "ш", "t": "т", "w": "в"},
    **{"z": "з", "ź": "зь", "ż": "ж", "'": "ь"},
}
_IOTED = {"а": "я", "э": "е", "о": "ё", "у": "ю"}
_RUSSIAN_VOWELS = "аэиоуыяеёю"
CZECH_LETTERS = frozenset("abcdefgjklmnoprstuvyzíčšžňh")
RUSSIAN_LETTERS = frozenset("абвгджзийклмнопрстуфхцчшщыьэюяеёў+")


def _czech_word(word: str) -> str:
    """Spell ś ć ź dź as š č ž dž, with a j before vowels other than i to keep them distinct from sz cz ż dż.

    Whisper base has a CER of 8 % with the j and 9 % without, on 20 clips of two voices each.
    """
    letters = ""
    sounds = to_phones(word)
    for sound, following in zip(sounds, [*sounds, ""][1:], strict=True):
        glide = "j" if sound in ("ś", "ć", "ź", "dź") and following in tuple("aeou") else ""
        letters += _CZECH.get(sound, sound) + glide
    return letters


def _russian_word(word: str) -> str:
    letters = ""
    for sound in to_phones(word):
        letter = _RUSSIAN[sound]
        if letter in _IOTED and letters.endswith("ь"):
            letters = letters[:-1] + _IOTED[letter]
        elif letter in _IOTED and letters[-1:] in ("ч", "щ") and letter == "э":
            letters += "е"
        elif letter == "и" and letters.endswith("ь"):
            letters = letters[:-1] + "и"
        elif letter == "ь" and letters.endswith("ь"):
            continue
        else:
            letters += letter
    return letters


def _mark_stress(word: str) -> str:
    """Put + before the penultimate vowel, or before the only one."""
    vowels = [at for at, letter in enumerate(word) if letter in _RUSSIAN_VOWELS]
    return word if not vowels else f"{word[: (at := vowels[-2:][0])]}+{word[at:]}"


def _spell_sentence(text: str, spell: Callable[[str], str]) -> str:
    """Spell each word, keep commas and sentence ends, and join w and z to the next word."""
    spelt: list[str] = []
    clitic = ""
    for token in re.sub(r"\s[-–—]\s", ", ", text).split():
        word = clitic + "".join(c for c in token.lower() if c in _LETTER)
        if word in ("w", "z"):
            clitic = word
            continue
        clitic = ""
        end = re.search(r"[.,!?;:…]", token[::-1])
        mark = {"…": ".", ";": ",", ":": ","}.get(end[0], end[0]) if end else ""
        letters = spell(word)
        if letters:
            spelt.append(letters + mark)
        elif mark and spelt and spelt[-1][-1] not in ".,!?":
            spelt[-1] += mark
    return " ".join([*spelt, spell(clitic)] if clitic else spelt)


def to_czech(text: str) -> str:
    """Spell a Polish sentence in Czech letters: `Źdźbło rośnie.` → `ždžbuo rošňe.`; y (short) stays y, i is í."""
    return _spell_sentence(text, _czech_word)


def to_russian(text: str) -> str:
    """Spell a Polish sentence in Russian letters, with + before stressed vowels and Belarusian ў (short u) for ł."""
    return _spell_sentence(
        text, lambda word: _russian_word(word) if word in _CLITICS else _mark_stress(_russian_word(word))
    )
