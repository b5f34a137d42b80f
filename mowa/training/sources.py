"""Name and subsample the data sets of a run, and recognize those of another task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mowa.data.chat import files, formats
from mowa.data.manifests.rows import BadRow, guess_columns
from mowa.errors import DataError, MowaError
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


@contextmanager
def hint_at_other_task(sources: Sequence[DataSource], task: str) -> Iterator[None]:
    """Extend a DataError where the data are those of another task: conversations for ctc, recordings for causal."""
    try:
        yield
    except DataError as error:
        for source in sources:
            fields = _read_first_row(source)
            has_audio = "audio" in guess_columns(tuple(fields))
            if task == "ctc" and not has_audio and _is_text(fields):
                hint = "has conversations or texts and no recordings: they train a language model (model, task: causal)"
            elif task == "causal" and has_audio:
                hint = "has recordings: they train a speech model (model, task: ctc)"
            else:
                continue
            raise DataError(f"{error}\n{source.path} {hint}") from None
        raise


def _read_first_row(source: DataSource) -> Mapping[str, Any]:
    """Return the first row of a table; empty if the source is none, or cannot be read."""
    with suppress(MowaError, StopIteration, OSError):
        rows = files.read_rows(source.path, source.split)
        return next(fields for _, _, fields in rows if not isinstance(fields, BadRow))
    return {}


def _is_text(fields: Mapping[str, Any]) -> bool:
    with suppress(MowaError):
        formats.detect_format([fields])
        return True
    return False


def subsample(items: list[Item], max_samples: int) -> list[Item]:
    """Return at most `max_samples` items (0: all), always the same ones, in their order."""
    if not max_samples or len(items) <= max_samples:
        return items
    chosen = np.random.default_rng(0).permutation(len(items))[:max_samples]
    return [items[index] for index in sorted(chosen)]
