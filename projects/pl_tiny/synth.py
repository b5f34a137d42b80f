"""Synthesize sentences with espeak-ng in many voices, rates and pitches.

libespeak-ng is called through ctypes, with one engine per process. Manifests are JSON lines: id, audio (a path relative
to the manifest), text, duration_s, voice, rate, pitch.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import json
import multiprocessing
from collections.abc import Sequence
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
from projects.pl_tiny.text import split_held_out

RATE_HZ = 16_000
DEV_CLIPS, TEST_CLIPS = 100, 300
_INSTALL = "espeak-ng is not installed. On Debian or Ubuntu: apt-get install espeak-ng"
_SYNCHRONOUS, _RATE, _PITCH, _RANGE, _UTF8, _IPA = 2, 1, 3, 4, 1, 2
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True, slots=True)
class Utterance:
    """A sentence and how to speak it: `rate` in words per minute, `pitch` and `pitch_range` in espeak-ng's 0 to 100.

    Audio files are named after a hash of its repr: with other fields, old corpora would be synthesized again.
    """

    id: str
    text: str
    voice: str
    rate: int
    pitch: int
    pitch_range: int


class EspeakEngine:
    """An espeak-ng engine. The library has global state, so a process may hold only one: see `get_engine`."""

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
        self._collect = _CALLBACK(self._on_samples)  # keep a reference, or ctypes frees it
        self._lib.espeak_SetSynthCallback(self._collect)

    def _on_samples(self, samples: Any, count: int, _events: Any) -> int:
        if samples and count > 0:
            self._blocks.append(np.ctypeslib.as_array(samples, shape=(count,)).astype(np.float32) / 32768)
        return 0

    def synthesize(self, utterance: Utterance) -> np.ndarray:
        """Return float32 [N] at 16 kHz, leading and trailing silence trimmed to 0.1 s. DataError: no such voice."""
        known = utterance.voice in list_voices(utterance.voice.partition("+")[0])  # espeak-ng ignores unknown variants
        if not known or self._lib.espeak_SetVoiceByName(utterance.voice.encode()) != 0:
            raise DataError(f"espeak-ng has no voice {utterance.voice!r}. List them with `espeak-ng --voices=variant`.")
        for parameter, value in ((_RATE, utterance.rate), (_PITCH, utterance.pitch), (_RANGE, utterance.pitch_range)):
            self._lib.espeak_SetParameter(parameter, value, 0)
        self._blocks = []
        text = utterance.text.encode() + b"\0"
        self._lib.espeak_Synth(text, len(text), 0, 0, 0, _UTF8, None, None)
        self._lib.espeak_Synchronize()
        if not self._blocks:
            return np.zeros(0, np.float32)
        return trim(soxr.resample(np.concatenate(self._blocks), self.rate_hz, RATE_HZ))

    def phonemes(self, text: str, voice: str, *, separator: str) -> list[str]:
        """Return the pronunciation of the text in IPA, one string per clause.

        Sounds are separated by `separator`, words by spaces.
        """
        if self._lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise DataError(f"espeak-ng has no voice {voice!r}. List them with `espeak-ng --voices`.")
        self._lib.espeak_TextToPhonemes.restype = ctypes.c_char_p
        buffer = ctypes.create_string_buffer(text.encode())
        rest = ctypes.c_void_p(ctypes.addressof(buffer))
        clauses = []
        while rest.value:  # one clause per call
            clause = self._lib.espeak_TextToPhonemes(ctypes.byref(rest), _UTF8, _IPA | ord(separator) << 8)
            clauses.append((clause or b"").decode())
        return clauses


def trim(samples: np.ndarray, keep_s: float = 0.1) -> np.ndarray:
    """Cut leading and trailing silence down to `keep_s`. Silence alone becomes empty."""
    loud = np.flatnonzero(np.abs(samples) > 0.01)
    if not len(loud):
        return samples[:0]
    keep = int(keep_s * RATE_HZ)
    return samples[max(0, loud[0] - keep) : loud[-1] + keep]


@cache
def list_voices(language: str = "pl") -> tuple[str, ...]:
    """Return the installed variants of a language's voice, sorted: `pl+adam`, `pl+aunty`, …"""
    lib_data = [
        *Path("/usr/lib").glob("*/espeak-ng-data/voices/!v"),
        *Path("/usr/share").glob("espeak-ng-data/voices/!v"),
    ]
    if not lib_data:
        raise MissingDependency(_INSTALL)
    return tuple(sorted(f"{language}+{path.name}" for path in lib_data[0].iterdir() if path.is_file()))


