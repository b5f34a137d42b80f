"""Extract human recordings in other languages from Debian packages, with transcripts respelt in Polish letters.

Each package has a reader for its transcripts. Manifest lines also hold the language and the original text. Recordings
whose text cannot be read letter by letter (digits, beeps, stage directions) are skipped and counted.
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
from mowa.io.atomic import atomic_write, replace_atomically
from projects.pl_tiny.respell import STRESS, respell
from projects.pl_tiny.synth import RATE_HZ
from projects.pl_tiny.text import read_package_files

Samples = audio.Samples

_G722_BYTES_S = 8_000  # 64 kbit/s
_MAX_CHARS_PER_S = 21.0  # above this, the transcript is longer than what the recording can contain
_CYRILLIC = re.compile("[\u0400-\u04ff]")
_READABLE = re.compile(r"[^\W\d_](?:[^\W\d_]|[\s.,:;?!…'’«»“”„\"+–—-])*")


@dataclass(frozen=True, slots=True)
class Recording:
    """A recording in a package. `id` is unique in its source; `text` is the original transcript."""

    id: str
    audio: Path
    text: str
    language: str
    voice: str


@dataclass(frozen=True, slots=True)
class RecordingSource:
    """Debian packages read together, their licence, and which recordings to use.

    `files`: pattern of the paths to unpack. `training`: false for recordings used for evaluation only. `duration_s`:
    shortest and longest. `min_words`: fewest words.
    """

    packages: tuple[str, ...]
    files: str
    read: Callable[[Path], Iterator[Recording]]
    licence: str
    training: bool = True
    duration_s: tuple[float, float] = (0.4, 20.0)
    min_words: int = 1


@dataclass(frozen=True, slots=True)
class ExtractionReport:
    """Recordings and hours written for a source, and the number skipped by reason."""

    clips: int
    hours: float
    skipped: dict[str, int]


# --- readers: unpacked packages → Recordings --------------------------------------------------------------------------


def _festvox_russian(root: Path) -> Iterator[Recording]:
    """Read festival's utterance list: lines `( id "text" )`, with `+` before stressed vowels and commas at pauses."""
    voice = root / "usr/share/festival/voices/russian/msu_ru_nsh_clunits"
    for name, text in re.findall(r'^\(\s*(\S+)\s+"(.*)"\s*\)', _read(voice / "etc/txt.done.data"), re.M):
        yield Recording(name, voice / "wav" / f"{name}.wav", text, "ru", "msu_ru_nsh")


def _asterisk(folder: str, short: str, language: str) -> Callable[[Path], Iterator[Recording]]:
    """Return a reader of Asterisk's prompt lists: lines `name: text`, comments after `;`."""

    def read(root: Path) -> Iterator[Recording]:
        listed = root / f"usr/share/doc/asterisk-core-sounds-{short}/core-sounds-{short}.txt.gz"
        if not listed.is_file():
            raise DataError(f"{listed}: transcript not found in the package")
        seen = set()
        for line in gzip.decompress(listed.read_bytes()).decode("utf-8-sig").splitlines():
            name, colon, text = line.partition(":")
            if not colon or line.startswith(";") or name in seen:
                continue
            seen.add(name)
            if short == "es":
                text = _TILDE.sub("ñ", text)
            path = root / "usr/share/asterisk/sounds" / folder / f"{name.strip()}.g722"
            yield Recording(name.strip(), path, text.strip(), language, folder)

    return read


_TILDE = re.compile(r"(?<=contrase)ni?(?=as?\b)|(?<=\bma)n(?=ana\b)", re.I)  # the Spanish list has no accents
_LINE = re.compile(r'dialogId\("([^"]+)",\s*"([^"]*)"[^\n]*\)\s*\n\s*dialogStr\("((?:[^"\\]|\\.)*)"\)')


def _fillets_czech(root: Path) -> Iterator[Recording]:
    """Read Fish Fillets' dialogues: id, speaker and text in Lua; the recording is named after the id."""
    game = root / "usr/share/games/fillets-ng"
    scripts = sorted(game.glob("script/*/*dialogs_cs.lua"))
    if not scripts:
        raise DataError(f"{game}/script: Czech dialogues not found in the package")
    for script in scripts:
        level = script.parent.name
        for name, speaker, text in _LINE.findall(_read(script)):
            path = game / "sound" / level / "cs" / f"{name}.ogg"
            yield Recording(f"{level}/{name}", path, text.replace('\\"', '"'), "cs", speaker.removeprefix("font_"))


