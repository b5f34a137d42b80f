"""Sentences to speak: read from Debian text packages or plain files, cleaned so that what is spoken is what is written.

This room knows written language; it refuses to know how a sentence sounds or what a model makes of it.
A sentence is kept only if every word is spelt as it is read aloud: no digits, acronyms, abbreviations or foreign signs.
"""

from __future__ import annotations

import gettext
import gzip
import hashlib
import html
import io
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from mowa.data.text.normalize import normalize_text
from mowa.errors import DataError, MissingDependency

POLISH = "aąbcćdeęfghijklłmnńoóprsśtuwyzźżqvx"
VOWELS = set("aąeęioóuy")
# Read aloud as other words than they are written.
ABBREVIATIONS = frozenset(
    "np itp itd tzn tzw tj m.in ok ul al r w. nr str rys tab św dr mgr inż prof godz min sek zob por ww wg ds pt ang "
    "etc tys mln mld zł gr kg km cm mm mb kb gb hz pkt ust art wyd cd cdn im ks pl ur zm jw js mr ms co. vs".split()
)
DIACRITICS = set("ąćęłńóśźż")  # every kept sentence has one: untranslated text stands among the translated
EDGES = ".,!?;:…„”\"'()«»–—-"
_SENTENCE = re.compile(r"(?<=[.!?…])\s+(?=[A-ZĄĆĘŁŃÓŚŹŻ„\"])")
_ROFF = re.compile(r"\\f[A-Z]|\\f\([A-Z]{2}|\\[&%/^|]|\\s[+-]?\d")
_TAG = re.compile(r"<[^>]+>")


def speakable(sentence: str, alphabet: str = POLISH, *, words: tuple[int, int] = (3, 20), longest: int = 150) -> bool:
    """Whether a synthesiser reads the sentence letter for letter as it is written."""
    tokens = sentence.split()
    if not set(sentence.lower()) & DIACRITICS:
        return False
    if not words[0] <= len(tokens) <= words[1] or len(sentence) > longest or sentence[-1:] not in ".!?…":
        return False
    letters = set(alphabet)
    for token in tokens:
        word = token.strip(EDGES)
        lower = word.lower()
        if not word:
            if token in {"–", "—", "-"}:
                continue
            return False
        if not set(lower) <= letters or word[1:] != word[1:].lower():
            return False
        if lower in ABBREVIATIONS or (not set(lower) & VOWELS and lower not in {"w", "z"}):
            return False
    return True


def sentences(paragraphs: Iterable[str], alphabet: str = POLISH) -> Iterator[str]:
    """The speakable sentences of running text, each once (compared in its `plain` form)."""
    seen: set[str] = set()
    for paragraph in paragraphs:
        for sentence in _SENTENCE.split(" ".join(paragraph.split())):
            key = normalize_text(sentence)
            if key not in seen and speakable(sentence, alphabet):
                seen.add(key)
                yield sentence


def split(lines: Iterable[str], *, held_out: float = 0.02, ngram: int = 4) -> tuple[list[str], list[str]]:
    """(training, held out). The choice follows the sentence's own hash; no held-out sentence shares `ngram` words in a
    row with any training sentence, those that do are dropped from both."""
    training: list[str] = []
    candidates: list[str] = []
    for line in lines:
        share = int.from_bytes(hashlib.sha256(normalize_text(line).encode()).digest()[:4], "big") / 2**32
        (candidates if share < held_out else training).append(line)
    known = {gram for line in training for gram in _grams(line, ngram)}
    return training, [line for line in candidates if not known & _grams(line, ngram)]


def _grams(line: str, n: int) -> set[tuple[str, ...]]:
    words = normalize_text(line).split()
    n = min(n, len(words))
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


# What is read of each Debian package: a pattern of file names and how paragraphs are found in such a file.
def _catalog(data: bytes) -> Iterator[str]:
    messages = gettext.GNUTranslations(io.BytesIO(data))._catalog  # type: ignore[attr-defined]
    for text in messages.values():
        yield from re.split(r"\n\s*\n", text)


def _markup(data: bytes) -> Iterator[str]:
    for paragraph in re.findall(r"<p\b[^>]*>(.*?)</p>", data.decode(errors="ignore"), re.S):
        yield html.unescape(_TAG.sub("", paragraph))


def _manual(data: bytes) -> Iterator[str]:
    lines = gzip.decompress(data).decode(errors="ignore").splitlines()
    text = "\n".join("" if line.startswith((".", "'")) else line for line in lines)
    yield from re.split(r"\n\s*\n", _ROFF.sub("", text).replace("\\-", "-"))


def _fortunes(data: bytes) -> Iterator[str]:
    for entry in data.decode(errors="ignore").split("\n%\n"):
        yield from (line.lstrip("-– ") for line in re.split(r"\n(?=[-–])|\n\s*\n", entry))


def _dialogue(data: bytes) -> Iterator[str]:
    yield from re.findall(r'dialogStr\("([^"]+)"', data.decode(errors="ignore"))


_OFFENSIVE = "szowinistyczne|feministyczne|lepper|rasist|zydzi|blondynk|dowcipy$|sex|wulgar|chuck"
READERS: dict[str, tuple[str, Callable[[bytes], Iterator[str]]]] = {
    "libreoffice-help-pl": (r"/help/pl/text/.*\.html$", _markup),
    "gnome-user-docs": (r"/help/pl/.*\.page$", _markup),
    "manpages-pl": (r"/man/pl/.*\.gz$", _manual),
    "fortunes-pl": (rf"/fortunes/pl/(?!.*({_OFFENSIVE}))[^.]+(\.pl)?$", _fortunes),
    "freeciv-data": (r"/locale/pl/.*\.mo$", _catalog),
    "wesnoth-1.16-data": (r"/locale/pl/.*\.mo$", _catalog),
    "wesnoth-1.16-httt": (r"/locale/pl/.*\.mo$", _catalog),
    "fillets-ng-data": (r"/dialogs_pl\.lua$", _dialogue),
}


def debian(package: str, folder: Path) -> Iterator[str]:
    """Paragraphs of a Debian package in `READERS`, downloaded (never installed) into `folder` with apt-get."""
    if package not in READERS:
        raise DataError(f"{package}: no reader for this Debian package; known: {', '.join(READERS)}")
    pattern, paragraphs = READERS[package]
    for _, data in members(package, folder, pattern):
        yield from paragraphs(data)


def members(package: str, folder: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """(path, content) of the files of a Debian package whose path has `pattern` in it; downloaded where not there."""
    archive = _download(package, folder)
    with tempfile.TemporaryFile() as unpacked:
        subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], stdout=unpacked, check=True)
        unpacked.seek(0)
        with tarfile.open(fileobj=unpacked) as tar:
            for member in tar:
                if member.isfile() and re.search(pattern, member.name):
                    stream = tar.extractfile(member)
                    if stream is not None:
                        yield member.name.removeprefix("./"), stream.read()


def _download(package: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(folder.glob(f"{package}_*.deb"))
    if found:
        return found[-1]
    if shutil.which("apt-get") is None:
        raise MissingDependency(
            f"{package}: apt-get is needed to download Debian packages; put {package}_*.deb into {folder}."
        )
    done = subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, capture_output=True, text=True)
    found = sorted(folder.glob(f"{package}_*.deb"))
    if not found:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise DataError(f"{package}: apt-get could not download it ({reason}). Run `apt-get update` and try again.")
    return found[-1]
