"""Synthesize Polish sentences with Czech and Russian festival voices, which are built from human recordings.

`transliterate` spells the sentences in the voice's language; the Scheme code here makes festival read that spelling
letter by letter.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from mowa.data.text.normalize import normalize_text
from mowa.errors import DataError, MissingDependency
from mowa.io.atomic import replace_atomically
from projects.pl_tiny.synth import RATE_HZ, trim
from projects.pl_tiny.transliterate import CZECH_LETTERS, to_czech, to_russian

_VOICES = Path("/usr/share/festival/voices")
_CHUNK = 50  # sentences per festival process: a crash loses no more than these
_CHUNK_LIMIT_S = 600


@dataclass(frozen=True, slots=True)
class Voice:
    """A festival voice: Debian package, language, mean and standard deviation of pitch (0: pitch cannot be set)."""

    package: str
    language: str
    f0_hz: int = 0
    spread_hz: int = 0


VOICES = {
    "czech_dita": Voice("festvox-czech-dita", "czech", 222, 15),
    "czech_machac": Voice("festvox-czech-machac", "czech", 75, 6),
    "czech_ph": Voice("festvox-czech-ph", "czech", 136, 8),
    "czech_krb": Voice("festvox-czech-krb", "czech", 258, 16),
    "msu_ru_nsh_clunits": Voice("festvox-ru", "russian"),
}


@dataclass(frozen=True, slots=True)
class Utterance:
    """A sentence and how to speak it. `rate` and `pitch` are factors of the voice's own; the Russian voice needs 1.

    Audio files are named after a hash of its repr: with other fields, old corpora would be synthesized again.
    """

    id: str
    text: str
    voice: str
    rate: float
    pitch: float


def _scheme_rules(name: str, rules: Sequence[str], sets: str = "") -> str:
    return f"(lts.ruleset {name} ({sets}) (\n" + "\n".join(rules) + "))\n"


def _czech_scheme() -> str:
    """Return letter-to-sound rules for Czech. festival-czech's own rules would read `uy` as uj and `com` as kom."""
    special = {"č": "c~", "š": "s~", "ž": "z~", "ň": "n~", "í": "i:", "y": "i"}
    # The voices lack the diphones i-u, u-i, n-f and silence-í: use a glottal stop, m and a short i instead.
    lacking = ["( I [ u ] = _ u )", "( u [ í ] = _ i: )", "( u [ y ] = _ i )", "( # [ í ] = i )", "( [ n ] f = m )"]
    pairs = [*lacking, "( [ c h ] = ch )", "( [ d ž ] = dz~ )", "( [ d z ] = dz )"]
    singles = [f"( [ {letter} ] = {special.get(letter, letter)} )" for letter in sorted(CZECH_LETTERS - {"h"})]
    return (
        _scheme_rules("mowa_czech", pairs + singles, "(I i í y)")
        + """
(define (czech-basic-lts word) (lts.apply word 'mowa_czech))
(lex.create "mowa_czech")
(lex.set.phoneset "czech")
(lex.set.lts.method 'czech-lts)
(define (mowa-prepare) (lex.select "mowa_czech") (set! token_to_words (lambda (token name) (list name))))
(define (mowa-vary stretch f0 spread)
  (Parameter.set 'Duration_Stretch stretch)
  (set! int_general_params
        (list (list 'targ_func czech-int-targets) (list 'f0_mean f0) (list 'f0_std spread))))
"""
    )


