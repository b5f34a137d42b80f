"""Human recordings in neighbouring languages, out of Debian packages, as clips with Polish-letter transcripts.

This room knows where seven packages keep their recordings and what is said in them; how it is respelt `respell` knows.
It refuses to know what learns from the clips. A manifest is what `synth.read_manifest` reads, each line with the
language and the text as it was written besides. What cannot be said in letters (digits, beeps, stage directions) is
left out and counted, never guessed.
"""

from __future__ import annotations

import gzip
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from tqdm import tqdm

from mowa.data import audio
from mowa.errors import AudioError, DataError
from mowa.io.atomic import atomic_write
from projects.pl_tiny.respell import STRESS, respell
from projects.pl_tiny.synth import RATE_HZ
from projects.pl_tiny.text import members

Samples = audio.Samples

_G722_BYTES_S = 8_000  # 64 kbit/s
_FASTEST = 21.0  # letters a second: beyond it the transcript says more than the recording
_CYRILLIC = re.compile("[\u0400-\u04ff]")
_READABLE = re.compile(r"[^\W\d_](?:[^\W\d_]|[\s.,:;?!…'’«»“”„\"+–—-])*")


@dataclass(frozen=True, slots=True)
class Clip:
    """One recording as the package has it. `id` is unique in its source; `text` is as written there."""

    id: str
    audio: Path
    text: str
    language: str
    voice: str


@dataclass(frozen=True, slots=True)
class Source:
    """Debian packages read together, the licence of what they hold, and which clips are of use."""

    packages: tuple[str, ...]
    files: str
    read: Callable[[Path], Iterator[Clip]]
    licence: str
    training: bool = True
    length_s: tuple[float, float] = (0.4, 20.0)
    words: int = 1


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of a source: clips and hours written, clips left out by reason."""

    clips: int
    hours: float
    skipped: dict[str, int]


# --- readers: the unpacked packages → Clips ---------------------------------------------------------------------------


def _festvox_russian(root: Path) -> Iterator[Clip]:
    """festival's utterance list, `( id "text" )` a line; `+` stands before a stressed vowel, commas at every pause."""
    voice = root / "usr/share/festival/voices/russian/msu_ru_nsh_clunits"
    for name, text in re.findall(r'^\(\s*(\S+)\s+"(.*)"\s*\)', _read(voice / "etc/txt.done.data"), re.M):
        yield Clip(name, voice / "wav" / f"{name}.wav", text, "ru", "msu_ru_nsh")


def _asterisk(folder: str, short: str, language: str) -> Callable[[Path], Iterator[Clip]]:
    """Asterisk's prompts, `name: text` a line; `;` begins a comment."""

    def read(root: Path) -> Iterator[Clip]:
        listed = root / f"usr/share/doc/asterisk-core-sounds-{short}/core-sounds-{short}.txt.gz"
        if not listed.is_file():
            raise DataError(f"{listed}: no such transcript in the package")
        seen = set()
        for line in gzip.decompress(listed.read_bytes()).decode("utf-8-sig").splitlines():
            name, colon, text = line.partition(":")
            if not colon or line.startswith(";") or name in seen:
                continue
            seen.add(name)
            if short == "es":
                text = _TILDE.sub("ñ", text)
            path = root / "usr/share/asterisk/sounds" / folder / f"{name.strip()}.g722"
            yield Clip(name.strip(), path, text.strip(), language, folder)

    return read


_TILDE = re.compile(r"(?<=contrase)ni?(?=as?\b)|(?<=\bma)n(?=ana\b)", re.I)  # the Spanish list has no accents
_LINE = re.compile(r'dialogId\("([^"]+)",\s*"([^"]*)"[^\n]*\)\s*\n\s*dialogStr\("((?:[^"\\]|\\.)*)"\)')


def _fillets_czech(root: Path) -> Iterator[Clip]:
    """Fish Fillets' dialogues: id and speaker, then the text, in Lua; the recording bears the id."""
    game = root / "usr/share/games/fillets-ng"
    scripts = sorted(game.glob("script/*/*dialogs_cs.lua"))
    if not scripts:
        raise DataError(f"{game}/script: no Czech dialogues in the package")
    for script in scripts:
        level = script.parent.name
        for name, speaker, text in _LINE.findall(_read(script)):
            path = game / "sound" / level / "cs" / f"{name}.ogg"
            yield Clip(f"{level}/{name}", path, text.replace('\\"', '"'), "cs", speaker.removeprefix("font_"))