def plan_utterances(
    lines: Sequence[str],
    voices: Sequence[str],
    *,
    count: int,
    seed: int,
    prefix: str,
    rates: tuple[int, int] = (120, 220),
) -> list[Utterance]:
    """Plan `count` utterances: the lines in shuffled epochs, each with a random voice, rate and pitch."""
    if not lines:
        raise DataError(f"{prefix}: too few sentences. About 2 % are held out and some of those dropped; add text.")
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
def get_engine() -> EspeakEngine:
    """Return the espeak-ng engine of this process."""
    return EspeakEngine()


def _synthesize_file(job: tuple[Utterance, Path]) -> dict[str, Any] | None:
    utterance, folder = job
    digest = hashlib.sha256(repr(utterance).encode()).hexdigest()[:8]
    audio = Path("audio") / utterance.id[:-3] / f"{utterance.id}-{digest}.wav"
    path = folder / audio
    if not path.exists():  # else an interrupted run has written it
        samples = get_engine().synthesize(utterance)
        if len(samples) < RATE_HZ // 4:
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_atomically(path) as unfinished:
            soundfile.write(unfinished, samples, RATE_HZ, subtype="PCM_16", format="WAV")
    row = asdict(utterance) | {"audio": str(audio), "duration_s": round(soundfile.info(path).duration, 3)}
    return row | {"text": normalize_text(utterance.text), "written": utterance.text}


def synthesize_manifest(utterances: Sequence[Utterance], manifest: Path, *, processes: int = 2) -> float:
    """Synthesize all utterances beside `manifest`, write the manifest last, and return the hours of audio.

    Called again after an interruption, it synthesizes only what is missing: file names contain a hash of the utterance.
    """
    folder = manifest.parent
    folder.mkdir(parents=True, exist_ok=True)
    seconds = 0.0
    jobs = ((utterance, folder) for utterance in utterances)
    with (
        multiprocessing.get_context("spawn").Pool(processes) as pool,
        replace_atomically(manifest) as unfinished,
        unfinished.open("w") as out,
        tqdm(total=len(utterances), unit="clip", desc=manifest.stem, disable=None) as bar,
    ):
        for row in pool.imap(_synthesize_file, jobs, chunksize=64):
            bar.update()
            if row is not None:
                seconds += row["duration_s"]
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
    return seconds / 3600


def build_corpus(
    lines: Sequence[str], folder: Path, *, clips: int, seed: int = 0, processes: int = 2
) -> dict[str, float]:
    """Synthesize a corpus into `folder`, with its sentences as text files; return the hours of each manifest.

    train     training sentences, about ninety voices
    dev       up to 100 held-out sentences, the same voices (evaluated during training)
    seen      up to 300 other held-out sentences, the same voices
    unseen    the same sentences as seen, in ten voices that train does not contain
    """
    training, held_out = split_held_out(lines)
    dev_count = min(DEV_CLIPS, len(held_out) // 4)
    dev, test = held_out[:dev_count], held_out[dev_count : DEV_CLIPS + TEST_CLIPS]
    voices = list_voices()
    unseen = voices[:: len(voices) // 10][:10]
    seen = [voice for voice in voices if voice not in unseen]
    folder.mkdir(parents=True, exist_ok=True)
    for name, sentences in (("sentences", training), ("held-out", held_out)):
        (folder / f"{name}.txt").write_text("\n".join(sentences) + "\n")
    plans = {
        "dev": plan_utterances(dev, seen, count=DEV_CLIPS, seed=seed + 1, prefix="dev"),
        "seen": plan_utterances(test, seen, count=TEST_CLIPS, seed=seed + 2, prefix="seen"),
        "unseen": plan_utterances(test, unseen, count=TEST_CLIPS, seed=seed + 3, prefix="unseen"),
        "train": plan_utterances(training, seen, count=clips, seed=seed, prefix="train"),
    }
    return {
        name: synthesize_manifest(utterances, folder / f"{name}.jsonl", processes=processes)
        for name, utterances in plans.items()
    }