def _russian_scheme() -> str:
    """Return letter-to-sound rules for Russian. The voice's own read `его` as ево, drop consonants, reduce vowels."""
    vowels = {"а": "a", "э": "e", "и": "i", "о": "o", "у": "u", "ы": "y", "я": "a", "е": "e", "ё": "o", "ю": "u"}
    paired = dict(zip("бвгдзклмнпрстфх", "b v g d z k l m n p r s t f h".split(), strict=True))
    single = {"ж": "zh", "ц": "c", "ч": "ch", "ш": "sh", "щ": "sch", "й": "j", "ў": "ur", "ь": ""}
    rules = []
    for letter, vowel in vowels.items():
        rules += [f'( [ "+" {letter} ] = {vowel * 2} )', f"( [ {letter} ] = {vowel} )"]
    for letter, consonant in paired.items():
        rules += [f"( [ {letter} ] SOFT = {consonant * 2} )", f'( [ {letter} ] "+" SOFT = {consonant * 2} )']
        rules.append(f"( [ {letter} ] = {consonant} )")
    rules += [f"( [ {letter} ] = {sound} )" for letter, sound in single.items()]
    # Make every vowel full before the voice's own voicing rules run; they reduce only short ones. Whisper base has a
    # CER of 23 % on the result, and of 27 % with unstressed vowels made short again (14 clips each).
    return (
        _scheme_rules("mowa_russian", rules, "(SOFT я ё ю и ь е)")
        + """
(define (mowa-lts word features)
  (let ((phones (lts.apply (utf8explode word) 'mowa_russian)) (syls nil) (stress 0))
    (set! syls (russian_syllabify phones nil))
    (set! stress (stressed_offset phones 0))
    (if (and (> stress 0) (>= (length syls) stress)) (set-car! (cdr (nth (- stress 1) syls)) 1))
    (list word features syls)))
(lex.create "mowa_russian")
(lex.set.phoneset "msu_ru")
(lex.set.lts.method 'mowa-lts)
(define (mowa-full utt)
  (mapcar
   (lambda (s)
     (let ((full (assoc_string (item.name s) '(("a" "aa") ("e" "ee") ("i" "ii") ("o" "oo") ("u" "uu") ("y" "yy")))))
       (if full (item.set_name s (cadr full)))))
   (utt.relation.items utt 'Segment))
  utt)
(define (mowa-voicing utt) (msu_ru::postlex_reduce_vowel utt) utt)
(define (mowa-prepare)
  (lex.select "mowa_russian")
  (set! token_to_words (lambda (token name) (list name)))
  (set! postlex_rules_hooks (list mowa-full mowa-voicing)))
(define (mowa-vary stretch f0 spread) t)
"""
    )


# language → (transliteration, Scheme prologue, file encoding)
_LANGUAGES: dict[str, tuple[Callable[[str], str], Callable[[], str], str]] = {
    "czech": (to_czech, _czech_scheme, "iso-8859-2"),
    "russian": (to_russian, _russian_scheme, "utf-8"),
}


@cache
def _prologue(language: str) -> str:
    return _LANGUAGES[language][1]()


def festival_text(utterance: Utterance) -> str:
    """Return the utterance's text in the spelling that festival is given."""
    return _LANGUAGES[VOICES[utterance.voice].language][0](utterance.text)


def _synthesize(utterances: Sequence[Utterance]) -> Iterator[np.ndarray]:
    """Yield float32 [N] at 16 kHz per utterance of one voice, from one festival process; empty where it failed."""
    name = utterances[0].voice
    voice = VOICES[name]
    encoding = _LANGUAGES[voice.language][2]
    with tempfile.TemporaryDirectory() as folder:
        script = [f"(voice_{name})", _prologue(voice.language), "(mowa-prepare)"]
        for number, utterance in enumerate(utterances):
            f0 = voice.f0_hz * utterance.pitch
            script.append(
                f"(mowa-vary {1 / utterance.rate:.3f} {f0:.1f} {voice.spread_hz})\n"
                f'(unwind-protect (utt.save.wave (utt.synth (Utterance Text "{festival_text(utterance)}")) '
                f'"{folder}/{number}.wav" \'riff) nil)'
            )
        path = Path(folder) / "speak.scm"
        path.write_text("\n".join(script) + "\n", encoding=encoding)
        with suppress(subprocess.TimeoutExpired):  # keep what it finished, the rest is empty
            subprocess.run(["festival", "-b", str(path)], capture_output=True, timeout=_CHUNK_LIMIT_S, check=False)
        for number in range(len(utterances)):
            wav = Path(folder) / f"{number}.wav"
            if not wav.exists() or wav.stat().st_size <= 44:
                yield np.zeros(0, np.float32)
                continue
            samples, rate_hz = soundfile.read(wav, dtype="float32")
            yield trim(soxr.resample(samples, rate_hz, RATE_HZ))


