"""Name and subsample the data sets of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from mowa.training.config.shared import DataSource

Item = TypeVar("Item")


def name_sources(sources: Sequence[DataSource], kind: str) -> dict[str, DataSource]:
    """Name sources: a single one `kind`, several `kind-SPLIT` or `kind-FILE`."""
    if len(sources) == 1:
        return {kind: sources[0]}
    names: dict[str, DataSource] = {}
    for source in sources:
        name = f"{kind}-{source.split or Path(source.path).stem}"
        while name in names:
            name += "+"
        names[name] = source
    return names


def subsample(items: list[Item], max_samples: int) -> list[Item]:
    """Return at most `max_samples` items (0: all), always the same ones, in their order."""
    if not max_samples or len(items) <= max_samples:
        return items
    chosen = np.random.default_rng(0).permutation(len(items))[:max_samples]
    return [items[index] for index in sorted(chosen)]
