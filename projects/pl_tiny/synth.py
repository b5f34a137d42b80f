"""Written sentences → spoken recordings, by espeak-ng in many voices, speeds and pitches.

This room knows a synthesiser (libespeak-ng through ctypes, one engine a process); it refuses to know what learns from
the sound. A manifest is JSON lines: id, audio (a path relative to the manifest), text, duration_s, voice, rate, pitch.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import json
import multiprocessing
from collections.abc import Iterator, Sequence
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
from mowa.types import Example
from projects.pl_tiny.text import split

RATE_HZ = 16_000
_INSTALL = "espeak-ng is not installed: `apt-get install espeak-ng` (Debian, Ubuntu) brings it."
_SYNCHRONOUS, _RATE, _PITCH, _RANGE, _UTF8, _IPA = 2, 1, 3, 4, 1, 2
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True, slots=True)
class Utterance:
    """One thing to say: `rate` in words a minute, `pitch` and `pitch_range` in espeak's 0..100."""

    id: str
    text: str
    voice: str
    rate: int
    pitch: int
    pitch_range: int


class Speaker:
    """One espeak-ng engine. The library keeps global state, so a process holds at most one."""

    def __init__(self) -> None:
        name = ctypes.util.find_library("espeak-ng") or "libespeak-ng.so.1"
        try:
            self._lib = ctypes.CDLL(name)
        except OSError:
            raise MissingDependency(_INSTALL) from None
        self.rate_hz = self._lib.espeak_Initialize(_SYNCHRONOUS, 0, None, 0)
        if self.rate_hz <= 0:
            raise MissingDependency(_INSTALL)
        self._blocks: list[np.ndarray] = []
        self._collect = _CALLBACK(self._on_samples)  # kept, or ctypes frees it
        self._lib.espeak_SetSynthCallback(self._collect)

    def _on_samples(self, samples: Any, count: int, _events: Any) -> int:
        if samples and count > 0:
            self._blocks.append(np.ctypeslib.as_array(samples, shape=(count,)).astype(np.float32) / 32768)
        return 0

    def say(self, utterance: Utterance) -> np.ndarray:
        """→ float32 [n] at 16 kHz, leading and trailing silence trimmed to a tenth of a second."""
        known = utterance.voice in voices(utterance.voice.partition("+")[0])  # espeak-ng ignores unknown variants
        if not known or self._lib.espeak_SetVoiceByName(utterance.voice.encode()) != 0:
            raise DataError(f"espeak-ng has no voice {utterance.voice!r}; `espeak-ng --voices=variant` lists them.")
        for parameter, value in ((_RATE, utterance.rate), (_PITCH, utterance.pitch), (_RANGE, utterance.pitch_range)):
            self._lib.espeak_SetParameter(parameter, value, 0)
        self._blocks = []
        spoken = utterance.text.encode() + b"\0"
        self._lib.espeak_Synth(spoken, len(spoken), 0, 0, 0, _UTF8, None, None)
        self._lib.espeak_Synchronize()
        if not self._blocks:
            return np.zeros(0, np.float32)
        return trim(soxr.resample(np.concatenate(self._blocks), self.rate_hz, RATE_HZ))

    def phonemes(self, text: str, voice: str, *, separator: str) -> list[str]:
        """How a voice reads the text: IPA, `separator` between sounds, a space between words, a string a clause."""
        if self._lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise DataError(f"espeak-ng has no voice {voice!r}; `espeak-ng --voices` lists them.")
        self._lib.espeak_TextToPhonemes.restype = ctypes.c_char_p
        buffer = ctypes.create_string_buffer(text.encode())
        rest = ctypes.c_void_p(ctypes.addressof(buffer))
        clauses = []
        while rest.value:  # one clause a call
            said = self._lib.espeak_TextToPhonemes(ctypes.byref(rest), _UTF8, _IPA | ord(separator) << 8)
            clauses.append((said or b"").decode())
        return clauses


def trim(samples: np.ndarray, keep_s: float = 0.1) -> np.ndarray:
    """Leading and trailing silence cut down to `keep_s`; nothing is left of silence alone."""
    loud = np.flatnonzero(np.abs(samples) > 0.01)
    if not len(loud):
        return samples[:0]
    keep = int(keep_s * RATE_HZ)
    return samples[max(0, loud[0] - keep) : loud[-1] + keep]


@cache
def voices(language: str = "pl") -> tuple[str, ...]:
    """Every variant of the language's voice that espeak-ng has, sorted: `pl+adam`, `pl+aunty`, …"""
    lib_data = [
        *Path("/usr/lib").glob("*/espeak-ng-data/voices/!v"),
        *Path("/usr/share").glob("espeak-ng-data/voices/!v"),
    ]
    if not lib_data:
        raise MissingDependency(_INSTALL)
    return tuple(sorted(f"{language}+{path.name}" for path in lib_data[0].iterdir() if path.is_file()))


