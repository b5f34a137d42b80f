"""Which architectures mowa knows: one frozen `Family` each, found by the `model_type` of a transformers config.

Data only. No torch here, and no word on how a family is loaded, trained or scored.
"""

from __future__ import annotations

import difflib

from mowa.errors import ModelError
from mowa.nouns import Family

_BY_TYPE: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Enter `family` under each of its model types and hand it back. A type taken twice is a ValueError: our bug."""
    for model_type in family.model_types:
        if model_type in _BY_TYPE:
            raise ValueError(f"{model_type!r} is already the family {_BY_TYPE[model_type].name!r}")
    _BY_TYPE.update(dict.fromkeys(family.model_types, family))
    return family


def find(model_type: str) -> Family:
    """The family of a config's `model_type`; a ModelError that lists the known ones otherwise."""
    try:
        return _BY_TYPE[model_type]
    except KeyError:
        close = difflib.get_close_matches(model_type, _BY_TYPE, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ModelError(
            f"mowa does not know the model type {model_type!r}: {hint}known are {', '.join(model_types())}"
        ) from None


def families() -> tuple[Family, ...]:
    """Every family, by name."""
    return tuple(sorted({family.name: family for family in _BY_TYPE.values()}.values(), key=lambda family: family.name))


def names() -> tuple[str, ...]:
    """The families, by name, in alphabetical order."""
    return tuple(family.name for family in families())


def model_types() -> tuple[str, ...]:
    """Every `model_type` that `find` answers to, in alphabetical order."""
    return tuple(sorted(_BY_TYPE))