def _read(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{path}: transcript not found in the package")
    return path.read_text(encoding="utf-8")


def _prompts(short: str, folder: str, language: str, licence: str) -> RecordingSource:
    package = f"asterisk-core-sounds-{short}"
    return RecordingSource(
        packages=(package, f"{package}-g722"),
        files=r"\.g722$|/core-sounds-\w+\.txt\.gz$",
        read=_asterisk(folder, short, language),
        licence=licence,
    )


SOURCES: dict[str, RecordingSource] = {
    "festvox-ru": RecordingSource(
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
    "fillets-cs": RecordingSource(
        packages=("fillets-ng-data", "fillets-ng-data-cs"),
        files=r"dialogs_cs\.lua$|/sound/[^/]+/cs/.*\.ogg$",
        read=_fillets_czech,
        licence="GPL-2",
        training=False,
        duration_s=(2.0, 12.0),
        min_words=3,
    ),
}


# --- Recordings → manifests -------------------------------------------------------------------------------------------


def build_corpus(folder: Path, sources: Sequence[str], downloads: Path) -> dict[str, ExtractionReport]:
    """Write manifests `folder/{source}.jsonl` and 16 kHz wav files under `folder/audio`; keep packages in `downloads`.

    A source whose manifest exists is not extracted again, and its report lists nothing as skipped. Raise DataError for
    an unknown source or a package without its transcript, AudioError for a recording that cannot be decoded.
    """
    unknown = [name for name in sources if name not in SOURCES]
    if unknown:
        raise DataError(f"{unknown[0]}: no such source of recordings. Known: {', '.join(SOURCES)}.")
    reports = {}
    for name in sources:
        manifest = folder / f"{name}.jsonl"
        if manifest.exists():
            durations = [json.loads(line)["duration_s"] for line in manifest.read_text().splitlines()]
            reports[name] = ExtractionReport(len(durations), sum(durations) / 3600, {})
            continue
        with tempfile.TemporaryDirectory() as root:
            source = SOURCES[name]
            for package in source.packages:
                for path, content in read_package_files(package, downloads, source.files):
                    unpacked = Path(root) / path
                    unpacked.parent.mkdir(parents=True, exist_ok=True)
                    unpacked.write_bytes(content)
            reports[name] = write_source(source, Path(root), manifest)
    return reports


def write_source(source: RecordingSource, root: Path, manifest: Path) -> ExtractionReport:
    """Write the recordings of the packages unpacked under `root`, then `manifest` beside them.

    Raise DataError if no recording is usable.
    """
    skipped: Counter[str] = Counter()
    rows = []
    for recording in tqdm(list(source.read(root)), unit="clip", desc=manifest.stem, disable=None):
        row = _write_recording(recording, source, manifest)
        if isinstance(row, str):
            skipped[row] += 1
        else:
            rows.append(row)
    if not rows:
        raise DataError(f"{manifest.stem}: no usable recording in {root} ({dict(skipped)})")
    manifest.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(manifest, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return ExtractionReport(len(rows), sum(row["duration_s"] for row in rows) / 3600, dict(skipped))


def _write_recording(recording: Recording, source: RecordingSource, manifest: Path) -> dict[str, Any] | str:
    """Write the audio and return its manifest line, or the reason why it is skipped."""
    if not _READABLE.fullmatch(recording.text.strip(" .…\"“«'-–")):
        return "text not readable letter by letter" if recording.text else "no text"
    if recording.language != "ru" and _CYRILLIC.search(recording.text):
        return "text not readable letter by letter"
    if not recording.audio.is_file():
        return "no recording"
    text = respell(recording.text, recording.language)
    if len(text.split()) < source.min_words:
        return "too few words"
    target = manifest.parent / "audio" / manifest.stem / f"{recording.id}.wav"
    if not target.exists():  # else an interrupted run has written it
        samples = _decode(recording.audio)
        shortest, longest = source.duration_s
        if not shortest <= len(samples) / RATE_HZ <= longest:
            return "too short or too long"
        if len(text) > _MAX_CHARS_PER_S * len(samples) / RATE_HZ:
            return "text too long for its recording"
        target.parent.mkdir(parents=True, exist_ok=True)
        with replace_atomically(target) as unfinished:
            soundfile.write(unfinished, samples, RATE_HZ, subtype="PCM_16", format="WAV")
    return {
        "id": f"{manifest.stem}/{recording.id}",
        "audio": str(target.relative_to(manifest.parent)),
        "text": text,
        "duration_s": round(soundfile.info(target).duration, 3),
        "voice": recording.voice,
        "language": recording.language,
        "written": recording.text.replace(STRESS, ""),
    }


def _decode(path: Path) -> Samples:
    """Decode a recording at 16 kHz. Raw G.722 has no header, so it is recognized by its suffix."""
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
