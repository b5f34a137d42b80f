"""A training run as one value: read from YAML, checked key by key, written back beside what it made."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mowa.data.augment import Roughness
from mowa.data.text import POLISH
from mowa.errors import MissingPart, RecipeError


@dataclass(frozen=True, slots=True)
class Data:
    """Manifests (JSON lines: id, audio, text, duration_s)."""

    train: str = ""
    dev: str = ""
    longest_s: float = 15.0


@dataclass(frozen=True, slots=True)
class Augment:
    """Rough audio, from none at step `start` to all of it at step `full`."""

    start: int = 300
    full: int = 2500
    how: Roughness = field(default_factory=Roughness)


@dataclass(frozen=True, slots=True)
class Optimise:
    """How weights move. `batch_s` seconds of (padded) audio a step; the shortest clips come first."""

    steps: int = 3000
    batch_s: float = 40.0
    shortest_first: int = 300
    learning_rate: float = 1e-3
    warmup_steps: int = 400
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    bf16: bool = True
    seed: int = 0
    evaluate_every: int = 500


@dataclass(frozen=True, slots=True)
class Recipe:
    """`net` holds the keys of the transformers config of `model_type`, as its documentation names them."""

    name: str
    language: str = "pl"
    model_type: str = "wav2vec2"
    alphabet: str = POLISH
    net: dict[str, Any] = field(default_factory=dict)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    optimise: Optimise = field(default_factory=Optimise)


def read(path: Path) -> Recipe:
    """A recipe file → Recipe. A wrong key or value is a RecipeError with its path and the nearest right key."""
    try:
        import yaml
    except ImportError:
        raise MissingPart("recipes need pyyaml: pip install 'mowa[train]'") from None
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as wrong:
        raise RecipeError(f"{path}: not YAML ({' '.join(str(wrong).split())})") from None
    return _build(Recipe, tree, str(path))


def write(recipe: Recipe, path: Path) -> None:
    import yaml

    tree = dataclasses.asdict(
        recipe, dict_factory=lambda pairs: {k: list(v) if isinstance(v, tuple) else v for k, v in pairs}
    )
    path.write_text(yaml.safe_dump(tree, allow_unicode=True, sort_keys=False))


def _build(kind: Any, tree: Any, where: str) -> Any:
    if not isinstance(tree, dict):
        raise RecipeError(f"{where}: expected keys and values, found {tree!r}")
    hints = typing.get_type_hints(kind)
    for key in tree:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, 1)
            raise RecipeError(
                f"{where}: {key} is no key here; {f'did you mean {near[0]}?' if near else 'known: ' + ', '.join(hints)}"
            )
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.name not in tree and f.default is f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise RecipeError(f"{where}: {', '.join(missing)} is missing")
    return kind(**{key: _value(hints[key], value, f"{where}: {key}") for key, value in tree.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    origin = typing.get_origin(hint)
    if origin is tuple and isinstance(value, list | tuple) and len(value) == len(typing.get_args(hint)):
        return tuple(_value(part, item, where) for part, item in zip(typing.get_args(hint), value, strict=True))
    wanted = origin or hint
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(wanted, type) and isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)):
        return value
    raise RecipeError(f"{where}: expected {getattr(hint, '__name__', hint)}, found {value!r}")
