"""Find the `Family` of a model by its name and its config. Other packages add families by an entry point.

The entry point group is `mowa.families`; it is read when a family is first looked up. It imports no torch.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from mowa.errors import ModelError
from mowa.families.unregistered import describe_config, describe_net, unsupported_reason
from mowa.plugins import load_entry_point
from mowa.types import Family

log = logging.getLogger("mowa")

ENTRY_POINT_GROUP = "mowa.families"
CAPABILITIES = frozenset({"cpu_plan", "packing", "chunked", "coreml", "ctranslate2", "tensorrt_mask"})
"""What `Family.supports` may contain."""
_BY_TYPE: dict[str, Family] = {}
_entry_points_loaded = False


def register(family: Family) -> Family:
    """Register `family` under its model types, and return it.

    Raises:
        ValueError: the name or a model type is taken, or `supports` has an unknown capability.
        re.error: a name pattern is not a regular expression.
    """
    for known in _BY_TYPE.values():
        if known.name == family.name:
            raise ValueError(f"there is a family {family.name!r} already")
    for model_type in family.model_types:
        if model_type in _BY_TYPE:
            raise ValueError(f"{model_type!r} belongs to the family {_BY_TYPE[model_type].name!r} already")
    if unknown := sorted(family.supports - CAPABILITIES):
        raise ValueError(f"{family.name}: supports: unknown {', '.join(unknown)}; known are {sorted(CAPABILITIES)}")
    for pattern in family.name_patterns:
        re.compile(pattern)
    _BY_TYPE.update(dict.fromkeys(family.model_types, family))
    return family


def get_family(model_type: str) -> Family:
    """Return the family of a config's `model_type`.

    Raises:
        ModelError: no family has this model type; the message lists those that are supported.
    """
    _load_entry_points()
    try:
        return _BY_TYPE[model_type]
    except KeyError:
        raise _unsupported(model_type) from None


def family_of(net: Any) -> Family:
    """Return the family of a transformers net; one without a registry entry is described by its modules."""
    _load_entry_points()
    return _BY_TYPE.get(net.config.model_type) or describe_net(net)


def _unsupported(model_type: str, reason: str = "") -> ModelError:
    close = difflib.get_close_matches(model_type, _BY_TYPE, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return ModelError(
        f"unsupported model type {model_type!r}: {hint}{reason}supported are {', '.join(list_model_types())}"
    )


def resolve_family(name: str, config: Mapping[str, Any] | None = None) -> Family:
    """Return the family of a model, by its name and then its config.

    The name is matched against the families' `name_patterns`. A `model_type` in the config, or else its
    `architectures`, must agree; if they do not, the config is used and a warning is logged. A config without either
    leaves the decision to the name. A causal language model of transformers whose type is not registered is described
    by its config (`mowa.families.unregistered`).

    Args:
        name: Hub id or folder; its last part counts. Empty: only the config is used.
        config: the content of config.json, if there is one.

    Raises:
        ModelError: an unsupported model type or architecture; or no family, or several, match the name and the config
            does not decide.
    """
    by_name = _match_name(name)
    by_config = None if config is None else _match_config(config)
    if by_config is None:
        return _single(name, by_name, config)
    if by_name and by_config not in by_name:
        _warn_disagreement(name, " or ".join(family.name for family in by_name), by_config.name)
    return by_config


@cache
def _warn_disagreement(name: str, by_name: str, by_config: str) -> None:
    """Warn once per process: a checkpoint is resolved several times while it is loaded."""
    log.warning("%s is named like a %s model, but its config is of %s: using the config", name, by_name, by_config)


def _match_name(name: str) -> list[Family]:
    last = _last_part(name)
    return [family for family in list_families() if any(_matches(pattern, last) for pattern in family.name_patterns)]


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].partition("@")[0]


def _matches(pattern: str, last: str) -> bool:
    """Whether the pattern matches up to the end of a word: `bert` matches bert-base, not bertweet or distilbert."""
    return re.match(rf"(?:{pattern})(?![a-z0-9])", last, re.IGNORECASE) is not None


def _match_config(config: Mapping[str, Any]) -> Family | None:
    """The family of a config; None if it names neither a model type nor an architecture."""
    if model_type := config.get("model_type"):
        _load_entry_points()
        if model_type in _BY_TYPE:
            return _BY_TYPE[model_type]
        if reason := unsupported_reason(config):
            raise _unsupported(str(model_type), f"{reason}; ")
        return describe_config(config)
    listed = config.get("architectures")
    architectures = tuple(name for name in listed if isinstance(name, str)) if isinstance(listed, list | tuple) else ()
    for family in list_families():
        if set(architectures) & set(family.architectures):
            return family
    if architectures:
        raise ModelError(
            f"unsupported architecture {', '.join(architectures)}, and config.json has no model_type; supported model"
            f" types are {', '.join(list_model_types())}"
        )
    return None


def _single(name: str, candidates: list[Family], config: Mapping[str, Any] | None) -> Family:
    if len(candidates) == 1:
        return candidates[0]
    wanted = "its config.json is needed" if config is None else "its config.json has no model_type or architectures"
    if candidates:
        raise ModelError(f"{name} is named like {' and '.join(one.name for one in candidates)}, and {wanted}")
    last = _last_part(name)
    raise ModelError(f"the family of {last!r} is unknown{_suggest(last)}: {wanted}")


def _suggest(last: str) -> str:
    normalized = last.lower().replace("-", "_").replace(".", "_")
    close = [
        name
        for name in list_family_names()
        if difflib.SequenceMatcher(None, normalized[: len(name)], name).ratio() >= 0.7
    ]
    return f" (closest: {', '.join(close)})" if close else ""


def list_families() -> tuple[Family, ...]:
    """Return all families in order of their names."""
    _load_entry_points()
    return tuple(sorted({family.name: family for family in _BY_TYPE.values()}.values(), key=lambda family: family.name))


def list_family_names() -> tuple[str, ...]:
    """Return the names of all families, sorted."""
    return tuple(family.name for family in list_families())


def list_model_types() -> tuple[str, ...]:
    """Return every `model_type` that `get_family` accepts, sorted."""
    _load_entry_points()
    return tuple(sorted(_BY_TYPE))


def _load_entry_points() -> None:
    """Register the families of installed packages; a package that fails is skipped with a warning."""
    global _entry_points_loaded
    if _entry_points_loaded:
        return
    _entry_points_loaded = True  # before loading: a package may ask for one of our families
    for point in entry_points(group=ENTRY_POINT_GROUP):
        load_entry_point(point, _register_all)


def _register_all(loaded: object) -> None:
    """Register a Family or an iterable of them, all or none."""
    before = dict(_BY_TYPE)
    try:
        for family in loaded if isinstance(loaded, Iterable) else [loaded]:
            if not isinstance(family, Family):
                raise TypeError(f"expected a Family, found {type(family).__name__}")
            register(family)
    except Exception:
        _BY_TYPE.clear()
        _BY_TYPE.update(before)
        raise
