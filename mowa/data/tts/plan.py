"""Choose sentence, split, voice, rate and pitch of each recording of a synthetic corpus.

All choices follow from the seed and the sentence, not from the order of the sentences or the version of Python, so a
corpus that gets more sentences keeps the recordings that it has.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mowa.data.text.normalize import normalize_text
from mowa.data.tts.engines import SpeechEngine, Voice
from mowa.errors import DataError

MIN_VOICES_FOR_SPLIT = 3  # with fewer voices, train and dev share them


@dataclass(frozen=True, slots=True)
class Clip:
    """A recording to make: `line` is the sentence's 1-based line number, `split` is "train" or "dev"."""

    id: str
    line: int
    text: str
    voice: Voice
    split: str


def plan_clips(
    sentences: Iterable[str],
    engine: SpeechEngine,
    language: str,
    *,
    clips: int | None = None,
    dev: float = 0.05,
    seed: int = 0,
    sample_rate_hz: int = 16_000,
) -> list[Clip]:
    """Choose sentence, split, voice, rate and pitch of each recording, in the order of the sentences.

    Arguments and errors are those of `mowa.data.synthesize.synthesize`.
    """
    lines: dict[str, int] = {}
    for number, sentence in enumerate(sentences, 1):
        if text := " ".join(sentence.split()):
            lines.setdefault(text, number)
    if not lines:
        raise DataError("there are no sentences; write one per line")
    total = len(lines) if clips is None else clips
    chosen = sorted(lines, key=lambda text: _draw(seed, text))[:total]
    held_out = _hold_out(chosen, dev, normalize_text)
    speakers = _hold_out(engine.voices, dev if len(engine.voices) >= MIN_VOICES_FOR_SPLIT else 0, str)
    if held_out and speakers:
        voices = {"dev": sorted(speakers), "train": [name for name in engine.voices if name not in speakers]}
    else:
        voices = {"dev": list(engine.voices), "train": list(engine.voices)}
    prosody = [(rate, pitch) for rate in engine.rates for pitch in engine.pitches]
    most = min(map(len, voices.values())) * len(prosody)
    if total > most * len(chosen):
        fewest = min(voices, key=lambda split: len(voices[split]))
        have = f"{_count(most, 'combination')} of {fewest} voice, rate and pitch for {_count(len(chosen), 'sentence')}"
        raise DataError(f"{total} recordings need more than {have}; ask for at most {most * len(chosen)}")
    made_by = (engine.name, engine.template, engine.encoding, language, sample_rate_hz)
    plan = []
    for number in range(total):
        text, repeat = chosen[number % len(chosen)], number // len(chosen)
        split = "dev" if text in held_out else "train"
        names = voices[split]
        name = names[(_draw(seed, text, "voice") + repeat) % len(names)]
        setting = (_draw(seed, text, name) + repeat // len(names)) % len(prosody)
        voice = Voice(name, *prosody[setting])
        digest = _draw(*made_by, voice.name, voice.rate or 0, voice.pitch or 0, text)
        slug = re.sub(r"[^\w+.-]+", "_", Path(name).name)[:40]
        plan.append(Clip(f"{slug}-{digest:016x}", lines[text], text, voice, split))
    return sorted(plan, key=lambda clip: clip.line)


def _draw(*parts: object) -> int:
    """Return 64 bits that follow from the parts alone."""
    text = "\0".join(map(str, parts)).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _hold_out(items: Sequence[str], share: float, key: Callable[[str], str]) -> set[str]:
    """Choose about `share` of the items by a hash of their keys: at least one key, and never all."""
    if not share:
        return set()
    keys = {item: key(item) for item in items}
    ranked = sorted(set(keys.values()), key=_draw)
    below = sum(_draw(name) < share * 2**64 for name in ranked)
    held_out = set(ranked[: min(max(1, below), len(ranked) - 1)])
    return {item for item, name in keys.items() if name in held_out}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