def _read(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{path}: no such transcript in the package")
    return path.read_text(encoding="utf-8")


def _prompts(short: str, folder: str, language: str, licence: str) -> Source:
    package = f"asterisk-core-sounds-{short}"
    return Source(
        packages=(package, f"{package}-g722"),
        files=r"\.g722$|/core-sounds-\w+\.txt\.gz$",
        read=_asterisk(folder, short, language),
        licence=licence,
    )


SOURCES: dict[str, Source] = {
    "festvox-ru": Source(
        packages=("festvox-ru",),
        files=r"/msu_ru_nsh_clunits/(wav/.*\.wav|etc/txt\.done\.data)$",
        read=_festvox_russian,
        licence="BSD-like, © 2005 Nickolay V. Shmyrev",
    ),
    "asterisk-ru": _prompts("ru", "ru_RU_f_IvrvoiceRU", "ru", "CC-BY-3.0, © 2010 Maxim Topal"),
    "asterisk-it": _prompts("it", "it_IT_m_Carlo", "it", "CC-BY-3.0, © 2012 Carlo Flora"),
    "asterisk-es": _prompts("es", "es_MX_f_Allison", "es-419", "CC-BY-SA-3.0, © 2003-2010 Allison Smith"),
    "asterisk-en": _prompts("en", "en_US_f_Allison", "en-us", "CC-BY-SA-3.0, © 2003-2010 Allison Smith"),
    "asterisk-fr": _prompts("fr", "fr_CA_f_June", "fr", "CC-BY-SA-3.0, © 2006-2008 June Wallack"),
    "fillets-cs": Source(
        packages=("fillets-ng-data", "fillets-ng-data-cs"),
        files=r"dialogs_cs\.lua$|/sound/[^/]+/cs/.*\.ogg$",
        read=_fillets_czech,
        licence="GPL-2",
        training=False,  # to examine with, never to learn from
        length_s=(2.0, 12.0),
        words=3,
    ),
}


# --- Clips → a corpus ------------------------------------------------------------------------------------------------


def corpus(folder: Path, sources: Sequence[str], downloads: Path) -> dict[str, Tally]:
    """Manifests `folder/{source}.jsonl` and 16 kHz wav files under `folder/audio`, packages kept in `downloads`.

    A source whose manifest exists is left as it is (its skipped clips are no longer known). Raises DataError for an
    unknown source and a package without its transcript, AudioError for a recording that cannot be decoded.
    """
    unknown = [name for name in sources if name not in SOURCES]
    if unknown:
        raise DataError(f"{unknown[0]}: no such source of recordings; known: {', '.join(SOURCES)}")
    tallies = {}
    for name in sources:
        manifest = folder / f"{name}.jsonl"
        if manifest.exists():
            lengths = [json.loads(line)["duration_s"] for line in manifest.read_text().splitlines()]
            tallies[name] = Tally(len(lengths), sum(lengths) / 3600, {})
            continue
        with tempfile.TemporaryDirectory() as root:
            source = SOURCES[name]
            for package in source.packages:
                for path, content in members(package, downloads, source.files):
                    unpacked = Path(root) / path
                    unpacked.parent.mkdir(parents=True, exist_ok=True)
                    unpacked.write_bytes(content)
            tallies[name] = write(source, Path(root), manifest)
    return tallies


def write(source: Source, root: Path, manifest: Path) -> Tally:
    """The clips of the packages unpacked under `root` beside `manifest`, which is written last."""
    skipped: Counter[str] = Counter()
    rows = []
    for clip in tqdm(list(source.read(root)), unit="clip", desc=manifest.stem, disable=None):
        row = _row(clip, source, manifest)
        if isinstance(row, str):
            skipped[row] += 1
        else:
            rows.append(row)
    if not rows:
        raise DataError(f"{manifest.stem}: no clip of use in {root} ({dict(skipped)})")
    manifest.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(manifest, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return Tally(len(rows), sum(row["duration_s"] for row in rows) / 3600, dict(skipped))


def _row(clip: Clip, source: Source, manifest: Path) -> dict[str, Any] | str:
    """A manifest line, its audio written; or why there is none."""
    if not _READABLE.fullmatch(clip.text.strip(" .…\"“«'-–")):
        return "text not readable letter by letter" if clip.text else "no text"
    if clip.language != "ru" and _CYRILLIC.search(clip.text):
        return "text not readable letter by letter"
    if not clip.audio.is_file():
        return "no recording"
    text = respell(clip.text, clip.language)
    if len(text.split()) < source.words:
        return "too few words"
    target = manifest.parent / "audio" / manifest.stem / f"{clip.id}.wav"
    if not target.exists():  # else a run that was broken off has written it
        samples = _decode(clip.audio)
        shortest, longest = source.length_s
        if not shortest <= len(samples) / RATE_HZ <= longest:
            return "too short or too long"
        if len(text) > _FASTEST * len(samples) / RATE_HZ:
            return "text too long for its recording"
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")
        soundfile.write(part, samples, RATE_HZ, subtype="PCM_16", format="WAV")
        part.replace(target)
    return {
        "id": f"{manifest.stem}/{clip.id}",
        "audio": str(target.relative_to(manifest.parent)),
        "text": text,
        "duration_s": round(soundfile.info(target).duration, 3),
        "voice": clip.voice,
        "language": clip.language,
        "written": clip.text.replace(STRESS, ""),
    }


def _decode(path: Path) -> Samples:
    """Any recording at 16 kHz; bare G.722, which has no header that `audio` could know it by, by its name."""
    if path.suffix != ".g722":
        return audio.load_audio(path, RATE_HZ)
    import av

    try:
        with av.open(str(path), format="g722") as container:
            blocks = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    except av.FFmpegError as error:
        raise AudioError(
            f"{path}: cannot be decoded as G.722 ({error.strerror}). Download the package again."
        ) from None
    samples = np.concatenate([np.zeros(0, np.float32), *blocks]).astype(np.float32) / np.float32(32768)
    stated_s, have_s = path.stat().st_size / _G722_BYTES_S, len(samples) / RATE_HZ
    if not len(samples) or abs(have_s - stated_s) > 0.1:
        raise AudioError(f"{path}: {stated_s:.1f} s of G.722, {have_s:.1f} s decoded. Download the package again.")
    return samples