def _require_voices(voices: Sequence[str]) -> None:
    for name in voices:
        if name not in VOICES:
            raise DataError(f"unknown festival voice {name!r}. Known: {', '.join(VOICES)}.")
    packages = [VOICES[name].package for name in voices if not list(_VOICES.glob(f"*/{name}"))]
    if shutil.which("festival") is None:
        packages = ["festival", *(VOICES[name].package for name in voices)]
    if packages:
        names = " ".join(dict.fromkeys(packages))
        raise MissingDependency(f"festival or one of its voices is not installed. Run: apt-get install {names}")


def plan_utterances(lines: Sequence[str], voice: str, *, count: int, seed: int) -> list[Utterance]:
    """Plan `count` utterances of one voice: the lines in shuffled epochs, each with a random rate and pitch."""
    if not lines:
        raise DataError(f"{voice}: no sentences to synthesize")
    rng = np.random.default_rng([seed, zlib.crc32(voice.encode())])
    fixed = not VOICES[voice].f0_hz
    chosen: list[Utterance] = []
    while len(chosen) < count:
        for index in rng.permutation(len(lines))[: count - len(chosen)]:
            rate, pitch = (round(float(x), 3) for x in (1 / rng.uniform(0.8, 1.2), rng.uniform(0.85, 1.2)))
            number = f"{voice}-{len(chosen):06d}"
            chosen.append(Utterance(number, lines[index], voice, 1.0 if fixed else rate, 1.0 if fixed else pitch))
    return chosen


def _audio_path(utterance: Utterance) -> Path:
    inputs = (utterance, festival_text(utterance), VOICES[utterance.voice], _prologue(VOICES[utterance.voice].language))
    digest = hashlib.sha256(repr(inputs).encode()).hexdigest()[:8]
    return Path("audio") / utterance.voice / f"{utterance.id}-{digest}.wav"


def _write(path: Path, samples: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(path) as unfinished:
        soundfile.write(unfinished, samples, RATE_HZ, subtype="PCM_16", format="WAV")


def _row(utterance: Utterance, folder: Path) -> dict[str, Any] | None:
    path = folder / (audio := _audio_path(utterance))
    if not path.exists():
        return None
    row = asdict(utterance) | {"audio": str(audio), "duration_s": round(soundfile.info(path).duration, 3)}
    return row | {"text": normalize_text(utterance.text), "written": utterance.text}


def synthesize_manifest(utterances: Sequence[Utterance], manifest: Path) -> float:
    """Synthesize one voice's utterances beside `manifest`, write the manifest last, and return the hours of audio.

    Called again after an interruption, it synthesizes only what is missing: file names contain a hash of the inputs.
    """
    folder = manifest.parent
    folder.mkdir(parents=True, exist_ok=True)
    seconds = 0.0
    with (
        replace_atomically(manifest) as unfinished,
        unfinished.open("w") as out,
        tqdm(total=len(utterances), unit="clip", desc=manifest.stem, disable=None) as bar,
    ):
        for start in range(0, len(utterances), _CHUNK):
            chunk = utterances[start : start + _CHUNK]
            missing = [utterance for utterance in chunk if not (folder / _audio_path(utterance)).exists()]
            for utterance, samples in zip(missing, _synthesize(missing) if missing else (), strict=True):
                if len(samples) >= RATE_HZ // 4:
                    _write(folder / _audio_path(utterance), samples)
            for row in filter(None, (_row(utterance, folder) for utterance in chunk)):
                seconds += row["duration_s"]
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
            bar.update(len(chunk))
    return seconds / 3600


def build_corpus(lines: Sequence[str], folder: Path, *, clips: dict[str, int], seed: int = 0) -> dict[str, float]:
    """Write a manifest `{voice}.jsonl` with the given number of clips for each voice; return the hours per voice.

    Raise MissingDependency with the Debian packages to install if festival or a voice is missing.
    """
    _require_voices(list(clips))
    return {
        voice: synthesize_manifest(plan_utterances(lines, voice, count=count, seed=seed), folder / f"{voice}.jsonl")
        for voice, count in clips.items()
    }
