"""Models, engines and precisions side by side, each measured in a process of its own. Verdicts are `card`'s affair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from mowa.data import sources
from mowa.errors import DataError, ModelError
from mowa.evaluate.drift import drift
from mowa.evaluate.measure import Measured, Request, Speed, measure
from mowa.evaluate.pairs import Rates, rates
from mowa.export import is_export, read
from mowa.files import resolve
from mowa.nouns import Example

SAMPLE = Path(__file__).parents[1] / "assets" / "sample.flac"


@dataclass(frozen=True, slots=True)
class Arm:
    model: str
    engine: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Row:
    """`agreeing`: the share of frames with the first row's likeliest output, where they have the same letters and
    frames, else 0. `wrong`: why there is nothing to say."""

    model: str
    engine: str
    dtype: str
    size: int = 0
    memory: int = 0
    loading_s: float = 0.0
    latency_s: float = 0.0
    rtf: float = 0.0
    agreeing: float = 0.0
    speeds: tuple[Speed, ...] = ()
    rates: Rates | None = None
    wrong: str = ""

    @property
    def name(self) -> str:
        return f"{self.model}, {self.engine} {self.dtype}"


def arms(models: Sequence[str], engines: Sequence[str], dtypes: Sequence[str]) -> list[Arm]:
    """Every model on every engine in every precision; an export has one of each."""
    found = []
    for model in models:
        if is_export(Path(model)):
            found.append(Arm(model, "auto", "auto"))
        else:
            found += [Arm(model, *one) for one in product(engines or ("native",), dtypes or ("auto",))]
    return found


def measured(
    arms: Sequence[Arm],
    data: str | None,
    split: str,
    clips: int,
    speeds: tuple[tuple[int, int], ...],
    told: Callable[[str, float], object],
) -> list[Row]:
    """A row an arm, in their order. DataError where there is nothing to hear."""
    examples = list(sources.read(data, split, texts=False)) if data else [Example("sample", str(SAMPLE), "", 0.0)]
    if not examples:
        raise DataError(f"{data} has no recordings")
    order = np.random.default_rng(1).permutation(len(examples))[:clips]
    chosen = [examples[index] for index in order]
    rows, first = [], None
    for index, arm in enumerate(arms):
        told(f"{arm.model}: hearing", index / len(arms))
        try:
            request = Request(arm.model, tuple(one.audio for one in chosen), arm.engine, arm.dtype, True, speeds)
            found = measure(request)
        except ModelError as wrong:
            rows.append(Row(arm.model, arm.engine, arm.dtype, wrong=str(wrong)))
            continue
        first = first or found
        rows.append(_row(arm, found, first, chosen))
    return rows


def _row(arm: Arm, found: Measured, first: Measured, examples: Sequence[Example]) -> Row:
    texts = [one.text for one in examples]
    alike = all(a.shape == b.shape for a, b in zip(first.emissions, found.emissions, strict=True))
    agreeing = drift(first.emissions, found.emissions, 0).agreeing if alike else 0.0
    return Row(
        arm.model, found.engine, found.dtype, _size(arm.model), found.memory, found.loading_s, found.latency_s,
        found.hearing_s / found.audio_s, agreeing, found.speeds, rates(texts, found.texts) if all(texts) else None,
    )  # fmt: skip


def _size(model: str) -> int:
    """Bytes of its weights on disk."""
    if is_export(Path(model)):
        return read(Path(model)).size
    folder = resolve(model, offline=True).folder
    kept = [*folder.glob("model*.safetensors")] or [*folder.glob("pytorch_model*.bin")]
    return sum(file.stat().st_size for file in kept)
