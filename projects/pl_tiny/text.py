"""Collect sentences to synthesize from Debian text packages or plain files.

A sentence is kept only if a synthesizer reads it letter by letter as written: no digits, acronyms, abbreviations or
foreign letters.
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

POLISH_ALPHABET = "aąbcćdeęfghijklłmnńoóprsśtuwyzźżqvx"
VOWELS = set("aąeęioóuy")
# These are read aloud as other words than they are written.
ABBREVIATIONS = frozenset(
    "np itp itd tzn tzw tj m.in ok ul al r w. nr str rys tab św dr mgr inż prof godz min sek zob por ww wg ds pt ang "
    "etc tys mln mld zł gr kg km cm mm mb kb gb hz pkt ust art wyd cd cdn im ks pl ur zm jw js mr ms co. vs".split()
)
DIACRITICS = set("ąćęłńóśźż")  # every kept sentence has one: translated catalogues contain untranslated text
EDGES = ".,!?;:…„”\"'()«»–—-"
_SENTENCE = re.compile(r"(?<=[.!?…])\s+(?=[A-ZĄĆĘŁŃÓŚŹŻ„\"])")
_ROFF = re.compile(r"\\f[A-Z]|\\f\([A-Z]{2}|\\[&%/^|]|\\s[+-]?\d")
_TAG = re.compile(r"<[^>]+>")


def is_readable(
    sentence: str, alphabet: str = POLISH_ALPHABET, *, words: tuple[int, int] = (3, 20), max_length: int = 150
) -> bool:
    """Return whether a synthesizer reads the sentence letter by letter as written.

    `words`: minimum and maximum number of words. `max_length`: in characters.
    """
    tokens = sentence.split()
    if not set(sentence.lower()) & DIACRITICS:
        return False
    if not words[0] <= len(tokens) <= words[1] or len(sentence) > max_length or sentence[-1:] not in ".!?…":
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


def extract_sentences(paragraphs: Iterable[str], alphabet: str = POLISH_ALPHABET) -> Iterator[str]:
    """Yield the readable sentences of running text, each once (compared after `normalize_text`)."""
    seen: set[str] = set()
    for paragraph in paragraphs:
        for sentence in _SENTENCE.split(" ".join(paragraph.split())):
            key = normalize_text(sentence)
            if key not in seen and is_readable(sentence, alphabet):
                seen.add(key)
                yield sentence


def split_held_out(lines: Iterable[str], *, held_out: float = 0.02, ngram: int = 4) -> tuple[list[str], list[str]]:
    """Return (training, held-out) sentences.

    A sentence is held out by its own hash, so the split does not depend on the others. Held-out sentences that share
    `ngram` consecutive words with a training sentence are dropped.
    """
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


# Readers of the files in a Debian package: bytes of one file → paragraphs.
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


def read_debian_package(package: str, folder: Path) -> Iterator[str]:
    """Yield the paragraphs of a Debian package in `READERS`, downloaded (not installed) into `folder` with apt-get."""
    if package not in READERS:
        raise DataError(f"{package}: no reader for this Debian package. Known: {', '.join(READERS)}.")
    pattern, paragraphs = READERS[package]
    for _, data in read_package_files(package, folder, pattern):
        yield from paragraphs(data)


def read_package_files(package: str, folder: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of the files in a Debian package whose path matches `pattern`.

    The package is downloaded into `folder` with apt-get if it is not there. Raise MissingDependency without apt-get,
    DataError if the download fails.
    """
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
            f"{package}: downloading Debian packages needs apt-get; without it, put {package}_*.deb into {folder}."
        )
    done = subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, capture_output=True, text=True)
    found = sorted(folder.glob(f"{package}_*.deb"))
    if not found:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise DataError(f"{package}: apt-get download failed ({reason}). Run `apt-get update` and try again.")
    return found[-1]
