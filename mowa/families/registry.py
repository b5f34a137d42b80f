"""Which architectures mowa knows: one frozen `Family` each, found by a model's config or by what it is called.

Families of other packages join through the entry point group `mowa.families`, when first one is looked for.
Data only. No torch here, and no word on how a family is loaded, trained or scored.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from mowa.errors import ModelError
from mowa.types import Family

log = logging.getLogger("mowa")

ENTRY_POINT_GROUP = "mowa.families"
_BY_TYPE: dict[str, Family] = {}
_joined = False  # whether other packages were asked


def register(family: Family) -> Family:
    """Enter `family` under each of its model types and hand it back. A name or type taken twice is a ValueError."""
    for known in _BY_TYPE.values():
        if known.name == family.name:
            raise ValueError(f"there is a family {family.name!r} already")
    for model_type in family.model_types:
        if model_type in _BY_TYPE:
            raise ValueError(f"{model_type!r} is already the family {_BY_TYPE[model_type].name!r}")
    for alias in family.name_patterns:
        re.compile(alias)
    _BY_TYPE.update(dict.fromkeys(family.model_types, family))
    return family


def get_family(model_type: str) -> Family:
    """The family of a config's `model_type`; a ModelError that lists the known ones otherwise."""
    _join_others()
    try:
        return _BY_TYPE[model_type]
    except KeyError:
        close = difflib.get_close_matches(model_type, _BY_TYPE, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ModelError(
            f"mowa does not know the model type {model_type!r}: {hint}known are {', '.join(list_model_types())}"
        ) from None


def resolve_family(name: str, config: Mapping[str, Any] | None = None) -> Family:
    """The family of the model called `name` (hub id or folder), by its config (as config.json has it) if there is one.

    The config is believed: by its `model_type`, or where it has none, its `architectures`. A name that says otherwise
    is logged. Without a config the name decides, by the families' aliases. No name is ever exchanged for another.

    Raises ModelError: an unknown model type; without a config, a name that no family's aliases match, or two's.
    """
    last = name.rstrip("/").rpartition("/")[2].partition("@")[0]
    called = [family for family in list_families() if any(_matches(alias, last) for alias in family.name_patterns)]
    if config is not None:
        family = _by_config(name, config)
        if called and family not in called:
            log.warning(
                "%s is called like %s, but its config is of %s: the config is believed",
                *(name, " or ".join(one.name for one in called), family.name),
            )
        return family
    if len(called) == 1:
        return called[0]
    if called:
        raise ModelError(
            f"{name} is called like {' and '.join(one.name for one in called)}: only its config.json can tell which"
        )
    raise ModelError(
        f"no family is called like {last!r} ({sum(len(one.name_patterns) for one in list_families())} patterns of "
        f"{len(list_families())} families were tried{_near(last)}): its config.json is needed to tell"
    )


def _by_config(name: str, config: Mapping[str, Any]) -> Family:
    if model_type := config.get("model_type"):
        return get_family(str(model_type))
    asked = tuple(config.get("architectures") or ())
    for family in list_families():
        if set(asked) & set(family.architectures):
            return family
    named = f"the architectures {', '.join(asked)}, which mowa does not know" if asked else "no architectures either"
    raise ModelError(
        f"the config of {name} names no model_type, and {named}: known are {', '.join(list_model_types())}"
    )


def _matches(alias: str, last: str) -> bool:
    """From the beginning, to where a word ends: `bert` is in bert-base, not in bertweet or distilbert."""
    return re.match(rf"(?:{alias})(?![a-z0-9])", last, re.IGNORECASE) is not None


def _near(last: str) -> str:
    spelled = last.lower().replace("-", "_").replace(".", "_")
    close = [
        name for name in list_family_names() if difflib.SequenceMatcher(None, spelled[: len(name)], name).ratio() >= 0.7
    ]
    return f"; nearest are {', '.join(close)}" if close else ""


def list_families() -> tuple[Family, ...]:
    """Every family, by name."""
    _join_others()
    return tuple(sorted({family.name: family for family in _BY_TYPE.values()}.values(), key=lambda family: family.name))


def list_family_names() -> tuple[str, ...]:
    """The families, by name, in alphabetical order."""
    return tuple(family.name for family in list_families())


def list_model_types() -> tuple[str, ...]:
    """Every `model_type` that `find` answers to, in alphabetical order."""
    _join_others()
    return tuple(sorted(_BY_TYPE))


def _join_others() -> None:
    """Register what installed packages bring. Whatever one of them breaks, only it is left out, and that is said."""
    global _joined
    if _joined:
        return
    _joined = True  # before the first is loaded: it may ask for a family of ours
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            _join(point.load())
        except Exception as error:  # anything may go wrong in code that is not ours
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            log.warning("the families of %s (%s) are left out: %s", _distribution(point), point.value, reason)


def _join(brought: object) -> None:
    """All of what an entry point gives, or nothing: a Family or an iterable of them."""
    before = dict(_BY_TYPE)
    try:
        for one in brought if isinstance(brought, Iterable) else [brought]:
            if not isinstance(one, Family):
                raise TypeError(f"it gives a {type(one).__name__}, not a Family")
            register(one)
    except Exception:
        _BY_TYPE.clear()
        _BY_TYPE.update(before)
        raise


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.name
