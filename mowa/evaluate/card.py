"""The report card of a model in some schemes and formats, and whether each may ship. How it looks is `page`'s affair.

| verdict  | when                                                                                                     |
|----------|----------------------------------------------------------------------------------------------------------|
| ship     | word errors increase by no more than `most` (relative)                                                   |
| doubtful | they increase by more, but that may be chance; or there were no texts, or too few words, to know by      |
| refuse   | they increase by more, and not by chance, in all or for one value of a tag; or fewer than 80 % of frames |
|          | agree: the net says something else                                                                       |
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mowa import machine
from mowa.evaluate.drift import Drift, drift
from mowa.evaluate.measure import Measured, Speed
from mowa.evaluate.pairs import Apart, Rates, apart, rates
from mowa.files import atomic_write
from mowa.nouns import Example

SHIP, DOUBTFUL, REFUSE = "ship", "doubtful", "refuse"
MOST = 0.02  # of word errors, relative
AGREEING = 0.8
WORDS = 200  # fewer say too little


@dataclass(frozen=True, slots=True)
class Row:
    """A model in one scheme and format. `share` is its size by that of float32 in the same format, `speedup` how many
    times as fast as that it heard all recordings. `tagged`: the same of the recordings with each value of a tag."""

    scheme: str
    format: str
    folder: str
    size: int
    share: float
    engine: str = ""
    dtype: str = ""
    memory: int = 0
    rtf: float = 0.0
    speedup: float = 0.0
    latency_s: float = 0.0
    loading_s: float = 0.0
    speeds: tuple[Speed, ...] = ()
    drift: Drift | None = None
    rates: Rates | None = None
    apart: Apart | None = None
    tagged: Mapping[str, tuple[Rates, Apart]] = field(default_factory=dict)
    verdict: str = SHIP
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Card:
    """`rows` of `model` over `data`, so many recordings; float32 in the first format is what drift is measured from."""

    model: str
    data: str
    recordings: int
    audio_s: float
    most: float
    machine: str
    versions: Mapping[str, str | None]
    rows: tuple[Row, ...]


def row(
    scheme: str,
    format: str,
    folder: Path,
    size: int,
    found: Measured,
    reference: Measured,
    baseline: tuple[int, Measured],
    examples: Sequence[Example],
    *,
    blank: int,
    most: float = MOST,
    tag: str = "",
) -> Row:
    """What was `found`, beside the float32 `reference` of drift and texts and the `baseline` (size, measured) of size
    and speed."""
    far = drift(reference.emissions, found.emissions, blank)
    texts = [example.text for example in examples]
    known = all(texts)
    heard = rates(texts, found.texts) if known else None
    pair = apart(texts, reference.texts, found.texts) if known else None
    tagged = {}
    for value in sorted({str(example.tags.get(tag, "")) for example in examples} if known and tag else ()):
        chosen = [index for index, one in enumerate(examples) if str(one.tags.get(tag, "")) == value]
        said, first, heard_now = ([each[i] for i in chosen] for each in (texts, reference.texts, found.texts))
        tagged[value] = rates(said, heard_now), apart(said, first, heard_now)
    verdict, reason = judge(far, heard, pair, most, tagged)
    return Row(
        scheme, format, str(folder), size, size / baseline[0], found.engine, found.dtype, found.memory,
        found.hearing_s / found.audio_s, baseline[1].hearing_s / found.hearing_s, found.latency_s, found.loading_s,
        found.speeds, far, heard, pair, tagged, verdict, reason,
    )  # fmt: skip


def judge(
    far: Drift,
    heard: Rates | None,
    pair: Apart | None,
    most: float = MOST,
    tagged: Mapping[str, tuple[Rates, Apart]] | None = None,
) -> tuple[str, str]:
    """Verdict and why, in a line."""
    if far.agreeing < AGREEING:
        return REFUSE, f"only {far.agreeing:.0%} of frames say what float32 says"
    if heard is None or pair is None:
        return DOUBTFUL, f"without texts only drift is known: {far.agreeing:.1%} of frames agree"
    change = f"word errors {pair.wer:+.1%}, {most:.1%} allowed"
    if heard.words < WORDS:
        return DOUBTFUL, f"{heard.words} words are too few to tell ({change})"
    low, high = pair.wer_interval
    if low > most:
        return REFUSE, f"{change}, and not by chance ({low:+.1%} to {high:+.1%})"
    for value, (those, more) in (tagged or {}).items():
        if those.words >= WORDS and more.wer_interval[0] > most:
            return REFUSE, f"word errors of {value or 'what has no tag'} {more.wer:+.1%}, {most:.1%} allowed ({change})"
    if pair.wer <= most:
        return SHIP, change
    return DOUBTFUL, f"{change}, though {low:+.1%} to {high:+.1%} may be chance"


def machine_line() -> str:
    return f"{machine.processor()}, {machine.cores()} cores"


def write(card: Card, path: Path) -> None:
    """As JSON."""
    atomic_write(path, json.dumps(_plain(asdict(card)), ensure_ascii=False, indent=1) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return round(value, 6) if isinstance(value, float) else value