def plan(
    lines: Sequence[str],
    voices: Sequence[str],
    *,
    count: int,
    seed: int,
    prefix: str,
    rates: tuple[int, int] = (120, 220),
) -> list[Utterance]:
    """`count` utterances: the lines in a shuffled order, again and again, each time in another voice, speed, pitch."""
    if not lines:
        raise DataError(f"too few sentences to plan {prefix}: two in a hundred are held out, and some of them dropped")
    rng = np.random.default_rng(seed)
    chosen: list[Utterance] = []
    while len(chosen) < count:
        for index in rng.permutation(len(lines))[: count - len(chosen)]:
            chosen.append(
                Utterance(
                    id=f"{prefix}-{len(chosen):06d}",
                    text=lines[index],
                    voice=str(rng.choice(voices)),
                    rate=int(rng.integers(*rates)),
                    pitch=int(rng.integers(20, 80)),
                    pitch_range=int(rng.integers(20, 80)),
                )
            )
    return chosen


@cache
def speaker() -> Speaker:
    return Speaker()


def _record(job: tuple[Utterance, Path]) -> dict[str, Any] | None:
    utterance, folder = job
    digest = hashlib.sha256(repr(utterance).encode()).hexdigest()[:8]
    audio = Path("audio") / utterance.id[:-3] / f"{utterance.id}-{digest}.wav"
    path = folder / audio
    if not path.exists():  # else a run that was broken off has spoken it already
        samples = speaker().say(utterance)
        if len(samples) < RATE_HZ // 4:
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path.with_suffix(".part"), samples, RATE_HZ, subtype="PCM_16", format="WAV")
        path.with_suffix(".part").replace(path)
    row = asdict(utterance) | {"audio": str(audio), "duration_s": round(soundfile.info(path).duration, 3)}
    return row | {"text": normalize_text(utterance.text), "written": utterance.text}


def record(utterances: Sequence[Utterance], manifest: Path, *, processes: int = 2) -> float:
    """Speak all of them beside `manifest` and write it last, when every file is there. → hours recorded.

    Broken off and called again, it speaks only what is missing: a file's name tells all that was asked of it.
    """
    folder = manifest.parent
    folder.mkdir(parents=True, exist_ok=True)
    seconds = 0.0
    partial = manifest.with_suffix(".partial")
    jobs = ((utterance, folder) for utterance in utterances)
    with (
        multiprocessing.get_context("spawn").Pool(processes) as pool,
        partial.open("w") as out,
        tqdm(total=len(utterances), unit="clip", desc=manifest.stem, disable=None) as bar,
    ):
        for row in pool.imap(_record, jobs, chunksize=64):
            bar.update()
            if row is not None:
                seconds += row["duration_s"]
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
    partial.replace(manifest)
    return seconds / 3600


def corpus(lines: Sequence[str], folder: Path, *, clips: int, seed: int = 0, processes: int = 2) -> dict[str, float]:
    """A training corpus and its examinations in `folder`, with the sentences of both as text. → hours per manifest.

    train     training sentences, ninety-odd voices
    dev       up to 100 held-out sentences, the same voices (watched during training)
    seen      up to 300 other held-out sentences, the same voices
    unseen    the same sentences as seen, ten voices that train has never heard
    """
    training, held_out = split(lines)
    watched = min(100, len(held_out) // 4)
    dev, examined = held_out[:watched], held_out[watched:400]
    everyone = voices()
    strangers = everyone[:: len(everyone) // 10][:10]
    known = [voice for voice in everyone if voice not in strangers]
    folder.mkdir(parents=True, exist_ok=True)
    for name, sentences in (("sentences", training), ("held-out", held_out)):
        (folder / f"{name}.txt").write_text("\n".join(sentences) + "\n")
    plans = {
        "dev": plan(dev, known, count=100, seed=seed + 1, prefix="dev"),
        "seen": plan(examined, known, count=300, seed=seed + 2, prefix="seen"),
        "unseen": plan(examined, strangers, count=300, seed=seed + 3, prefix="unseen"),
        "train": plan(training, known, count=clips, seed=seed, prefix="train"),
    }
    return {
        name: record(utterances, folder / f"{name}.jsonl", processes=processes) for name, utterances in plans.items()
    }


def read_manifest(path: Path) -> Iterator[Example]:
    """The rows of a manifest of ours as Examples, audio paths made absolute."""
    if not path.is_file():
        raise DataError(f"{path}: no such manifest")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            audio = str(path.parent / row["audio"])
            yield Example(str(row["id"]), audio, row["text"], float(row["duration_s"]), {"voice": row.get("voice")})
        except (json.JSONDecodeError, KeyError, TypeError) as wrong:
            raise DataError(
                f"{path}:{number}: not a manifest line ({wrong!r}); needs id, audio, text, duration_s"
            ) from None
